"""Parts of a report's page: texts, tables, and queries with their neighbors. All that callers give is escaped."""

import re
from collections.abc import Iterable
from html import escape
from typing import NamedTuple

from pml_ext.visualization.image_names import last_part


class Image(NamedTuple):
    """An image that the page shows."""

    key: int  # of its picture: its number; images of the gallery count on behind the queries
    number: int
    code: int  # of its class
    class_name: str
    name: str | None  # such as its file
    picture: str | None  # ``data:`` address


class Neighbor(NamedTuple):
    """A neighbor of a query."""

    image: Image
    right: bool
    similarity: float


class Query(NamedTuple):
    """A query with its neighbors, from near to far."""

    image: Image
    average_precision: float
    neighbors: list[Neighbor]


def query_article(query: Query, noun: str, others: Iterable[tuple[str, Query]] = ()) -> str:
    """Return a query with its neighbors.

    Args:
        query: Is shown with its own neighbors if there are no ``others``.
        noun: What a neighbor is called: "image", or "gallery image".
        others: A title for each search of the query, and what it has found.
    """
    image = query.image
    others = list(others)
    facts = [f"image {image.number}"]
    facts += [] if image.name is None else [breakable(image.name)]
    facts += [] if others else [f"AP@R {percent(query.average_precision)}"]
    asked = f"Query, {_told(image, 'image')}"
    found = "".join(
        f"<h5>{breakable(title)} <small>AP@R {percent(other.average_precision)}</small></h5>{_tiles(other, noun)}"
        for title, other in others
    )
    return (
        f'<article class="query"><h4>{class_link(image.code, image.class_name)} <small>{", ".join(facts)}</small></h4>'
        f'<div class="tiles"><figure class="tile asked">{_picture(image, asked)}'
        f"<figcaption>Query</figcaption></figure><div>{found or _tiles(query, noun)}</div></div></article>"
    )


def class_link(code: int, name: str) -> str:
    """Return the name of a class, which the page's script makes a button that opens the class."""
    return f'<span data-class="{code}">{breakable(name)}</span>'


def sortable_table(key: str, caption: str, columns: Iterable[tuple[str, str]], rows: str) -> str:
    """Return a table that scrolls and can be sorted.

    Args:
        key: Its id.
        caption: Without a full stop.
        columns: Heading (HTML), and "none", "ascending" or "descending".
        rows: HTML.
    """
    head = "".join(
        f'<th scope="col" aria-sort="{order}"><button type="button">{name}</button></th>' for name, order in columns
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">'
        f'<table class="sortable" id="{key}"><caption id="{key}-caption">{caption}.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f}%"


def signed_points(difference: float) -> str:
    """Return a difference of shares with its sign, in percentage points."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")


def number_of(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def breakable(name: str) -> str:
    """Return a text that may be broken within names of files and variables."""
    return re.sub(r"([_/\\])", r"\1<wbr>", escape(name))


def strong(text: str) -> str:
    """Return a text in bold."""
    return f"<strong>{escape(text)}</strong>"


def _tiles(query: Query, noun: str) -> str:
    return f'<ol class="tiles">{"".join(_neighbor(neighbor, noun) for neighbor in query.neighbors)}</ol>'


def _neighbor(neighbor: Neighbor, noun: str) -> str:
    kind, sign = ("right", "✓") if neighbor.right else ("wrong", "✗")
    image = neighbor.image
    file = "" if image.name is None else f'<span class="file">{breakable(last_part(image.name))}</span>'
    return (
        f'<li><figure class="tile {kind}">{_picture(image, f"{kind}: {_told(image, noun)}")}'
        f'<figcaption><b aria-hidden="true">{sign}</b><span class="hidden">{kind},</span> '
        f'{neighbor.similarity:.2f}<span class="name">{breakable(image.class_name)}</span>{file}</figcaption>'
        "</figure></li>"
    )


def _told(image: Image, noun: str) -> str:
    name = "" if image.name is None else f", {image.name}"
    return f"{noun} {image.number}, class {image.class_name}{name}"


def _picture(image: Image, alt: str) -> str:
    text = escape(alt)
    if image.picture is None:
        return f'<div class="blank" role="img" aria-label="{text}" title="{text}">{image.number}</div>'
    return f'<img src="{image.picture}" alt="{text}" title="{text}" width="96" height="96" decoding="async">'
