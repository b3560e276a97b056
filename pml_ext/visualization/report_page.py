"""The page of a retrieval report: from numbers and pictures to one HTML file that loads nothing."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

from pml_ext.version import __version__
from pml_ext.visualization.report_about import Fact, about_section
from pml_ext.visualization.report_comparison import Comparison, comparison_section
from pml_ext.visualization.report_html import (
    Image,
    Neighbor,
    Query,
    breakable,
    class_link,
    number_of,
    percent,
    query_article,
    signed_points,
    sortable_table,
    strong,
)

MAX_CLASS_ROWS = 2000
_MAX_NAMES = 200  # of left-out classes
_MAX_LEGEND = 12
_SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-4.8 4.5 3.4h-9z", "M0-5 5 0 0 5-5 0z")
_DIALOG = """<dialog id="class-dialog" aria-labelledby="class-name">
<button type="button" id="class-close">Close</button>
<h2 id="class-name" tabindex="-1"></h2>
<div id="class-body"></div>
</dialog>"""
_METRICS = (
    ("P@1", "share of queries whose nearest neighbor is of the same class"),
    ("R-precision", "share of the same class among the R nearest, R being the number of images to find of the class"),
    ("MAP@R", "as R-precision, but early neighbors count more"),
)


class ClassRow(NamedTuple):
    """A class and its metrics, 0 to 1."""

    code: int
    name: str
    images: int
    metrics: tuple[float, ...]


class ConfusedPair(NamedTuple):
    """Shares of class ``name`` whose neighbors are of class ``other``."""

    code: int
    name: str
    other_code: int
    other: str
    images: int
    first: float
    among_r: float


class ClassDetails(NamedTuple):
    """What a class leads to: the classes that it is most often taken for, and its worst queries."""

    code: int
    name: str
    images: int
    metrics: tuple[float, ...]
    other_metrics: tuple[float, ...] | None  # of the other run
    pairs: list[ConfusedPair]
    queries: list[Query]


class Point(NamedTuple):
    """An image on the map. ``class_index`` counts in ``Report.map_names``."""

    x: float
    y: float
    class_index: int
    image: int
    name: str | None


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
    about: list[Fact]
    comparison: Comparison | None
    num_images: int  # queries
    num_gallery: int | None  # None: the queries search each other
    num_classes: int
    embedding_size: int
    metrics: tuple[float, ...]
    left_out: list[str]
    classes: list[ClassRow]  # worst first
    details: list[ClassDetails]
    pairs: list[ConfusedPair]
    worst: list[Query]
    random: list[Query]
    points: list[Point]
    map_names: list[str]
    method: str
    histogram: Histogram
    pictures: Mapping[int, str]  # ``data:`` addresses of images on the map and of classes, by their keys

    @property
    def noun(self) -> str:
        """What a neighbor is called."""
        return "image" if self.num_gallery is None else "gallery image"


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
        ("comparison", "Comparison", _comparison(report)),
        ("classes", "Classes", _classes(report)),
        ("confusions", "Confused classes", _confusions(report.pairs)),
        ("gallery", "Queries", _gallery(report)),
        ("map", "Map", _map(report)),
        ("similarities", "Similarities", _histogram(report.histogram)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading, _ in sections)
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="h-{key}">\n<h2 id="h-{key}">{heading}{_of_run(report, key)}</h2>\n'
        f"{content}\n</section>"
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
<h1>{breakable(report.title)}</h1>
<p>{number_of(report.num_images, "image")} of {number_of(report.num_classes, "class", "classes")}, embeddings of
{number_of(report.embedding_size, "number")}. {_searched(report)} by cosine similarity.</p>
{about_section(report.about, _titles(report))}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main" tabindex="-1">
{body}
</main>
{_DIALOG}
<footer><p>Made by pml-ext {escape(__version__)}.</p></footer>
<script type="application/json" id="data">{_json(report)}</script>
<script>{script}</script>
</body>
</html>
"""


