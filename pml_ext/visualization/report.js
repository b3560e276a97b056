"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
for (const element of document.querySelectorAll(".needs-script")) element.hidden = false;

// Tables: a click on a heading sorts, another one turns the order round.
const collator = new Intl.Collator("en", { numeric: true });
function keyOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, column), row]);
    const order = typeof rows[0][0] === "number" ? (a, b) => a - b : collator.compare;
    rows.sort(([a], [b]) => (down ? order(b, a) : order(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}
const filter = document.getElementById("class-filter");
filter?.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const row of document.getElementById("class-table").tBodies[0].rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  }
});

// Map: one point is in the tab order; arrow keys move to the nearest point in their direction.
const svg = document.getElementById("map-svg");
if (svg) {
  const figure = document.getElementById("map-figure");
  const ring = document.getElementById("map-ring");
  const tip = document.getElementById("map-tip");
  const select = document.getElementById("map-class");
  const places = [...svg.querySelectorAll("path")].map((path, i) => {
    const [group, image, picture] = data.points[i];
    const [x, y] = path.style.translate.split(" ").map(parseFloat);
    path.setAttribute("role", "img");
    path.setAttribute("aria-label", `${data.names[group]}, image ${image}`);
    path.setAttribute("tabindex", i ? "-1" : "0");
    return { path, x, y: y || 0, group, image, picture };
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
    tip.querySelector("small").textContent = `image ${place.image}`;
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
