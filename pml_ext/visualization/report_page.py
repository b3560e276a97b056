"""The page of a retrieval report: from numbers and pictures to one HTML file that loads nothing."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from pml_ext.version import __version__

MAX_CLASS_ROWS = 2000
_MAX_NAMES = 200  # of left-out classes
_MAX_LEGEND = 12
_SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-4.8 4.5 3.4h-9z", "M0-5 5 0 0 5-5 0z")
_METRICS = (
    ("P@1", "share of queries whose nearest neighbour is of the same class"),
    ("R-precision", "share of the same class among the R nearest, R being the number of images to find of the class"),
    ("MAP@R", "as R-precision, but early neighbours count more"),
)


class ClassRow(NamedTuple):
    """A class and its metrics, 0 to 1."""

    name: str
    images: int
    metrics: tuple[float, ...]


class ConfusedPair(NamedTuple):
    """Shares of class ``name`` whose neighbours are of class ``other``."""

    name: str
    other: str
    images: int
    first: float
    among_r: float


class Neighbor(NamedTuple):
    """A neighbour of a query, and the ``data:`` address of its picture, or None."""

    image: int
    name: str
    right: bool
    similarity: float
    picture: str | None


class Query(NamedTuple):
    """A query with its neighbours, from near to far."""

    image: int
    name: str
    average_precision: float
    picture: str | None
    neighbors: list[Neighbor]


class Point(NamedTuple):
    """An image on the map. ``class_index`` counts in ``Report.map_names``."""

    x: float
    y: float
    class_index: int
    image: int
    picture: str | None


class Histogram(NamedTuple):
    """Shares of pairs in bins of equal width, each kind summing to 1 (or 0 where there is none)."""

    low: float
    width: float
    positive: list[float]
    negative: list[float]
    mean_positive: float
    mean_negative: float
    separation: float  # probability that a positive pair is more similar than a negative one


class Report(NamedTuple):
    """All that the page shows."""

    title: str
    num_images: int  # queries
    num_gallery: int | None  # None: the queries search each other
    num_classes: int
    embedding_size: int
    metrics: tuple[float, ...]
    left_out: list[str]
    classes: list[ClassRow]  # worst first
    pairs: list[ConfusedPair]
    worst: list[Query]
    random: list[Query]
    points: list[Point]
    map_names: list[str]
    method: str
    histogram: Histogram


def render_page(report: Report) -> str:
    """Return the HTML. Whatever the caller gave is escaped, and a policy lets no other script run."""
    folder = files("pml_ext.visualization")
    css, script = (folder.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [
        ("metrics", "Metrics", _metrics(report)),
        ("classes", "Classes", _classes(report)),
        ("confusions", "Confused classes", _confusions(report.pairs)),
        ("gallery", "Queries", _gallery(report)),
        ("map", "Map", _map(report)),
        ("similarities", "Similarities", _histogram(report.histogram)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="h-{key}">\n<h2 id="h-{key}">{heading}</h2>\n{content}\n</section>'
        for key, heading, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{escape(report.title)}</h1>
<p>{_count(report.num_images, "image")} of {_count(report.num_classes, "class", "classes")}, embeddings of
{_count(report.embedding_size, "number")}. {_searched(report)} by cosine similarity.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main" tabindex="-1">
{body}
</main>
<footer><p>Made by pml-ext {escape(__version__)}.</p></footer>
<script type="application/json" id="data">{_json(report)}</script>
<script>{script}</script>
</body>
</html>
"""


def _searched(report: Report) -> str:
    if report.num_gallery is None:
        return "Each image is searched among all others"
    return f"Each image is a query that is searched in a gallery of {_count(report.num_gallery, 'other image')}"