def _searched(report: Report) -> str:
    if report.num_gallery is None:
        return "Each image is searched among all others"
    return f"Each image is a query that is searched in a gallery of {number_of(report.num_gallery, 'other image')}"


def _titles(report: Report) -> tuple[str, ...]:
    return (report.title,) if report.comparison is None else report.comparison.titles


def _json(report: Report) -> str:
    shown: dict[int, list[Any]] = {}
    classes: dict[int, str] = {}
    details: dict[int, list[Any]] = {}
    files = {point.image: point.name for point in report.points if point.name is not None}

    def key_of(image: Image) -> int:
        shown[image.key] = [image.number, image.code]
        classes[image.code] = image.class_name
        if image.name is not None:
            files[image.key] = image.name
        return image.key

    def near(neighbor: Neighbor) -> list[float]:
        return [key_of(neighbor.image), round(neighbor.similarity, 4), int(neighbor.right)]

    for row in report.details:
        classes[row.code] = row.name
        classes.update((pair.other_code, pair.other) for pair in row.pairs)
        pairs = [[pair.other_code, *_short(pair.among_r, pair.first)] for pair in row.pairs]
        queries = [
            [key_of(query.image), *_short(query.average_precision), [near(neighbor) for neighbor in query.neighbors]]
            for query in row.queries
        ]
        others = None if row.other_metrics is None else _short(*row.other_metrics)
        details[row.code] = [row.images, _short(*row.metrics), others, pairs, queries]
    names = [name for name, _ in _METRICS]
    data = {
        "metrics": dict(zip(names, report.metrics, strict=True)),
        "classes": [[row.name, row.images, *row.metrics] for row in report.classes],
        "names": report.map_names,
        "points": [[point.class_index, point.image] for point in report.points],
        "titles": _titles(report),
        "noun": report.noun,
        "codes": classes,
        "details": details,
        "shown": shown,
        "files": files,
        "pictures": report.pictures,
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")  # no </script>, no <!--


def _short(*values: float) -> list[float]:
    """Return shares, with enough digits to be rounded once more to 0.1 percent as the tables of the page are."""
    return [round(value, 6) for value in values]


def _metrics(report: Report) -> str:
    comparison = report.comparison
    others = [None] * len(_METRICS) if comparison is None else comparison.metrics
    cards = "".join(
        f'<div><dt>{name}</dt><dd class="value"><data value="{value!r}">{percent(value)}</data></dd>'
        f"{_other_value(report, value, other)}<dd>{text}</dd></div>"
        for (name, text), value, other in zip(_METRICS, report.metrics, others, strict=True)
    )
    return f'<dl class="cards">{cards}</dl>{_left_out(report)}'


def _other_value(report: Report, value: float, other: float | None) -> str:
    if other is None or report.comparison is None:
        return ""
    return (
        f'<dd class="other"><data value="{other!r}">{percent(other)}</data> in '
        f"{breakable(report.comparison.titles[1])}, difference "
        f'<data value="{value - other!r}">{signed_points(value - other)}</data> points</dd>'
    )


def _of_run(report: Report, section: str) -> str:
    """Return which run a section is about, where there are two."""
    if report.comparison is None or section == "comparison":
        return ""
    return f" <small>{breakable(report.comparison.titles[0])}</small>"


def _comparison(report: Report) -> str:
    return "" if report.comparison is None else comparison_section(report.comparison, report.noun)


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
        return f"<p>Left out of the metrics: the class {strong(names[0])}{one} {rule}.</p>"
    listed = "".join(f"<li>{escape(name)}</li>" for name in names[:_MAX_NAMES])
    more = f"<p>and {len(names) - _MAX_NAMES:,} more</p>" if len(names) > _MAX_NAMES else ""
    return (
        f"<details><summary>Left out of the metrics: {len(names):,} classes with {each} image each</summary>"
        f'<p>They are {rule}.</p><ul class="names">{listed}</ul>{more}</details>'
    )


def _classes(report: Report) -> str:
    rows = "".join(
        f'<tr><th scope="row">{class_link(row.code, row.name)}</th><td data-value="{row.images}">{row.images:,}</td>'
        + "".join(f'<td data-value="{value!r}">{percent(value)}</td>' for value in row.metrics[:-1])
        + f'<td class="bar" data-value="{row.metrics[-1]!r}" style="--share:{row.metrics[-1]:.3f}">'
        f"{percent(row.metrics[-1])}</td></tr>"
        for row in report.classes[:MAX_CLASS_ROWS]
    )
    total = len(report.classes)
    shown = f"The {MAX_CLASS_ROWS:,} worst of {total:,} classes" if total > MAX_CLASS_ROWS else f"{total:,} classes"
    shown = "One class" if total == 1 else shown
    columns = [("Class", "none"), ("Images", "none")] + [(name, "none") for name, _ in _METRICS]
    columns[-1] = ("MAP@R", "ascending")
    with_match = "" if report.num_gallery is not None else " with more than one image"
    listed = sortable_table("class-table", f"{shown}{with_match}, worst first", columns, rows)
    lead = (
        '<p class="needs-script" hidden>Choose a class to see its worst queries and what it is taken for. '
        "Arrow keys move from class to class.</p>"
    )
    if total < 10:
        return lead + listed
    search = '<label>Find a class <input type="search" id="class-filter" autocomplete="off"></label>'
    return f'{lead}<p class="controls needs-script" hidden>{search}</p>{listed}'


def _confusions(pairs: Sequence[ConfusedPair]) -> str:
    if not pairs:
        return "<p>None: no image has one of another class among its R nearest neighbors.</p>"
    rows = "".join(
        f'<tr><th scope="row">{class_link(pair.code, pair.name)}</th>'
        f'<td class="text">{class_link(pair.other_code, pair.other)}</td>'
        f'<td data-value="{pair.images}">{pair.images:,}</td>'
        f'<td data-value="{pair.first!r}">{percent(pair.first)}</td>'
        f'<td class="bar" data-value="{pair.among_r!r}" style="--share:{pair.among_r:.3f}">'
        f"{percent(pair.among_r)}</td></tr>"
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
        "<p>How often neighbors of a class are of another class: share of the first neighbors of its images, and of "
        "their R nearest.</p>"
    )
    return text + sortable_table("pair-table", "Most confused pairs", columns, rows)


def _gallery(report: Report) -> str:
    parts = [
        '<p class="key">Neighbors from near to far, with their cosine similarities. '
        '<span class="right"><b aria-hidden="true">✓</b> solid frame: same class</span> '
        '<span class="wrong"><b aria-hidden="true">✗</b> dashed frame: another class</span></p>'
    ]
    for heading, queries in (("Worst queries, by AP@R", report.worst), ("Random queries", report.random)):
        if queries:
            parts.append(f"<h3>{heading}</h3>" + "".join(query_article(query, report.noun) for query in queries))
    return "\n".join(parts)


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
<svg id="map-svg" viewBox="0 0 640 {height:.0f}" role="img" aria-label="Map of the embeddings, colored by class">
{marks}
<circle id="map-ring" r="8"/></svg>
<div id="map-tip" role="tooltip" hidden><img alt="" width="64" height="64"><span><b></b><small></small></span></div>
<p id="map-status" class="hidden" role="status"></p>
</figure>
{legend}"""


def _look(class_index: int) -> tuple[int, int]:
    """Return hue (degrees) and shape of a class; 48 classes look different, and classes of neighboring numbers very."""
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
        f"<td>{percent(a)}</td><td>{percent(b)}</td></tr>"
        for start, a, b in (
            (histogram.low + i * histogram.width, a, b)
            for i, (a, b) in enumerate(zip(histogram.positive, histogram.negative, strict=True))
        )
    )
    if any(histogram.negative):
        summary = (
            f"On average {histogram.mean_positive:.2f} for pairs of one class and {histogram.mean_negative:.2f} for "
            f"others; the pair of one class is the more similar one in {percent(histogram.separation)} of comparisons."
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
