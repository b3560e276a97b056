"""One HTML file that shows how well embeddings retrieve, and where they fail."""

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pml_ext.datasets.labels import as_labels
from pml_ext.extras import comes_with
from pml_ext.neighbors.search import nearest_others
from pml_ext.neighbors.similarity import similarity_chunks, unit_embeddings
from pml_ext.precision import full_precision
from pml_ext.validation import check_batch, check_count
from pml_ext.visualization.report_page import (
    ClassRow,
    ConfusedPair,
    Histogram,
    Neighbor,
    Point,
    Query,
    Report,
    render_page,
)
from pml_ext.visualization.thumbnails import check_images, encode_thumbnails, load_thumbnails

_GALLERY_BYTES = _MAP_BYTES = 4_000_000
_BINS = 2000  # of the fine histogram, from -1 to 1
_MAX_BARS = 50


@torch.no_grad()
def retrieval_report(
    embeddings: Tensor | np.ndarray[Any, Any],
    labels: Any,
    images: Any = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    title: str = "Retrieval report",
    num_queries: int = 12,
    num_neighbors: int = 10,
    num_pairs: int = 20,
    num_points: int = 2000,
    method: str = "tsne",
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write one HTML file about the retrieval of each image among all others by cosine.

    It has P@1, R-precision and MAP@R, overall and of each class; the worst and some random queries with their nearest
    neighbours; the most confused classes; a map of the embeddings; and histograms of the similarities. The file needs
    no network and can be sent around: its scripts and (small) pictures are inside, and names are escaped. Metrics are
    those of PML's ``AccuracyCalculator`` for embeddings of length 1. Similarities are computed in chunks; 10,000
    images make a file of less than 10 MB.

    Args:
        embeddings: ``(N, D)``, floating point, finite, a tensor or an array. Normalised here, computed on the CPU.
        labels: ``(N,)``, integers. A class with one image is searched, but has no say in the metrics: it is listed.
        images: N images: a tensor ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, 3, H, W)``; a sequence of PIL images,
            tensors, arrays ``(H, W)`` or ``(H, W, 3)``, or paths; or a data set of images or (image, label), without
            a normalisation. Numbers are uint8 or floats in 0 to 1. Only what is shown is read. None: no pictures.
        class_names: That of label i at index i, or a dict from labels to names. None: "class i".
        path: Of the file. Folders are made, an older file is replaced.
        title: Of the page.
        num_queries: How many of the worst queries (lowest AP@R, of these with the most similar neighbour), and of
            random ones, >= 1.
        num_neighbors: Neighbours that are shown, >= 1. Fewer if there are fewer images.
        num_pairs: Of confused classes, >= 1.
        num_points: Images on the map, >= 0, drawn at random where there are more images. 0: no map.
        method: Of the map: "tsne", or "umap", which needs the package umap-learn. For fewer than 5 points it is t-SNE.
        seed: Of random queries, of the choice of points and of the map. The same seed gives the same file.
        progress: Whether to show progress bars.

    Returns:
        The path of the file.

    Raises:
        ImportError: If ``method`` is "umap" and umap-learn is not installed; the message names the extra.
        TypeError: If embeddings are not floating point, labels no integers, names no strings, or images of no known
            kind.
        ValueError: If lengths differ, embeddings are not finite, no class has two images, a label has no name, an
            image cannot be read or has values out of range, or a setting breaks a rule.

    Examples:
        >>> import tempfile
        >>> embeddings, labels = torch.randn(40, 8), torch.arange(40) % 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = retrieval_report(embeddings, labels, class_names=["cat", "dog"], path=f"{folder}/report.html")
        ...     path.read_text(encoding="utf-8").count("dog") > 10
        True
    """
    if isinstance(embeddings, np.ndarray):
        embeddings = torch.tensor(embeddings)
    check_batch(embeddings)
    labels = as_labels("labels", labels, len(embeddings))
    if images is not None:
        check_images(images, len(embeddings))
    counts = {"num_queries": num_queries, "num_neighbors": num_neighbors, "num_pairs": num_pairs}
    for name, value in counts.items() if num_points == 0 else (counts | {"num_points": num_points}).items():
        check_count(name, value)
    classes, own, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    if not len(labels) or int(sizes.max()) < 2:
        raise ValueError(f"labels must have a class with >= 2 images, got {len(classes)} classes with one each")
    names = _names(class_names, classes.tolist())
    map_method = _map_method(method, min(num_points, len(labels))) if num_points else None
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)

    unit = unit_embeddings(embeddings.cpu()).float()
    search = _search(unit, own, sizes, num_neighbors, progress)
    worst, random = _choose_queries(search, num_queries, seed)
    gallery = {query: search.nearest[query].tolist() for query in worst + random}
    on_map = _choose_points(len(unit), num_points, seed)
    positions = np.empty((0, 2)) if map_method is None else map_method.place(unit[on_map].numpy(), seed)
    gallery_pictures: dict[int, str] = {}
    map_pictures: dict[int, str] = {}
    if images is not None:
        shown = [index for query, neighbors in gallery.items() for index in (query, *neighbors)]
        thumbnails = load_thumbnails(images, shown + on_map, progress)
        gallery_pictures = encode_thumbnails(thumbnails, shown, _GALLERY_BYTES, max_side=96)
        map_pictures = encode_thumbnails(thumbnails, on_map, _MAP_BYTES, max_side=64)

    def describe(query: int) -> Query:
        similarities = (unit[gallery[query]] * unit[query]).sum(1).tolist()
        neighbors = [
            Neighbor(i, names[own[i]], bool(own[i] == own[query]), similarity, gallery_pictures.get(i))
            for i, similarity in zip(gallery[query], similarities, strict=True)
        ]
        return Query(query, names[own[query]], float(search.metrics[query, 2]), gallery_pictures.get(query), neighbors)

    map_classes, group = torch.unique(own[on_map], return_inverse=True)
    report = Report(
        title=title,
        num_images=len(labels),
        num_classes=len(classes),
        embedding_size=embeddings.shape[1],
        metrics=tuple(search.metrics[sizes[own] > 1].mean(0).tolist()),
        left_out=[name for name, size in zip(names, sizes.tolist(), strict=True) if size == 1],
        classes=_class_rows(search.metrics, own, sizes, names),
        pairs=_confused_pairs(search, sizes, names)[:num_pairs],
        worst=[describe(query) for query in worst],
        random=[describe(query) for query in random],
        points=[
            Point(float(x), float(y), int(c), i, map_pictures.get(i))
            for (x, y), c, i in zip(positions, group, on_map, strict=True)
        ],
        map_names=[names[c] for c in map_classes],
        method="" if map_method is None else map_method.name,
        histogram=_similarity_histogram(unit, own, progress),
    )
    path.write_text(render_page(report), encoding="utf-8", errors="replace", newline="\n")
    return path


class _Search(NamedTuple):
    """What the search gives for each image: metrics are NaN for those without a match."""

    metrics: Tensor  # (N, 3), float64: precision at 1, R-precision, AP@R
    nearest: Tensor  # (N, num_neighbors)
    similarity: Tensor  # (N,), of the nearest
    first: dict[tuple[int, int], int]  # pairs of class and neighbour's class, of first neighbours
    among_r: dict[tuple[int, int], int]  # and of the R nearest


def _search(unit: Tensor, own: Tensor, sizes: Tensor, num_neighbors: int, progress: bool) -> _Search:
    """Search every image among all others, and compare the classes of queries and neighbours."""
    k = min(max(int(sizes.max()) - 1, num_neighbors), len(unit) - 1)
    metrics, nearest, first, among_r = [], [], [], []
    for rows, neighbors in nearest_others(unit, k, progress=progress):  # (n,), (n, k)
        nearest.append(neighbors[:, :num_neighbors].clone())
        of_class, others = own[rows], (sizes[own[rows]] - 1)[:, None]  # (n,), (n, 1): R
        classes = own[neighbors]
        within = torch.arange(1, k + 1) <= others
        right = (classes == of_class[:, None]) & within
        precision = right.cumsum(1).double() / torch.arange(1, k + 1)
        sums = torch.stack([right[:, 0] * others[:, 0], right.sum(1), (precision * right).sum(1)], 1)  # (n, 3)
        metrics.append(sums / others)  # 0 / 0 where there is no other
        pairs = of_class[:, None] * len(sizes) + classes
        first.append(pairs[:, 0])
        among_r.append(torch.stack(torch.unique(pairs[within], return_counts=True)))
    ranked = torch.cat(nearest)
    similarity = (unit * unit[ranked[:, 0]]).sum(1)
    firsts = torch.stack(torch.unique(torch.cat(first), return_counts=True))
    return _Search(
        torch.cat(metrics),
        ranked,
        similarity,
        _as_pairs(firsts, len(sizes)),
        _as_pairs(torch.cat(among_r, 1), len(sizes)),
    )


def _as_pairs(codes: Tensor, num_classes: int) -> dict[tuple[int, int], int]:
    """Return how often pairs of different classes occur; ``codes`` is (2, n): a * num_classes + b, and how often."""
    counts: dict[tuple[int, int], int] = {}
    for code, count in codes.T.tolist():
        pair = divmod(code, num_classes)
        if pair[0] != pair[1]:
            counts[pair] = counts.get(pair, 0) + count
    return counts


def _class_rows(metrics: Tensor, own: Tensor, sizes: Tensor, names: list[str]) -> list[ClassRow]:
    means = torch.zeros(len(sizes), 3, dtype=torch.float64).index_add_(0, own, metrics) / sizes[:, None]
    rows = [
        ClassRow(name, size, tuple(values))
        for name, size, values in zip(names, sizes.tolist(), means.tolist(), strict=True)
        if size > 1
    ]
    return sorted(rows, key=lambda row: row.metrics[::-1])


def _confused_pairs(search: _Search, sizes: Tensor, names: list[str]) -> list[ConfusedPair]:
    """Return the pairs, those with the largest share among the R nearest first, then the most frequent."""
    size = sizes.tolist()
    order = sorted(
        search.among_r.items(), key=lambda item: (-item[1] / _num_ranked(size[item[0][0]]), -item[1], item[0])
    )
    return [
        ConfusedPair(names[a], names[b], size[a], search.first.get((a, b), 0) / size[a], count / _num_ranked(size[a]))
        for (a, b), count in order
    ]


def _num_ranked(size: int) -> int:
    return size * (size - 1)  # R neighbours for each image


def _choose_queries(search: _Search, num_queries: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the queries with the lowest AP@R (of these, where the neighbour looks most certain), and random others."""
    score = search.metrics[:, 2]
    possible = score.isfinite().nonzero().flatten().tolist()
    scores, certain = score.tolist(), search.similarity.tolist()
    worst = sorted(possible, key=lambda i: (scores[i], -certain[i], i))[:num_queries]
    taken = set(worst)
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(seed)).tolist()
    return worst, [i for i in order if math.isfinite(scores[i]) and i not in taken][:num_queries]


