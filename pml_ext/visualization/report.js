"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
for (const element of document.querySelectorAll(".needs-script")) element.hidden = false;

// A class opens in a dialog, from wherever its name stands.
const dialog = document.getElementById("class-dialog");
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
const inPercent = (value) => `${(100 * value).toFixed(1)}%`;
function linkTo(code, ...content) {
  const button = make(code in data.details ? "button" : "span");
  button.append(...content);
  if (!(code in data.details)) return button;
  button.className = "class-link";
  button.type = "button";
  button.title = "Show this class";
  button.addEventListener("click", () => openClass(code));
  return button;
}
function tileOf(key, noun, kind, similarity) {
  const [number, code] = data.shown[key];
  const file = data.files[key];
  const name = data.codes[code];
  const lead = similarity === undefined ? "Query, " : `${kind}: `;
  const told = `${lead}${noun} ${number}, class ${name}${file === undefined ? "" : `, ${file}`}`;
  const picture = make(data.pictures[key] ? "img" : "div", data.pictures[key] ? "" : "blank");
  if (data.pictures[key]) {
    picture.src = data.pictures[key];
    picture.alt = told;
  } else {
    picture.textContent = number;
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", told);
  }
  picture.title = told;
  const caption = make("figcaption");
  if (similarity === undefined) {
    caption.append("Query");
  } else {
    const sign = make("b", "", kind === "right" ? "\u2713" : "\u2717");
    sign.setAttribute("aria-hidden", "true");
    caption.append(sign, make("span", "hidden", `${kind},`), ` ${similarity.toFixed(2)}`, make("span", "name", name));
  }
  if (file !== undefined) caption.append(make("span", "file", file.replace(/[/\\]+$/, "").split(/[/\\]/).pop()));
  const figure = make("figure", `tile ${kind}`);
  figure.append(picture, caption);
  return figure;
}
function openClass(code) {
  const [images, metrics, others, pairs, queries] = data.details[code];
  const names = Object.keys(data.metrics);
  const body = document.getElementById("class-body");
  const say = (values) => values.map((value, i) => `${names[i]} ${inPercent(value)}`).join(", ");
  const counted = `${images.toLocaleString("en")} ${images === 1 ? "image" : "images"}`;
  const parts = [make("p", "", others ? counted : `${counted}: ${say(metrics)}`)];
  if (others) parts.push(...[metrics, others].map((values, i) => make("p", "", `${data.titles[i]}: ${say(values)}`)));
  const inRun = others ? ` (${data.titles[0]})` : "";
  parts.push(make("h3", "", `Taken for${inRun}`));
  const list = make("ul", "taken");
  for (const [other, share, first] of pairs) {
    const item = make("li");
    const shares = `: ${inPercent(share)} of the R nearest neighbors, ${inPercent(first)} of the first ones`;
    item.append(linkTo(other, data.codes[other]), shares);
    list.append(item);
  }
  parts.push(pairs.length ? list : make("p", "", "No other class."), make("h3", "", `Worst queries${inRun}`));
  for (const [key, precision, neighbors] of queries) {
    const row = make("div", "tiles");
    const found = make("ol", "tiles");
    for (const [neighbor, similarity, right] of neighbors) {
      const item = make("li");
      item.append(tileOf(neighbor, data.noun, right ? "right" : "wrong", similarity));
      found.append(item);
    }
    row.append(tileOf(key, "image", "asked"), found);
    const query = make("article", "query");
    query.append(make("h4", "", `image ${data.shown[key][0]}, AP@R ${inPercent(precision)}`), row);
    parts.push(query);
  }
  const heading = document.getElementById("class-name");
  heading.textContent = data.codes[code];
  body.replaceChildren(...parts);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  heading.focus();
}
document.getElementById("class-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
for (const place of document.querySelectorAll("[data-class]")) {
  if (place.dataset.class in data.details) place.replaceWith(linkTo(place.dataset.class, ...place.childNodes));
}

// Tables: a click on a heading sorts, another one turns the order round. One class of each is in the tab order; arrow
// keys move to the others.
const collator = new Intl.Collator("en", { numeric: true });
function keyOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
function makeTabStop(table, link) {
  for (const other of table.querySelectorAll(".class-link[tabindex='0']")) other.tabIndex = -1;
  if (link) link.tabIndex = 0;
}
const linksOf = (table) => [...table.querySelectorAll("tbody tr:not([hidden]) .class-link")];
for (const table of document.querySelectorAll("table.sortable")) {
  for (const link of linksOf(table)) link.tabIndex = -1;
  makeTabStop(table, linksOf(table)[0]);
  table.tBodies[0].addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    const links = linksOf(table);
    const next = links[links.indexOf(event.target) + step];
    event.preventDefault();
    if (!next) return;
    makeTabStop(table, next);
    next.focus();
  });
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, column), row]);
    const order = typeof rows[0][0] === "number" ? (a, b) => a - b : collator.compare;
    rows.sort(([a], [b]) => (down ? order(b, a) : order(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
    makeTabStop(table, linksOf(table)[0]);
  }));
}
const filter = document.getElementById("class-filter");
filter?.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const row of document.getElementById("class-table").tBodies[0].rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  }
  const table = document.getElementById("class-table");
  makeTabStop(table, linksOf(table)[0]);
});