def _json(report: Report) -> str:
    names = [name for name, _ in _METRICS]
    data = {
        "metrics": dict(zip(names, report.metrics, strict=True)),
        "classes": [[row.name, row.images, *row.metrics] for row in report.classes],
        "names": report.map_names,
        "points": [[point.class_index, point.image, point.picture or ""] for point in report.points],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")  # no </script>, no <!--


def _metrics(report: Report) -> str:
    cards = "".join(
        f'<div><dt>{name}</dt><dd class="value"><data value="{value!r}">{_percent(value)}</data></dd>'
        f"<dd>{text}</dd></div>"
        for (name, text), value in zip(_METRICS, report.metrics, strict=True)
    )
    return f'<dl class="cards">{cards}</dl>{_left_out(report)}'


def _left_out(report: Report) -> str:
    names = report.left_out
    if not names:
        return ""
    rule, one, each = (
        ("without another image to find; they stay among the images that are searched", ", which has one image,", "one")
        if report.num_gallery is None
        else ("without an image to find in the gallery", "", "none")
    )
    if len(names) == 1:
        return f"<p>Left out of the metrics: the class {_strong(names[0])}{one} {rule}.</p>"
    listed = "".join(f"<li>{escape(name)}</li>" for name in names[:_MAX_NAMES])
    more = f"<p>and {len(names) - _MAX_NAMES:,} more</p>" if len(names) > _MAX_NAMES else ""
    return (
        f"<details><summary>Left out of the metrics: {len(names):,} classes with {each} image each</summary>"
        f'<p>They are {rule}.</p><ul class="names">{listed}</ul>{more}</details>'
    )


def _classes(report: Report) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_breakable(row.name)}</th><td data-value="{row.images}">{row.images:,}</td>'
        + "".join(f'<td data-value="{value!r}">{_percent(value)}</td>' for value in row.metrics[:-1])
        + f'<td class="bar" data-value="{row.metrics[-1]!r}" style="--share:{row.metrics[-1]:.3f}">'
        f"{_percent(row.metrics[-1])}</td></tr>"
        for row in report.classes[:MAX_CLASS_ROWS]
    )
    count = len(report.classes)
    shown = f"The {MAX_CLASS_ROWS:,} worst of {count:,} classes" if count > MAX_CLASS_ROWS else f"{count:,} classes"
    shown = "One class" if count == 1 else shown
    columns = [("Class", "none"), ("Images", "none")] + [(name, "none") for name, _ in _METRICS]
    columns[-1] = ("MAP@R", "ascending")
    table = _table(
        "class-table",
        f"{shown}{'' if report.num_gallery is not None else ' with more than one image'}, worst first",
        columns,
        rows,
    )
    if count < 10:
        return table
    search = '<label>Find a class <input type="search" id="class-filter" autocomplete="off"></label>'
    return f'<p class="controls needs-script" hidden>{search}</p>{table}'


def _confusions(pairs: Sequence[ConfusedPair]) -> str:
    if not pairs:
        return "<p>None: no image has one of another class among its R nearest neighbours.</p>"
    rows = "".join(
        f'<tr><th scope="row">{_breakable(pair.name)}</th><td class="text">{_breakable(pair.other)}</td>'
        f'<td data-value="{pair.images}">{pair.images:,}</td>'
        f'<td data-value="{pair.first!r}">{_percent(pair.first)}</td>'
        f'<td class="bar" data-value="{pair.among_r!r}" style="--share:{pair.among_r:.3f}">'
        f"{_percent(pair.among_r)}</td></tr>"
        for pair in pairs
    )
    columns = [
        ("Class", "none"),
        ("Taken for", "none"),
        ("Images", "none"),
        ("First", "none"),
        ("Among R", "descending"),
    ]
    text = (
        "<p>How often neighbours of a class are of another class: share of the first neighbours of its images, and of "
        "their R nearest.</p>"
    )
    return text + _table("pair-table", "Most confused pairs", columns, rows)