def _choose_points(length: int, num_points: int, seed: int) -> list[int]:
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:num_points]
    return sorted(order.tolist())


class _MapMethod(NamedTuple):
    name: str
    place: Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]]


def _map_method(method: str, num_points: int) -> _MapMethod:
    if method not in ("tsne", "umap"):
        raise ValueError(f"method must be 'tsne' or 'umap', got {method!r}")
    if method == "umap":
        with comes_with("umap", "umap-learn", "method 'umap'", ", or use method='tsne'"):
            module = importlib.import_module("umap")
        if num_points >= 5:  # its spectral start fails for fewer
            return _MapMethod("UMAP", partial(_place_by_umap, module))
    return _MapMethod("t-SNE", _place_by_tsne)


def _place_by_tsne(unit: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Return positions in two dimensions."""
    from sklearn.manifold import TSNE  # on use: slow to load, and only maps need it
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # on use: only maps need it

    init = "pca" if unit.shape[1] > 1 and unit.std(0).max() > 1e-4 else "random"  # PCA of equal rows has no scale
    with threadpool_limits(1):  # sums in another order would give another map
        return TSNE(init=init, perplexity=min(30, (len(unit) - 1) / 3), random_state=seed).fit_transform(unit)


def _place_by_umap(umap: Any, unit: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    neighbors = min(15, len(unit) - 1)
    placed = umap.UMAP(n_neighbors=neighbors, metric="cosine", random_state=seed, n_jobs=1).fit_transform(unit)
    return np.nan_to_num(placed)  # it drops points that it cannot connect


def _similarity_histogram(unit: Tensor, own: Tensor, progress: bool) -> Histogram:
    everything, positive = torch.zeros(2, _BINS, dtype=torch.long)
    with full_precision(unit.device), tqdm(total=len(unit), desc="similarities", disable=not progress) as bar:
        for rows, similarity in similarity_chunks(unit):
            bins = similarity.add_(1).mul_(_BINS / 2).clamp_(0, _BINS - 1).int()  # (n, N)
            same = own[rows][:, None] == own
            itself = (torch.arange(len(rows)), rows)
            same[itself] = False
            everything += torch.bincount(bins.flatten(), minlength=_BINS)
            everything -= torch.bincount(bins[itself], minlength=_BINS)
            positive += torch.bincount(bins[same], minlength=_BINS)
            bar.update(len(rows))
    used = everything.nonzero()
    low, high = int(used[0]), int(used[-1]) + 1
    size = next(size for size in (5, 10, 20, 40, 50) if -(-high // size) - low // size <= _MAX_BARS or size == 50)
    low, high = low // size * size, -(-high // size) * size
    shares, means = [], []
    centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * 2 / _BINS - 1
    for counts in (positive, everything - positive):
        share = counts.double() / counts.sum().clamp(min=1)
        shares.append(share)
        means.append(float((share * centers).sum()))
    below = shares[1].cumsum(0) - shares[1] / 2
    bars = [share[low:high].view(-1, size).sum(1).tolist() for share in shares]
    separation = float((shares[0] * below).sum())
    return Histogram(low * 2 / _BINS - 1, size * 2 / _BINS, bars[0], bars[1], means[0], means[1], separation)


def _names(class_names: Sequence[str] | Mapping[int, str] | None, classes: list[int]) -> list[str]:
    """Return the names of the classes, in their order."""
    if class_names is None:
        return [f"class {label}" for label in classes]
    if isinstance(class_names, str) or not hasattr(class_names, "__getitem__"):
        raise TypeError(f"class_names must be a sequence or a dict of strings, got {class_names!r}")
    if isinstance(class_names, Mapping):
        known: Mapping[int, str] = class_names
    else:
        known = dict(enumerate(class_names))
    missing = [label for label in classes if label not in known]
    if missing:
        raise ValueError(f"class_names must have a name for each label, got {len(known)} names, none for {missing[0]}")
    wrong = [known[label] for label in classes if not isinstance(known[label], str)]
    if wrong:
        raise TypeError(f"class_names must be strings, got {wrong[0]!r}")
    return [str(known[label]) for label in classes]
