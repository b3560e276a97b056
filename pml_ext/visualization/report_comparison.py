"""The part of a report that compares two runs."""

from typing import NamedTuple

from pml_ext.visualization.report_html import (
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

MAX_ROWS = 2000


class ChangedClass(NamedTuple):
    """The MAP@R of a class in this run and in the other one."""

    code: int
    name: str
    value: float
    other: float

    @property
    def difference(self) -> float:
        """This run minus the other."""
        return self.value - self.other


class ChangedQuery(NamedTuple):
    """A query, as this run and the other one find its neighbors."""

    query: Query
    other: Query


class Comparison(NamedTuple):
    """How this run, whose title comes first, differs from another one with the same images."""

    titles: tuple[str, str]
    metrics: tuple[float, ...]  # of the other run
    num_changed: tuple[int, int, int]  # queries that are better in this run, worse, and the same
    classes: list[ChangedClass]  # from the largest loss of this run to its largest gain
    better: list[ChangedQuery]
    worse: list[ChangedQuery]


def comparison_section(comparison: Comparison, noun: str) -> str:
    """Return what got better and worse.

    Args:
        comparison: Comparison of the runs.
        noun: What a neighbor is called: "image", or "gallery image".
    """
    this, other = comparison.titles
    better, worse, same = comparison.num_changed
    parts = [
        f"<p>{number_of(better, 'query', 'queries')} with a higher AP@R in {strong(this)}, {worse:,} in "
        f"{strong(other)}, and {same:,} with the same in both.</p>",
        _classes(comparison),
    ]
    for title, changed in ((other, comparison.worse), (this, comparison.better)):
        heading = f"<h3>Queries that are better in {breakable(title)}</h3>"
        rows = "".join(query_article(pair.query, noun, [(this, pair.query), (other, pair.other)]) for pair in changed)
        parts.append(heading + (rows or "<p>None.</p>"))
    return "\n".join(parts)


def _classes(comparison: Comparison) -> str:
    classes, (this, other) = comparison.classes, comparison.titles
    better = sum(row.difference > 0 for row in classes)
    worse = sum(row.difference < 0 for row in classes)
    shown, left_out = classes, ""
    if len(classes) > MAX_ROWS:
        shown = classes[: MAX_ROWS // 2] + classes[-MAX_ROWS // 2 :]
        left_out = f"; the table has the {MAX_ROWS // 2:,} largest losses and gains"
    rows = "".join(
        f'<tr><th scope="row">{class_link(row.code, row.name)}</th>'
        f'<td data-value="{row.value!r}">{percent(row.value)}</td>'
        f'<td data-value="{row.other!r}">{percent(row.other)}</td>'
        f'<td class="change {_kind(row.difference)}" data-value="{row.difference!r}" '
        f'style="--share:{abs(row.difference):.3f}">{signed_points(row.difference)}</td></tr>'
        for row in shown
    )
    columns = [
        ("Class", "none"),
        (breakable(this), "none"),
        (breakable(other), "none"),
        ("Difference", "ascending"),
    ]
    caption = f"MAP@R of each class, and {breakable(this)} minus {breakable(other)} in percentage points"
    return (
        f"<h3>Classes</h3><p>{number_of(better, 'class', 'classes')} with a higher MAP@R in {strong(this)}, "
        f"{worse:,} in {strong(other)}, and {len(classes) - better - worse:,} with the same in both{left_out}.</p>"
        + sortable_table("change-table", caption, columns, rows)
    )


def _kind(difference: float) -> str:
    return "gain" if difference > 0 else "loss" if difference < 0 else ""