// Map: one point is in the tab order; arrow keys move to the nearest point in their direction.
const svg = document.getElementById("map-svg");
if (svg) {
  const figure = document.getElementById("map-figure");
  const ring = document.getElementById("map-ring");
  const tip = document.getElementById("map-tip");
  const select = document.getElementById("map-class");
  const places = [...svg.querySelectorAll("path")].map((path, i) => {
    const [group, image] = data.points[i];
    const file = data.files[image];
    const [x, y] = path.style.translate.split(" ").map(parseFloat);
    path.setAttribute("role", "img");
    const told = `image ${image}${file === undefined ? "" : `, ${file}`}`;
    path.setAttribute("aria-label", `${data.names[group]}, ${told}`);
    path.setAttribute("tabindex", i ? "-1" : "0");
    return { path, x, y: y || 0, group, told, picture: data.pictures[image] };
  });
  svg.setAttribute("role", "application");
  svg.setAttribute("aria-describedby", "map-help");
  let current = places[0];
  let shown = null;

  const isActive = (place) => select.value === "" || Number(select.value) === place.group;
  function hide() {
    shown = null;
    tip.hidden = true;
    ring.style.visibility = "hidden";
  }
  function show(place) {
    shown = place;
    const image = tip.querySelector("img");
    image.hidden = !place.picture;
    if (place.picture) image.src = place.picture;
    tip.querySelector("b").textContent = data.names[place.group];
    tip.querySelector("small").textContent = place.told;
    tip.hidden = false;
    ring.setAttribute("cx", place.x);
    ring.setAttribute("cy", place.y);
    ring.style.visibility = "visible";
    const at = new DOMPoint(place.x, place.y).matrixTransform(svg.getScreenCTM());
    const box = figure.getBoundingClientRect();
    const [x, y] = [at.x - box.left, at.y - box.top];
    const left = x + 14 + tip.offsetWidth > box.width ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(4, Math.min(left, box.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y - tip.offsetHeight / 2, box.height - tip.offsetHeight - 4))}px`;
  }
  function go(place) {
    if (!place) return;
    current.path.setAttribute("tabindex", "-1");
    current = place;
    current.path.setAttribute("tabindex", "0");
    current.path.focus({ preventScroll: true });
    show(place);
  }
  function nearest(candidates, x, y) {
    let [best, least] = [null, Infinity];
    for (const place of candidates) {
      const distance = Math.hypot(place.x - x, place.y - y);
      if (distance < least) [best, least] = [place, distance];
    }
    return [best, least];
  }
  function underPointer(event) {
    const matrix = svg.getScreenCTM();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    const [place, distance] = nearest(places.filter(isActive), at.x, at.y);
    return distance * matrix.a < 16 ? place : null;
  }
  function inDirection(dx, dy) {
    return nearest(places.filter((place) => {
      const [x, y] = [place.x - current.x, place.y - current.y];
      const along = x * dx + y * dy;
      return isActive(place) && along > 0 && Math.abs(x * dy - y * dx) <= along;
    }), current.x, current.y)[0];
  }
  function inOrder(step) {
    const active = places.filter(isActive);
    return active[(active.indexOf(current) + step + active.length) % active.length];
  }

  svg.addEventListener("pointermove", (event) => {
    const place = underPointer(event);
    if (place) show(place);
    else if (document.activeElement === current.path) show(current);
    else hide();
  });
  svg.addEventListener("pointerleave", () => (document.activeElement === current.path ? show(current) : hide()));
  svg.addEventListener("click", (event) => go(underPointer(event)));
  figure.addEventListener("focusin", (event) => { // on the svg, this would put the svg itself into the tab order
    const place = places.find((other) => other.path === event.target);
    if (place && place !== shown) show(place);
  });
  figure.addEventListener("focusout", hide);
  const moves = {
    ArrowLeft: () => inDirection(-1, 0), ArrowRight: () => inDirection(1, 0), ArrowUp: () => inDirection(0, -1),
    ArrowDown: () => inDirection(0, 1), PageUp: () => inOrder(-1), PageDown: () => inOrder(1),
  };
  svg.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(moves[event.key]());
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

  const sorted = data.names.map((name, i) => [name, i]).sort(([a], [b]) => collator.compare(a, b));
  for (const [name, i] of sorted) select.append(new Option(name, i));
  select.addEventListener("change", () => {
    figure.classList.toggle("one", select.value !== "");
    for (const place of places) place.path.classList.toggle("chosen", select.value !== "" && isActive(place));
    const count = places.filter(isActive).length;
    document.getElementById("map-status").textContent = `${count} points shown`;
    hide();
    if (!isActive(current)) {
      current.path.setAttribute("tabindex", "-1");
      current = places.find(isActive);
      current.path.setAttribute("tabindex", "0");
    }
  });
}
