"""Curves over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pml_ext.extras import comes_with
from pml_ext.visualization.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    xlabel: str = "epoch",
    ylabel: str = "",
    path: str | Path | None = None,
) -> "Figure":
    """Draw one line for each series, the first point at x = 1.

    Args:
        curves: Name to values, at least one series.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        path: Where to save the picture; folders are made. None: nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
        ValueError: If there is no series, or an empty one.
    """
    if not curves:
        raise ValueError("curves must hold at least one series, got none")
    for name, values in curves.items():
        if not len(values):
            raise ValueError(f"curves must hold no empty series, got {name!r} without values")
    with comes_with("visualization", "matplotlib", "plot_curves"):
        from matplotlib.figure import Figure  # on use: matplotlib comes with an extra
        from matplotlib.ticker import MaxNLocator  # on use: matplotlib comes with an extra

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(curves.items()):  # smaller marks and gaps let a line show one below
        (line,) = axes.plot(range(1, len(values) + 1), values, label=name, fillstyle="none")
        line.set(linestyle=("-", "--", "-.", ":")[i % 4], marker="osD^v"[i % 5], markersize=max(9 - 2 * i, 3))
        line.set_markevery(max(len(values) // 15, 1))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
    return figure
