"""One HTML file that shows how well embeddings retrieve, and where they fail."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pml_ext.evaluation.class_codes import ClassCodes, class_codes
from pml_ext.evaluation.metrics import as_embeddings, check_together
from pml_ext.neighbors.similarity import similarity_chunks, unit_embeddings
from pml_ext.precision import full_precision
from pml_ext.validation import check_count
from pml_ext.visualization.image_names import image_names
from pml_ext.visualization.report_about import facts
from pml_ext.visualization.report_choice import Chosen, choose, class_means, first_of_each
from pml_ext.visualization.report_comparison import ChangedClass, ChangedQuery, Comparison
from pml_ext.visualization.report_html import Image, Neighbor, Query
from pml_ext.visualization.report_map import choose_points, map_method
from pml_ext.visualization.report_page import (
    ClassDetails,
    ClassRow,
    ConfusedPair,
    Histogram,
    Point,
    Report,
    render_page,
)
from pml_ext.visualization.report_search import Confusions, Searched, confusions, search_all
from pml_ext.visualization.thumbnails import check_images, encode_thumbnails, load_thumbnails

_ROWS_BYTES, _APART_BYTES = 3_500_000, 5_000_000  # of pictures: in rows of the page; on the map and of classes
_NEIGHBORS_OF_CLASS, _PAIRS_OF_CLASS = 5, 3
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
    names: Sequence[str | os.PathLike[str]] | None = None,
    gallery_names: Sequence[str | os.PathLike[str]] | None = None,
    title: str | None = None,
    about: Mapping[str, Any] | None = None,
    other: Tensor | np.ndarray[Any, Any] | None = None,
    other_gallery: Tensor | np.ndarray[Any, Any] | None = None,
    other_title: str | None = None,
    other_about: Mapping[str, Any] | None = None,
    num_queries: int = 12,
    num_neighbors: int = 10,
    num_pairs: int = 20,
    num_points: int = 2000,
    method: str = "tsne",
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Write one HTML file about how well embeddings retrieve: each image among all others, or in a gallery, by cosine.

    The file has P@1, R-precision and MAP@R, overall and of each class; the worst and some random queries with their
    nearest neighbors; the most confused classes; a map of the embeddings; and histograms of the similarities. A class
    opens to show its worst queries and the classes it is taken for. With ``other``, the report compares two runs: which
    classes and queries are better in the one, and which in the other.

    The file loads nothing and can be sent around: its scripts and (small) pictures are inside, and all texts are
    escaped. Metrics are those of ``pml_ext.evaluation.retrieval_metrics`` for embeddings of length 1. Similarities are
    computed in chunks: for 50,000 images the peak of memory is less than 1 GB above the embeddings, and the file is
    smaller than 15 MB.

    Args:
        embeddings: ``(N, D)``, floating point, finite, a tensor or an array. They are normalized here; the report is
            computed on the CPU.
        labels: ``(N,)``, integers, strings or bools, as in ``retrieval_metrics``. A class without a match is searched,
            but does not count in the metrics; the report names it.
        images: N images: a tensor ``(N, H, W)``, ``(N, 1, H, W)`` or ``(N, 3, H, W)``; a sequence of PIL images,
            tensors, arrays ``(H, W)`` or ``(H, W, 3)``, or paths; or a data set of images or (image, label), without
            a normalization. Numbers are uint8 or floats in 0 to 1. Only what is shown is read. None: no pictures.
        class_names: A sequence with the name of label i at index i, or a dict from labels to names. None: "class i";
            labels that are strings are names.
        path: The file to write. Folders are made; an older file is replaced.
        gallery: ``(M, D)``, the embeddings that are searched. None: every image searches all others.
        gallery_labels: ``(M,)``, the labels of the gallery, as ``labels``.
        gallery_images: M images of the gallery, as ``images``; give both or none.
        names: N strings or paths by which a reader knows the images, shown with the pictures. None: if ``images`` are
            paths or a data set that has them, the paths below their common folder.
        gallery_names: M names of the gallery's images, as ``names``.
        title: The heading of the page and, with ``other``, the name of this run. None: "Retrieval report", or "this
            run".
        about: Facts for the top of the page, a mapping from names to values such as recipe, epoch and date. Values are
            written by ``str``. A value that is a mapping, such as the settings, can be unfolded.
        other: ``(N, D2)``, embeddings of the same images by another run, such as the one before a change. Differences
            are ``embeddings`` minus ``other``. None: no comparison.
        other_gallery: ``(M, D2)``, embeddings of the gallery by the other run.
        other_title: The name of the other run. None: "the other run".
        other_about: Facts about the other run, as ``about``. Facts that differ are bold.
        num_queries: How many queries to show of each kind, >= 1: the worst (lowest AP@R, then the most similar
            neighbor), random ones, and those that are better in each of two runs.
        num_neighbors: How many neighbors to show, >= 1. Fewer if there are fewer images.
        num_pairs: How many confused pairs of classes to show, >= 1.
        num_points: How many images to show on the map, >= 0. They are drawn at random if there are more. 0: no map.
        method: How the map is made: "tsne", or "umap", which needs the package umap-learn. Fewer than 5 points are
            always placed by t-SNE.
        seed: The seed of random queries, of the points and of the map. The same seed gives the same file.
        progress: Whether to show progress bars.

    Returns:
        The path of the file.

    Raises:
        ImportError: If ``method`` is "umap" and umap-learn is not installed; the message names the extra.
        TypeError: If embeddings are not floating point, labels of another kind, names or titles no strings, ``about``
            is not a mapping, or images are of no known kind.
        ValueError: If lengths differ, embeddings are not finite, no image has a match, a label has no name, an image
            cannot be read or has values out of range, an argument is given without the one that it belongs to, both
            runs have one title, or a setting breaks a rule.

    Examples:
        >>> import tempfile
        >>> embeddings, labels = torch.randn(40, 8), torch.arange(40) % 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = retrieval_report(embeddings, labels, class_names=["cat", "dog"], path=f"{folder}/report.html")
        ...     path.read_text(encoding="utf-8").count("dog") > 10
        True

        Two runs:

        >>> other = torch.randn(40, 16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/report.html"
        ...     path = retrieval_report(embeddings, labels, path=path, title="new", other=other, other_title="old")
        ...     "Queries that are better in new" in path.read_text(encoding="utf-8")
        True
    """
    check_together("gallery", gallery, "gallery_labels", gallery_labels)
    embeddings = as_embeddings("embeddings", embeddings)
    searched = embeddings if gallery is None else as_embeddings("gallery", gallery, width=embeddings.shape[1])
    codes = class_codes(labels, len(embeddings), gallery_labels, len(searched))
    others = None
    if other is None:
        given = {"other_gallery": other_gallery, "other_title": other_title, "other_about": other_about}
        for name, value in given.items():
            _check_needs(name, value, "other", other)
    else:
        others = _check_other(other, other_gallery, len(embeddings), gallery, len(searched))
    if images is not None:
        check_images("images", images, len(embeddings))
    if gallery_images is not None:
        check_images("gallery_images", gallery_images, len(searched))
    if gallery is not None:
        check_together("images", images, "gallery_images", gallery_images)
    _check_needs("gallery_names", gallery_names, "gallery", gallery)
    known = _Images(
        codes,
        _class_names(class_names, codes.classes),
        image_names("names", names, images, len(embeddings)),
        None if gallery is None else image_names("gallery_names", gallery_names, gallery_images, len(searched)),
    )
    counts: dict[str, int] = {"num_queries": num_queries, "num_neighbors": num_neighbors, "num_pairs": num_pairs}
    for name, number in counts.items() if num_points == 0 else (counts | {"num_points": num_points}).items():
        check_count(name, number)
    placed_by = map_method(method, min(num_points, len(embeddings))) if num_points else None
    titles = _titles(title, other_title, two=other is not None)
    told = facts({"about": about} if other is None else {"about": about, "other_about": other_about})
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}")

    run = _searched(embeddings, None if gallery is None else searched, codes, num_neighbors, progress)
    other_run = None if others is None else _searched(*others, codes, num_neighbors, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    means = class_means(run, codes.queries)
    other_means = {} if other_run is None else class_means(other_run, codes.queries)
    chosen = choose(run, other_run, means, other_means, codes.queries, num_queries, seed)
    on_map = choose_points(len(run.unit), num_points, seed)
    positions = np.empty((0, 2)) if placed_by is None else placed_by.place(run.unit[on_map].numpy(), seed)
    in_rows, apart = dict[int, str](), dict[int, str]()
    if images is not None:
        in_rows, apart = _pictures(images, gallery_images, run, other_run, chosen, on_map, progress)
    comparison = None
    if other_run is not None:
        comparison = Comparison(
            titles,
            other_run.mean_metrics,
            chosen.num_changed,
            [
                ChangedClass(code, known.class_names[code], means[code].metrics[2], other_means[code].metrics[2])
                for code in chosen.changed
            ],
            *(
                [ChangedQuery(known.query(run, i, in_rows), known.query(other_run, i, in_rows)) for i in queries]
                for queries in (chosen.better, chosen.worse)
            ),
        )
    confused = confusions(run, codes.queries, len(codes.classes))
    pairs_of = first_of_each(confused.a, _PAIRS_OF_CLASS)
    describe_pair = partial(known.pair, confused)
    map_classes, group = torch.unique(codes.queries[on_map], return_inverse=True)
    report = Report(
        title=titles[0] if other is None else " against ".join(titles),
        about=told,
        comparison=comparison,
        num_images=len(run.unit),
        num_gallery=None if gallery is None else len(run.gallery),
        num_classes=len(torch.unique(codes.queries)),
        embedding_size=run.unit.shape[1],
        metrics=run.mean_metrics,
        left_out=[known.class_names[code] for code in torch.unique(codes.queries[run.num_right == 0])],
        classes=[ClassRow(code, known.class_names[code], *means[code]) for code in chosen.ranked],
        details=[
            ClassDetails(
                code,
                known.class_names[code],
                *means[code],
                None if other_run is None else other_means[code].metrics,
                [describe_pair(i) for i in pairs_of.get(code, [])],
                [known.query(run, i, {}, _NEIGHBORS_OF_CLASS) for i in chosen.queries_of[code]],
            )
            for code in chosen.detailed
        ],
        pairs=[describe_pair(i) for i in range(min(num_pairs, len(confused.a)))],
        worst=[known.query(run, i, in_rows) for i in chosen.worst],
        random=[known.query(run, i, in_rows) for i in chosen.random],
        points=[
            Point(float(x), float(y), int(c), i, known.file(i))
            for (x, y), c, i in zip(positions, group, on_map, strict=True)
        ],
        map_names=[known.class_names[code] for code in map_classes],
        method="" if placed_by is None else placed_by.name,
        histogram=_similarity_histogram(run.unit, run.gallery, codes, progress),
        pictures=apart,
    )
    path.write_text(render_page(report), encoding="utf-8", errors="replace", newline="\n")
    return path


class _Images(NamedTuple):
    """What is known of images, by their keys: queries, then the gallery."""

    codes: ClassCodes
    class_names: list[str]
    files: Sequence[str] | None
    gallery_files: Sequence[str] | None

    def file(self, key: int) -> str | None:
        """Return the name of an image."""
        index = key - len(self.codes.queries)
        files = self.files if index < 0 else self.gallery_files
        return None if files is None else files[key if index < 0 else index]

    def image(self, key: int, pictures: Mapping[int, str]) -> Image:
        """Return what the page tells about an image."""
        index, codes = key, self.codes.queries
        if key >= len(codes):
            index, codes = key - len(codes), self.codes.gallery
        code = int(codes[index])
        return Image(key, index, code, self.class_names[code], self.file(key), pictures.get(key))

    def query(self, run: Searched, query: int, pictures: Mapping[int, str], num_neighbors: int | None = None) -> Query:
        """Return what the page tells about a query and its neighbors."""
        asked, *found = (self.image(key, pictures) for key in run.shown(query, num_neighbors))
        similarities = run.similarities(query, num_neighbors)
        neighbors = [
            Neighbor(image, image.code == asked.code, value) for image, value in zip(found, similarities, strict=True)
        ]
        return Query(asked, float(run.metrics[query, 2]), neighbors)

    def pair(self, confused: Confusions, i: int) -> ConfusedPair:
        """Return what the page tells about a pair of classes."""
        a, b = int(confused.a[i]), int(confused.b[i])
        size = int(confused.sizes[a])
        first = confused.num_first(i) / size
        return ConfusedPair(a, self.class_names[a], b, self.class_names[b], size, first, float(confused.among_r[i]))


def _searched(
    embeddings: Tensor, gallery: Tensor | None, codes: ClassCodes, num_neighbors: int, progress: bool
) -> Searched:
    unit = unit_embeddings(embeddings.cpu()).float()
    unit_gallery = unit if gallery is None else unit_embeddings(gallery.cpu()).float()
    return search_all(unit, unit_gallery, codes, num_neighbors, progress)


def _pictures(
    images: Any,
    gallery_images: Any,
    run: Searched,
    other_run: Searched | None,
    chosen: Chosen,
    on_map: list[int],
    progress: bool,
) -> tuple[dict[int, str], dict[int, str]]:
    """Return the pictures in rows of the page, and those of the map and of classes, by their keys."""
    in_rows = [key for query in chosen.worst + chosen.random for key in run.shown(query)]
    for each in (run, other_run):
        in_rows += [key for query in chosen.worse + chosen.better if each for key in each.shown(query)]
    queries = [query for code in chosen.pictured for query in chosen.queries_of[code]]
    of_classes = {key for query in queries for key in run.shown(query, _NEIGHBORS_OF_CLASS)}
    apart = sorted(of_classes | set(on_map))
    thumbnails = _thumbnails(images, gallery_images, len(run.unit), [*in_rows, *apart], progress)
    return (
        encode_thumbnails(thumbnails, in_rows, _ROWS_BYTES, max_side=96),
        encode_thumbnails(thumbnails, apart, _APART_BYTES, max_side=64),
    )


def _thumbnails(
    images: Any, gallery_images: Any, num_queries: int, keys: Sequence[int], progress: bool
) -> dict[int, Any]:
    of_queries = [key for key in keys if key < num_queries]
    of_gallery = [key - num_queries for key in keys if key >= num_queries]
    thumbnails = load_thumbnails(images, of_queries, progress)
    if of_gallery:
        loaded = load_thumbnails(gallery_images, of_gallery, progress, "gallery_images")
        thumbnails |= {num_queries + i: thumbnail for i, thumbnail in loaded.items()}
    return thumbnails


def _check_needs(name: str, value: Any, needed: str, what: Any) -> None:
    if value is not None and what is None:
        raise ValueError(f"{needed} must come with {name}, got {name} alone")


def _check_other(
    other: Any, other_gallery: Any, num_queries: int, gallery: Any, num_gallery: int
) -> tuple[Tensor, Tensor | None]:
    other = as_embeddings("other", other)
    _check_needs("other_gallery", other_gallery, "gallery", gallery)
    if gallery is not None:
        check_together("other", other, "other_gallery", other_gallery)
        other_gallery = as_embeddings("other_gallery", other_gallery, width=other.shape[1])
    for name, rows, length in (("other", other, num_queries), ("other_gallery", other_gallery, num_gallery)):
        if rows is not None and len(rows) != length:
            first = "embeddings" if name == "other" else "gallery"
            raise ValueError(f"{name} must have the {length} rows of {first}, got {len(rows)}")
    return other, other_gallery


def _titles(title: Any, other_title: Any, two: bool) -> tuple[str, str]:
    """Return the titles of both runs; of a single one only the first counts."""
    for name, value in (("title", title), ("other_title", other_title)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {value!r}")
    if title is not None and title == other_title:
        raise ValueError(f"other_title must differ from title, got {title!r} for both")
    if not two:
        return title or "Retrieval report", ""
    return title or "this run", other_title or "the other run"


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


def _class_names(class_names: Sequence[str] | Mapping[Any, str] | None, classes: list[Any]) -> list[str]:
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