def _table(key: str, caption: str, columns: Iterable[tuple[str, str]], rows: str) -> str:
    head = "".join(
        f'<th scope="col" aria-sort="{order}"><button type="button">{name}</button></th>' for name, order in columns
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">'
        f'<table class="sortable" id="{key}"><caption id="{key}-caption">{caption}.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _gallery(report: Report) -> str:
    parts = [
        '<p class="key">Neighbours from near to far, with their cosine similarities. '
        '<span class="right"><b aria-hidden="true">✓</b> solid frame: same class</span> '
        '<span class="wrong"><b aria-hidden="true">✗</b> dashed frame: another class</span></p>'
    ]
    for heading, queries in (("Worst queries, by AP@R", report.worst), ("Random queries", report.random)):
        if queries:
            noun = "image" if report.num_gallery is None else "gallery image"
            parts.append(f"<h3>{heading}</h3>" + "".join(_query(query, noun) for query in queries))
    return "\n".join(parts)


def _query(query: Query, noun: str) -> str:
    alt = f"Query, image {query.image}, class {query.name}"
    tiles = "".join(_neighbor(neighbor, noun) for neighbor in query.neighbors)
    return (
        f'<article class="query"><h4>{escape(query.name)} <small>image {query.image}, AP@R '
        f'{_percent(query.average_precision)}</small></h4><div class="tiles"><figure class="tile asked">'
        f"{_picture(query.picture, alt, query.image)}<figcaption>Query</figcaption></figure>"
        f'<ol class="tiles">{tiles}</ol></div></article>'
    )


def _neighbor(neighbor: Neighbor, noun: str) -> str:
    kind, sign = ("right", "✓") if neighbor.right else ("wrong", "✗")
    alt = f"{kind}: {noun} {neighbor.image}, class {neighbor.name}"
    return (
        f'<li><figure class="tile {kind}">{_picture(neighbor.picture, alt, neighbor.image)}'
        f'<figcaption><b aria-hidden="true">{sign}</b><span class="hidden">{kind},</span> '
        f'{neighbor.similarity:.2f}<span class="name">{_breakable(neighbor.name)}</span></figcaption></figure></li>'
    )


def _picture(picture: str | None, alt: str, index: int) -> str:
    if picture is None:
        return f'<div class="blank" role="img" aria-label="{escape(alt)}">{index}</div>'
    return f'<img src="{picture}" alt="{escape(alt)}" width="96" height="96" decoding="async">'


def _map(report: Report) -> str:
    points = report.points
    if not points:
        return ""
    scaled, height = _scale([(point.x, point.y) for point in points])
    marks = "".join(
        f'<path d="{_SHAPES[_look(point.class_index)[1]]}" style="--h:{_look(point.class_index)[0]};'
        f'translate:{x:.1f}px {y:.1f}px"/>'
        for point, (x, y) in zip(points, scaled, strict=True)
    )
    legend = ""
    if len(report.map_names) <= _MAX_LEGEND:
        legend = '<ul class="legend">' + "".join(
            f'<li><svg viewBox="-6 -6 12 12" aria-hidden="true"><path d="{_SHAPES[_look(i)[1]]}" '
            f'style="--h:{_look(i)[0]}"/></svg>{escape(name)}</li>'
            for i, name in enumerate(report.map_names)
        )
        legend += "</ul>"
    sampled = len(points) < report.num_images
    count = f"{len(points):,} of {report.num_images:,} images, drawn at random" if sampled else "All images"
    looks = "" if len(report.map_names) <= 48 else " Classes share looks, since there are more of them than looks."
    return f"""<p>{count}, placed by {report.method} of their embeddings: what is near here is mostly similar, distances
between groups mean little.{looks}</p>
<p class="controls needs-script" hidden><label>Show one class <select id="map-class"><option value="">all</option>
</select></label></p>
<p id="map-help" class="needs-script" hidden>Point at an image, or move from image to image with the arrow keys;
Page Up and Page Down go through all of them, Escape hides the note.</p>
<figure class="map" id="map-figure">
<svg id="map-svg" viewBox="0 0 640 {height:.0f}" role="img" aria-label="Map of the embeddings, coloured by class">
{marks}
<circle id="map-ring" r="8"/></svg>
<div id="map-tip" role="tooltip" hidden><img alt="" width="64" height="64"><span><b></b><small></small></span></div>
<p id="map-status" class="hidden" role="status"></p>
</figure>
{legend}"""


def _look(class_index: int) -> tuple[int, int]:
    """Return hue (degrees) and shape of a class; 48 classes look different, and neighbours in number very."""
    return 30 * (5 * class_index % 12) + 15, class_index // 12 % len(_SHAPES)


def _scale(
    points: list[tuple[float, float]], width: float = 640, margin: float = 12
) -> tuple[list[tuple[float, float]], float]:
    """Return positions in a drawing, one scale for both axes, and its height."""
    low = [min(axis) for axis in zip(*points, strict=True)]
    size = [max(max(axis) - least, 1e-12) for axis, least in zip(zip(*points, strict=True), low, strict=True)]
    height = min(max(width * size[1] / size[0], 0.6 * width), 0.9 * width)
    scale = min((width - 2 * margin) / size[0], (height - 2 * margin) / size[1])
    left, top = (width - scale * size[0]) / 2, (height - scale * size[1]) / 2
    return [(left + scale * (x - low[0]), top + scale * (y - low[1])) for x, y in points], height


def _histogram(histogram: Histogram) -> str:
    width, height, left, bottom = 640, 250, 32, 40
    high = histogram.low + histogram.width * len(histogram.positive)
    top = max(*histogram.positive, *histogram.negative)

    def across(value: float) -> float:
        return left + (width - 2 * left) * (value - histogram.low) / (high - histogram.low)

    def steps(shares: list[float]) -> str:
        corners = [f"M{left} {height - bottom}"]
        for i, share in enumerate(shares):
            y = height - bottom - (height - bottom - 10) * share / top
            corners.append(f"V{y:.1f}H{across(histogram.low + histogram.width * (i + 1)):.1f}")
        return "".join(corners) + f"V{height - bottom}Z"

    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if (high - histogram.low) / step <= 7 or step == 0.5)
    first = -(-histogram.low // step)  # rounded up
    ticks = [step * (first + i) for i in range(int((high - step * first) / step + 1e-6) + 1)]
    axis = "".join(
        f'<path class="tick" d="M{across(x):.1f} {height - bottom}v5"/>'
        f'<text x="{across(x):.1f}" y="{height - 8}">{x + 0.0:.2f}</text>'
        for x in ticks
    )
    kinds = [("positive", "same class", histogram.positive), ("negative", "different classes", histogram.negative)]
    rows = "".join(
        f'<tr><th scope="row">{start:.2f} to {start + histogram.width:.2f}</th>'
        f"<td>{_percent(a)}</td><td>{_percent(b)}</td></tr>"
        for start, a, b in (
            (histogram.low + i * histogram.width, a, b)
            for i, (a, b) in enumerate(zip(histogram.positive, histogram.negative, strict=True))
        )
    )
    if any(histogram.negative):
        summary = (
            f"On average {histogram.mean_positive:.2f} for pairs of one class and {histogram.mean_negative:.2f} for "
            f"others; the pair of one class is the more similar one in {_percent(histogram.separation)} of comparisons."
        )
    else:
        summary = f"On average {histogram.mean_positive:.2f}; there are no pairs of different classes."
    key = "".join(
        f'<li><svg viewBox="0 0 24 14" aria-hidden="true"><path class="{kind}" d="M1 13V2H23V13Z"/></svg>{text}</li>'
        for kind, text, shares in kinds
        if any(shares)
    )
    areas = "".join(f'<path class="{kind}" d="{steps(shares)}"/>' for kind, _, shares in kinds if any(shares))
    return f"""<p>{summary}</p>
<figure class="histogram">
<ul class="legend">{key}</ul>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="Histogram of cosine similarities. {summary}">
<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<path d="M3 0v6"/></pattern></defs>
{areas}<path class="tick" d="M{left} {height - bottom}H{width - left}"/>{axis}</svg>
<figcaption>Cosine similarity of pairs of images; each kind of pair sums to 100%.</figcaption>
</figure>
<details><summary>The histogram as a table</summary>
<div class="scroll" role="region" aria-label="Histogram as a table" tabindex="0"><table>
<caption>Share of pairs by cosine similarity.</caption>
<thead><tr><th scope="col">Similarity</th><th scope="col">Same class</th><th scope="col">Different classes</th></tr>
</thead>
<tbody>{rows}</tbody></table></div></details>"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _breakable(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _strong(text: str) -> str:
    return f"<strong>{escape(text)}</strong>"
