"""Queries with their nearest neighbors, right ones framed green, wrong ones red."""

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.evaluation.class_codes import class_codes
from pml_ext.evaluation.metrics import as_embeddings
from pml_ext.extras import comes_with
from pml_ext.neighbors.search import search
from pml_ext.neighbors.similarity import unit_embeddings
from pml_ext.validation import check_count
from pml_ext.visualization.image_names import image_names
from pml_ext.visualization.saving import save_figure
from pml_ext.visualization.thumbnails import check_images, image_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RIGHT, _WRONG, _QUERY = "#1a9641", "#d7191c", "#333333"
_MAX_NAME = 23  # characters of a line that fit under a picture


def retrieval_gallery(
    embeddings: Tensor | np.ndarray[Any, Any],
    labels: Any,
    images: Any,
    queries: Sequence[int] | None = None,
    num_queries: int = 8,
    num_neighbors: int = 10,
    seed: int = 0,
    path: str | Path | None = None,
    searched: Sequence[int] | None = None,
    names: Sequence[str | os.PathLike[str]] | None = None,
) -> "Figure":
    """Draw a row for each query: the query, then the images nearest to it by cosine.

    Right neighbors (same label) have a solid green frame, wrong ones a dashed red frame with a cross, so that the
    picture can be read without colors.

    Args:
        embeddings: ``(N, D)``, floating point, finite, a tensor or an array.
        labels: ``(N,)``, integers, strings or bools, as in ``retrieval_metrics``.
        images: N images, as in ``retrieval_report``.
        queries: Indices of the queries. None: ``num_queries`` random ones, each of another class while there are any,
            first those that have a right neighbor to find.
        num_queries: How many random queries to draw, a row for each.
        num_neighbors: How many neighbors to draw in a row. Fewer if there are fewer images.
        seed: The seed of the random queries.
        path: Where to save the picture; folders are made. None: nowhere.
        searched: Indices of the images that can be neighbors. None: all.
        names: N strings or paths to write under the pictures, a line for the folder and one for the file; long lines
            lose their middle. None: if ``images`` are paths or a data set that has them, the paths below their common
            folder.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
        TypeError: If embeddings are not floating point, labels or images of another kind, indices no integers, or
            names no strings.
        ValueError: If lengths differ, embeddings are not finite, an index is out of range, there are fewer than two
            images, one cannot be read or has values out of range, or a setting breaks a rule.
    """
    for name, value in (("embeddings", embeddings), ("labels", labels), ("images", images)):
        if not hasattr(value, "__len__"):
            raise TypeError(f"{name} must have a length, with an entry for each image, got {type(value).__name__}")
    if not len(embeddings) == len(labels) == len(images) >= 2:
        raise ValueError(
            "embeddings, labels and images must have one length of at least 2, got "
            f"{len(embeddings)}, {len(labels)}, {len(images)}"
        )
    unit = unit_embeddings(as_embeddings("embeddings", embeddings, "cpu"))
    codes = class_codes(labels, len(unit)).queries
    check_images("images", images, len(unit))
    files = image_names("names", names, images, len(unit))
    check_count("num_queries", num_queries)
    check_count("num_neighbors", num_neighbors)
    places = _indices("searched", range(len(unit)) if searched is None else searched, len(unit))
    places = list(dict.fromkeys(places))  # one that is named twice is shown once
    if queries is None:
        queries = _choose_queries(codes, places, num_queries, seed)
    queries = _indices("queries", queries, len(unit))
    position = {place: i for i, place in enumerate(places)}
    own = torch.tensor([position.get(query, -1) for query in queries])  # a query is not its own neighbor
    depth = min(num_neighbors, len(places) - int((own >= 0).any()))
    asked, gallery = unit[queries], unit[places]
    nearest = torch.cat([rows for _, rows in search(asked, gallery, depth, own)])  # (Q, k)
    values = (asked[:, None] * gallery[nearest]).sum(2)
    neighbors = torch.tensor(places)[nearest]

    with comes_with("visualization", "matplotlib", "retrieval_gallery"):
        from matplotlib.figure import Figure  # on use: matplotlib comes with an extra

    columns = neighbors.shape[1] + 1
    height = 1.05 if files is None else 1.25
    figure = Figure(figsize=(0.9 * columns, height * len(queries) + 0.3), dpi=120, layout="constrained")
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for row, query in enumerate(queries):
        _draw(axes[row, 0], images, files, query, _QUERY, "-", "query")
        for column, (value, neighbor) in enumerate(zip(values[row], neighbors[row].tolist(), strict=True), 1):
            right = bool(codes[neighbor] == codes[query])
            mark = f"{value:.2f}" if right else f"{value:.2f} ✗"
            _draw(axes[row, column], images, files, neighbor, _RIGHT if right else _WRONG, "-" if right else "--", mark)
    save_figure(figure, path)
    return figure


def _indices(name: str, values: Any, length: int) -> list[int]:
    rule = f"{name} must be indices in 0 to {length - 1}, at least one"
    try:
        places = [operator.index(value) for value in values]
    except TypeError as error:
        raise TypeError(f"{rule}, got {values!r}") from error
    wrong = [place for place in places if not 0 <= place < length]
    if wrong or not places:
        raise ValueError(f"{rule}, got {wrong[:5]}")
    return places


def _choose_queries(codes: Tensor, places: list[int], num_queries: int, seed: int) -> list[int]:
    right = torch.bincount(codes[places], minlength=int(codes.max()) + 1)[codes]  # neighbors to find
    right[places] -= 1  # not the query itself
    nothing = (right == 0).tolist()
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda i: nothing[i])
    seen: dict[int, int] = {}
    for i in order:
        seen.setdefault(int(codes[i]), i)
    first = set(seen.values())
    return sorted(order, key=lambda i: (nothing[i], i not in first))[:num_queries]


def _draw(axes: Any, images: Any, files: Sequence[str] | None, index: int, color: str, style: str, title: str) -> None:
    axes.imshow(image_at(images, index))
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=7, color=color, pad=5)
    if files is not None:
        caption = "\n".join(_shortened(part) for part in os.path.split(files[index]) if part)
        axes.set_xlabel(caption, fontsize=5, parse_math=False)  # a "$" is one
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=2.5, linestyle=style)


def _shortened(name: str) -> str:
    """Return a name without its middle if it is too long: names of classes may differ at either end."""
    half = _MAX_NAME // 2
    return name if len(name) <= _MAX_NAME else f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
