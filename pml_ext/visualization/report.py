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

from pml_ext.evaluation.class_codes import ClassCodes, class_codes
from pml_ext.evaluation.metrics import METRICS, as_embeddings, check_together
from pml_ext.evaluation.ranking import query_values
from pml_ext.extras import comes_with
from pml_ext.neighbors.search import search
from pml_ext.neighbors.similarity import similarity_chunks, unit_embeddings
from pml_ext.precision import full_precision
from pml_ext.validation import check_count
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
    class_names: Sequence[str] | Mapping[Any, str] | None = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    gallery: Tensor | np.ndarray[Any, Any] | None = None,
    gallery_labels: Any = None,
    gallery_images: Any = None,
    title: str = "Retrieval report",
    num_queries: int = 12,
    num_neighbors: int = 10,
    num_pairs: int = 20,
    num_points: int = 2000,
    method: str = "tsne",
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write one HTML file about the retrieval of each image among all others, or in a gallery, by cosine.

    It has P@1, R-precision and MAP@R, overall and of each class; the worst and some random queries with their nearest
    neighbours; the most confused classes; a map of the embeddings; and histograms of the similarities. The file needs
    no network and can be sent around: its scripts and (small) pictures are inside, and names are escaped. Metrics are
    those of ``pml_ext.evaluation.retrieval_metrics`` for embeddings of length 1. Similarities are computed in chunks;
    10,000 images make a file of less than 10 MB.

    Args:
        embeddings: ``(N, D)``, floating point, finite, a tensor or an array. Normalised here, computed on the CPU.
        labels: ``(N,)``, integers, strings or bools, as in ``retrieval_metrics``. A class without a match is searched,
            but has no say in the metrics: it is listed.
        images: N images: a tensor ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, 3, H, W)``; a sequence of PIL images,
            tensors, arrays ``(H, W)`` or ``(H, W, 3)``, or paths; or a data set of images or (image, label), without
            a normalisation. Numbers are uint8 or floats in 0 to 1. Only what is shown is read. None: no pictures.
        class_names: That of label i at index i, or a dict from labels to names. None: "class i"; strings as they are.
        path: Of the file. Folders are made, an older file is replaced.
        gallery: ``(M, D)``, what is searched. None: every image searches all others.
        gallery_labels: ``(M,)``, as ``labels``.
        gallery_images: M images, as ``images``; both or none.
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
        TypeError: If embeddings are not floating point, labels of another kind, names no strings, or images of no
            known kind.
        ValueError: If lengths differ, embeddings are not finite, no image has a match, a label has no name, an image
            cannot be read or has values out of range, or a setting breaks a rule.

    Examples:
        >>> import tempfile
        >>> embeddings, labels = torch.randn(40, 8), torch.arange(40) % 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = retrieval_report(embeddings, labels, class_names=["cat", "dog"], path=f"{folder}/report.html")
        ...     path.read_text(encoding="utf-8").count("dog") > 10
        True
    """
    check_together("gallery", gallery, "gallery_labels", gallery_labels)
    embeddings = as_embeddings("embeddings", embeddings)
    searched = embeddings if gallery is None else as_embeddings("gallery", gallery, width=embeddings.shape[1])
    codes = class_codes(labels, len(embeddings), gallery_labels, len(searched))
    if images is not None:
        check_images("images", images, len(embeddings))
    if gallery_images is not None:
        check_images("gallery_images", gallery_images, len(searched))
    if gallery is not None:
        check_together("images", images, "gallery_images", gallery_images)
    counts = {"num_queries": num_queries, "num_neighbors": num_neighbors, "num_pairs": num_pairs}
    for name, value in counts.items() if num_points == 0 else (counts | {"num_points": num_points}).items():
        check_count(name, value)
    names = _names(class_names, codes.classes)
    map_method = _map_method(method, min(num_points, len(embeddings))) if num_points else None
    if not isinstance(title, str):
        raise TypeError(f"title must be a string, got {title!r}")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}")

    unit = unit_embeddings(embeddings.cpu()).float()
    unit_gallery = unit if gallery is None else unit_embeddings(searched.cpu()).float()
    result = _search(unit, unit_gallery, codes, num_neighbors, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    worst, random = _choose_queries(result, num_queries, seed)
    on_map = _choose_points(len(unit), num_points, seed)
    positions = np.empty((0, 2)) if map_method is None else map_method.place(unit[on_map].numpy(), seed)
    first = 0 if gallery is None else len(unit)  # pictures of the gallery are numbered behind those of queries
    shown = {query: [first + i for i in result.nearest[query].tolist()] for query in worst + random}
    gallery_pictures: dict[int, str] = {}
    map_pictures: dict[int, str] = {}
    if images is not None:
        neighbors = [i for row in shown.values() for i in row]
        if gallery is None:
            thumbnails = load_thumbnails(images, [*shown, *neighbors, *on_map], progress)
        else:
            thumbnails = load_thumbnails(images, [*shown, *on_map], progress)
            others = load_thumbnails(gallery_images, [i - first for i in neighbors], progress, "gallery_images")
            thumbnails |= {first + i: thumbnail for i, thumbnail in others.items()}
        in_rows = [i for query, row in shown.items() for i in (query, *row)]
        gallery_pictures = encode_thumbnails(thumbnails, in_rows, _GALLERY_BYTES, max_side=96)
        map_pictures = encode_thumbnails(thumbnails, on_map, _MAP_BYTES, max_side=64)

    def describe(query: int) -> Query:
        code, row = codes.queries[query], result.nearest[query]
        similarities = (unit_gallery[row] * unit[query]).sum(1).tolist()
        neighbors = [
            Neighbor(i, names[other], bool(other == code), similarity, gallery_pictures.get(first + i))
            for i, other, similarity in zip(row.tolist(), codes.gallery[row], similarities, strict=True)
        ]
        return Query(query, names[code], float(result.metrics[query, 2]), gallery_pictures.get(query), neighbors)

    asked, sizes = torch.unique(codes.queries, return_counts=True)
    map_classes, group = torch.unique(codes.queries[on_map], return_inverse=True)
    report = Report(
        title=title,
        num_images=len(unit),
        num_gallery=None if gallery is None else len(unit_gallery),
        num_classes=len(asked),
        embedding_size=unit.shape[1],
        metrics=tuple(result.metrics[result.num_right > 0].mean(0).tolist()),
        left_out=[names[code] for code in torch.unique(codes.queries[result.num_right == 0])],
        classes=_class_rows(result, codes.queries, names),
        pairs=_confused_pairs(result, dict(zip(asked.tolist(), sizes.tolist(), strict=True)), codes.queries, names)[
            :num_pairs
        ],
        worst=[describe(query) for query in worst],
        random=[describe(query) for query in random],
        points=[
            Point(float(x), float(y), int(c), i, map_pictures.get(i))
            for (x, y), c, i in zip(positions, group, on_map, strict=True)
        ],
        map_names=[names[c] for c in map_classes],
        method="" if map_method is None else map_method.name,
        histogram=_similarity_histogram(unit, unit_gallery, codes, progress),
    )
    path.write_text(render_page(report), encoding="utf-8", errors="replace", newline="\n")
    return path


class _Search(NamedTuple):
    """What the search gives for each query: metrics are NaN for those without a match."""

    metrics: Tensor  # (N, 3), float64: precision at 1, R-precision, AP@R
    num_right: Tensor  # (N,), int64: right images that there are (R)
    nearest: Tensor  # (N, num_neighbors)
    similarity: Tensor  # (N,), of the nearest
    first: dict[tuple[int, int], int]  # pairs of class and neighbour's class, of first neighbours
    among_r: dict[tuple[int, int], int]  # and of the R nearest


def _search(unit: Tensor, gallery: Tensor, codes: ClassCodes, num_neighbors: int, progress: bool) -> _Search:
    """Search every query, and compare the classes of queries and neighbours."""
    alone = gallery is unit
    num_neighbors = min(num_neighbors, len(gallery) - alone)
    num_classes = len(codes.classes)
    num_right = torch.bincount(codes.gallery, minlength=num_classes)[codes.queries] - int(alone)
    if not (num_right > 0).any():
        raise ValueError("labels must have a match for one image at least, got none")
    metrics = torch.full((len(unit), len(METRICS)), torch.nan, dtype=torch.float64)
    nearest = torch.empty(len(unit), num_neighbors, dtype=torch.long)
    first, among_r = [], []
    depths = num_right.clamp(min=num_neighbors)
    for rows, neighbors in search(unit, gallery, depths, torch.arange(len(unit)) if alone else None, progress=progress):
        nearest[rows] = neighbors[:, :num_neighbors]
        of_query, of_neighbor, others = codes.queries[rows, None], codes.gallery[neighbors], num_right[rows]
        for i, name in enumerate(METRICS):
            metrics[rows, i] = query_values(name, of_neighbor == of_query, others)  # 0 / 0 where there is no other
        pairs = of_query * num_classes + of_neighbor  # (n, k)
        within = torch.arange(pairs.shape[1]) < others[:, None]
        first.append(pairs[:, 0].clone())  # a view would keep all pairs
        among_r.append(_counted(pairs[within], num_classes**2))
    metrics[num_right == 0] = torch.nan
    similarity = (unit * gallery[nearest[:, 0]]).sum(1)
    return _Search(
        metrics,
        num_right,
        nearest,
        similarity,
        _as_pairs(_counted(torch.cat(first), num_classes**2), num_classes),
        _as_pairs(torch.cat(among_r, 1), num_classes),
    )


def _counted(codes: Tensor, num_codes: int) -> Tensor:
    """Return the codes that occur, from 0 to ``num_codes - 1``, and how often, ``(2, n)``."""
    if num_codes > len(codes):
        return torch.stack(torch.unique(codes, return_counts=True))
    counts = torch.bincount(codes)  # needs no sort
    (occurring,) = counts.nonzero(as_tuple=True)
    return torch.stack([occurring, counts[occurring]])


def _as_pairs(codes: Tensor, num_classes: int) -> dict[tuple[int, int], int]:
    """Return how often pairs of different classes occur; ``codes`` is (2, n): a * num_classes + b, and how often."""
    counts: dict[tuple[int, int], int] = {}
    for code, count in codes.T.tolist():
        pair = divmod(code, num_classes)
        if pair[0] != pair[1]:
            counts[pair] = counts.get(pair, 0) + count
    return counts


def _class_rows(result: _Search, of_query: Tensor, names: list[str]) -> list[ClassRow]:
    with_match = result.num_right > 0
    classes, inverse, sizes = torch.unique(of_query[with_match], return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), len(METRICS), dtype=torch.float64).index_add_(
        0, inverse, result.metrics[with_match]
    )
    rows = [
        ClassRow(names[code], size, tuple(values))
        for code, size, values in zip(classes, sizes.tolist(), (sums / sizes[:, None]).tolist(), strict=True)
    ]
    return sorted(rows, key=lambda row: row.metrics[::-1])


def _confused_pairs(result: _Search, sizes: dict[int, int], of_query: Tensor, names: list[str]) -> list[ConfusedPair]:
    """Return the pairs, those with the largest share among the R nearest first, then the most frequent."""
    num_ranked = torch.zeros(len(names), dtype=torch.long).index_add_(0, of_query, result.num_right).tolist()
    order = sorted(result.among_r.items(), key=lambda item: (-item[1] / num_ranked[item[0][0]], -item[1], item[0]))
    return [
        ConfusedPair(names[a], names[b], sizes[a], result.first.get((a, b), 0) / sizes[a], count / num_ranked[a])
        for (a, b), count in order
    ]


def _choose_queries(result: _Search, num_queries: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the queries with the lowest AP@R (of these, where the neighbour looks most certain), and random others."""
    score = result.metrics[:, 2]
    possible = score.isfinite().nonzero().flatten().tolist()
    scores, certain = score.tolist(), result.similarity.tolist()
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


