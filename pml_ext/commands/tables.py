"""Metrics as text."""

from collections.abc import Mapping

METRICS = {"precision_at_1": "P@1", "r_precision": "R-precision", "mean_average_precision_at_r": "MAP@R", "NMI": "NMI"}
"""The metrics of commands, and what tables call them."""


def in_percent(metrics: Mapping[str, float]) -> str:
    """Return the metrics in one line.

    Examples:
        >>> in_percent({"precision_at_1": 0.5, "NMI": 0.25})
        'P@1 50.0  NMI 25.0'
    """
    return "  ".join(f"{title} {100 * metrics[name]:.1f}" for name, title in METRICS.items() if name in metrics)


def percent_table(head: str, rows: Mapping[str, Mapping[str, float | tuple[float, float]]]) -> str:
    """Return a table of metrics; a pair is mean and standard deviation.

    Examples:
        >>> print(percent_table("percent", {"a": {"precision_at_1": 0.5}, "bc": {"precision_at_1": (0.25, 0.01)}}))
        percent         P@1
        a              50.0
        bc       25.0 (1.0)
    """
    names = [name for name in METRICS if any(name in row for row in rows.values())]
    lines = [[head, *(METRICS[name] for name in names)]]
    for title, row in rows.items():
        values = [row.get(name) for name in names]
        lines.append([title, *("" if value is None else _percent(value) for value in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _percent(value: float | tuple[float, float]) -> str:
    if isinstance(value, tuple):
        return f"{100 * value[0]:.1f} ({100 * value[1]:.1f})"
    return f"{100 * value:.1f}"