def _similarity_histogram(unit: Tensor, gallery: Tensor, codes: ClassCodes, progress: bool) -> Histogram:
    everything, positive = torch.zeros(2, _BINS, dtype=torch.long)
    with full_precision(unit.device), tqdm(total=len(unit), desc="similarities", disable=not progress) as bar:
        for rows, similarity in similarity_chunks(unit, gallery):
            bins = similarity.add_(1).mul_(_BINS / 2).clamp_(0, _BINS - 1).int()  # (n, M)
            same = codes.queries[rows][:, None] == codes.gallery
            if gallery is unit:
                itself = (torch.arange(len(rows)), rows)
                same[itself] = False
                everything -= torch.bincount(bins[itself], minlength=_BINS)
            everything += torch.bincount(bins.flatten(), minlength=_BINS)
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


def _names(class_names: Sequence[str] | Mapping[Any, str] | None, classes: list[Any]) -> list[str]:
    """Return the names of the classes, in their order."""
    if class_names is None:
        return [label if isinstance(label, str) else f"class {label}" for label in classes]
    if isinstance(class_names, str) or not hasattr(class_names, "__getitem__"):
        raise TypeError(f"class_names must be a sequence or a dict of strings, got {class_names!r}")
    if isinstance(class_names, Mapping):
        known: Mapping[Any, str] = class_names
    else:
        known = dict(enumerate(class_names))
    missing = [label for label in classes if label not in known]
    if missing:
        raise ValueError(f"class_names must have a name for each label, got {len(known)} names, none for {missing[0]}")
    wrong = [known[label] for label in classes if not isinstance(known[label], str)]
    if wrong:
        raise TypeError(f"class_names must be strings, got {wrong[0]!r}")
    return [str(known[label]) for label in classes]
