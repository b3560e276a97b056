"""Retrieval metrics of embeddings."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pml_ext.evaluation.class_codes import IGNORED, ClassCodes, class_codes
from pml_ext.evaluation.clustering import clustering_metrics
from pml_ext.evaluation.ranking import RANKED, is_at_k, needed_ranks, query_values
from pml_ext.neighbors.search import search
from pml_ext.precision import upcast_half
from pml_ext.validation import as_tensor, check_count

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
"""Names of the metrics that are computed by default."""

_CLUSTERING = ("NMI", "AMI")
_WITH_K = ("precision_at_k", "recall_at_k", "hit_rate_at_k")
_ROWS_AT_ONCE = 1 << 14


def retrieval_metrics(
    embeddings: Tensor | np.ndarray[Any, Any],
    labels: Any,
    gallery: Tensor | np.ndarray[Any, Any] | None = None,
    gallery_labels: Any = None,
    metrics: Sequence[str] = METRICS,
    *,
    average: str | None = "micro",
    k: int | Sequence[int] = (1, 2, 4, 8),
    ignore_label: Any = None,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    r"""Search a gallery exactly for each query, and measure how many of its neighbors are of its class.

    Neighbors are the nearest by Euclidean distance, as in PML's ``AccuracyCalculator``; for embeddings of length 1, as
    ``recipes.embed`` returns them, this is the order of cosines. Rows at the same distance come in the order of their
    indices. Distances are compared in float32 (float64 where embeddings are of that type): neighbors whose cosines
    differ by less than about 1e-7 may come in any order.

    Queries without a match in the gallery do not enter the metrics; they are counted. Memory beyond the embeddings is
    about 200 MB, whatever the number of classes and their sizes are, or what ``chunk_size`` makes it.

    With R for the number of right samples in the gallery (without the query itself), the metrics of each query are:

    - "precision_at_k": the share of right samples among the k nearest; "precision_at_1", "precision_at_10", ...
    - "recall_at_k": whether a right sample is among the k nearest, which papers call Recall@K: "recall_at_1", ...
      "hit_rate_at_k" is another name for it.
    - "r_precision": the share of right samples among the R nearest.
    - "mean_average_precision_at_r": :math:`\frac{1}{R} \sum_{i=1}^{R} P(i)`, P(i) being the precision at i where the
      i-th neighbor is right, else 0.
    - "mean_average_precision": the same sum over all of the gallery.
    - "mean_reciprocal_rank": 1 / the rank of the first right sample.
    - "NMI", "AMI": normalized and adjusted mutual information of the classes and of as many k-means clusters. They are
      computed over all queries that are not ignored, not for each query.

    Args:
        embeddings: ``(N, D)``, floating point, finite: the queries, a tensor or an array.
        labels: ``(N,)``, integers of any width, strings, bytes or bools: a tensor, an array, a pandas Series or a
            sequence. Labels are equal if they are equal in Python.
        gallery: ``(M, D)``, what is searched. None: every query searches all other queries.
        gallery_labels: ``(M,)``, as ``labels``.
        metrics: Names. "precision_at_k", "recall_at_k" and "hit_rate_at_k" stand for one metric for each ``k``.
        average: "micro": the mean over queries. "macro": the mean over classes of the means over their queries. None:
            the means of each class.
        k: Ranks, >= 1, of metrics whose name ends in "_at_k". Ranks beyond the gallery's size count as wrong.
        ignore_label: The label of junk and distractors: they are searched, but they are never queries and never right.
            None: there are none.
        device: Where to search. None: that of ``embeddings`` (arrays: the CPU).
        chunk_size: Queries that are searched at a time, >= 1. None: as memory allows.
        progress: Whether to show a progress bar.

    Returns:
        For each metric a float, 0 to 1 (AMI: -1 to 1); with ``average=None`` a dict from labels, as Python has them, to
        floats. Then the integers "num_queries", those that enter the metrics, and "num_without_match", those
        that do not because they have no match.

    Raises:
        TypeError: If embeddings are not floating point, or labels of another kind.
        ValueError: If embeddings are not finite or empty, shapes do not match, no query has a match, a metric is
            unknown, or a setting breaks a rule.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
        >>> retrieval_metrics(points, ["cat", "cat", "dog", "dog"], metrics=("recall_at_k",), k=(1, 2))
        {'recall_at_1': 0.5, 'recall_at_2': 0.75, 'num_queries': 4, 'num_without_match': 0}

    Source:
        R-precision and MAP@R: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, section 3.2.
    """
    names = _metric_names(metrics, k)
    if average not in ("micro", "macro", None):
        raise ValueError(f"average must be 'micro', 'macro' or None, got {average!r}")
    if average is None and set(names) & set(_CLUSTERING):
        raise ValueError(
            f"average must be 'micro' or 'macro' for NMI and AMI, which have no value for a single class, got {average}"
        )
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_together("gallery", gallery, "gallery_labels", gallery_labels)
    queries = as_embeddings("embeddings", embeddings, device)
    searched = None
    if gallery is not None:
        queries, searched = in_one_dtype(queries, as_embeddings("gallery", gallery, queries.device, queries.shape[1]))
    codes = class_codes(labels, len(queries), gallery_labels, None if searched is None else len(searched), ignore_label)
    ranked = [name for name in names if name not in _CLUSTERING]
    result = rank_queries(queries, searched, codes, ranked, chunk_size=chunk_size, progress=progress)
    values: dict[str, Any] = {
        name: averaged(of_query, result.codes, codes.classes, average) for name, of_query in result.values.items()
    }
    if len(ranked) < len(names):
        known = codes.queries != IGNORED
        values |= clustering_metrics(
            queries[known.to(queries.device)], codes.queries[known], [n for n in names if n not in ranked]
        )
    counts = {"num_queries": len(result.codes), "num_without_match": result.num_without_match}
    return {name: values[name] for name in names} | counts


class RankedQueries(NamedTuple):
    """The metrics of all queries that have a match."""

    values: dict[str, Tensor]  # name -> (Q,), float64
    codes: Tensor  # (Q,), int64: of the queries' classes
    num_without_match: int


def rank_queries(
    queries: Tensor,
    gallery: Tensor | None,
    codes: ClassCodes,
    names: Sequence[str],
    own: Tensor | None = None,
    max_rank: int | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
) -> RankedQueries:
    """Search the gallery for each query that has a match there.

    Args:
        queries: ``(N, D)``.
        gallery: ``(M, D)``, or None: the queries.
        codes: The class codes of both.
        names: Names of metrics that single queries have.
        own: ``(N,)``, int64: the gallery row that is the query itself. Without a gallery it is known.
        max_rank: The largest rank that counts, as in ``query_values``.
        chunk_size: Number of queries at a time, as in ``retrieval_metrics``.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no query has a match.
    """
    own = torch.arange(len(queries)) if gallery is None else own
    gallery = queries if gallery is None else gallery
    sizes = torch.bincount(codes.gallery[codes.gallery != IGNORED], minlength=len(codes.classes))
    asked = (codes.queries != IGNORED).nonzero().flatten()
    num_right = sizes[codes.queries[asked]] - int(own is not None)  # itself is no match
    has_match = num_right > 0
    if not has_match.any():
        where = "among the other queries" if own is not None else "in the gallery"
        raise ValueError(f"labels must have a match {where} for one query at least, got none for {len(asked)} queries")
    num_without_match = int(len(asked) - has_match.sum())
    asked, num_right = asked[has_match], num_right[has_match]
    gallery_size = len(gallery) - int(own is not None)
    values = {name: torch.empty(len(queries), dtype=torch.float64) for name in names}
    if names:
        depths = torch.full((len(queries),), -1)
        depths[asked] = torch.stack([needed_ranks(n, num_right, gallery_size, max_rank) for n in names]).amax(0)
        right_of = torch.zeros(len(queries), dtype=torch.long).index_copy_(0, asked, num_right).to(queries.device)
        of_query, of_gallery = (x.to(queries.device) for x in (codes.queries, codes.gallery))
        for rows, neighbors in search(queries, gallery, depths, own, chunk_size, progress):
            found = of_gallery.index_select(0, neighbors.flatten()).view_as(neighbors)  # faster than of_gallery[...]
            right = found == of_query[rows, None]
            for name in names:
                values[name][rows.cpu()] = query_values(name, right, right_of[rows], max_rank).cpu()
    return RankedQueries({name: x[asked] for name, x in values.items()}, codes.queries[asked], num_without_match)


def averaged(values: Tensor, codes: Tensor, classes: Sequence[Any], average: str | None) -> Any:
    """Return the mean over queries, that over classes, or a dict with that of each class.

    Args:
        values: ``(Q,)``, of the queries.
        codes: ``(Q,)``, of their classes.
        classes: The labels of the classes.
        average: How to average, as in ``retrieval_metrics``.
    """
    if average == "micro":
        return float(values.mean())
    occurring, inverse, sizes = torch.unique(codes, return_inverse=True, return_counts=True)
    means = torch.zeros(len(occurring), dtype=torch.float64).index_add_(0, inverse, values) / sizes
    if average == "macro":
        return float(means.mean())
    return {classes[code]: mean for code, mean in zip(occurring.tolist(), means.tolist(), strict=True)}


def as_embeddings(
    name: str, embeddings: Any, device: torch.device | str | None = None, width: int | None = None
) -> Tensor:
    """Return embeddings as a tensor on a device, without a graph.

    Args:
        name: Name of the argument, for messages.
        embeddings: ``(N, D)``, a tensor or an array.
        device: Where they go. None: they stay.
        width: The D that they must have. None: any.

    Raises:
        TypeError: If they are not floating point.
        ValueError: If the shape is wrong, there is no row, or a number is not finite or too large to square.
    """
    if isinstance(embeddings, np.ndarray) and embeddings.dtype.kind == "f":
        embeddings = as_tensor(name, np.ma.filled(embeddings, np.nan))
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        kind = getattr(embeddings, "dtype", type(embeddings).__name__)
        raise TypeError(f"{name} must be a tensor or an array with a floating point dtype, got {kind}")
    if embeddings.ndim != 2 or width not in (None, embeddings.shape[1]):
        raise ValueError(f"{name} must have shape (N, {width or 'D'}), got {tuple(embeddings.shape)}")
    if embeddings.layout != torch.strided or embeddings.is_meta:
        raise ValueError(
            f"{name} must hold a number at each place, got a tensor of {embeddings.layout} on {embeddings.device}"
        )
    if not embeddings.numel():
        raise ValueError(f"{name} must have at least one row and one column, got shape {tuple(embeddings.shape)}")
    embeddings = embeddings.detach().to(device)
    _check_finite(name, embeddings)
    return embeddings


def in_one_dtype(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype that holds the numbers of both."""
    dtype = torch.promote_types(queries.dtype, gallery.dtype)
    return queries.to(dtype), gallery.to(dtype)


def check_together(name: str, value: Any, other_name: str, other: Any) -> None:
    """Check that two arguments are given together or not at all.

    Raises:
        ValueError: If one of them is None.
    """
    if (value is None) != (other is None):
        missing, given = (name, other_name) if value is None else (other_name, name)
        raise ValueError(f"{missing} must come with {given}, got {given} alone")


def _check_finite(name: str, embeddings: Tensor) -> None:
    norms = torch.cat([upcast_half(part).square().sum(1) for part in torch.split(embeddings, _ROWS_AT_ONCE)])
    wrong = (2 * norms).isfinite().logical_not().nonzero().flatten().tolist()
    if wrong:
        rows = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        x = embeddings[wrong[0]]
        odd = x[~x.isfinite()].tolist()
        got = f"{odd[0]}" if odd else f"{x.abs().max().item():.3g}, distances of which {x.dtype} cannot hold,"
        raise ValueError(
            f"{name} must be finite, got {got} in row {wrong[0]}; {len(wrong)} of {len(norms)} rows: {rows}"
        )


def _metric_names(metrics: Sequence[str], k: int | Sequence[int]) -> list[str]:
    """Return the names without "_at_k", each once, in their order."""
    if isinstance(metrics, str) or not isinstance(metrics, Iterable) or not (metrics := list(metrics)):
        raise ValueError(f"metrics must be a sequence of names, at least one, got {metrics!r}")
    k = k.tolist() if hasattr(k, "tolist") else k  # of NumPy or PyTorch
    ranks = list(k) if isinstance(k, Iterable) else [k]
    if not ranks:
        raise ValueError(f"k must be an integer or a sequence of integers, at least one, got {k!r}")
    for rank in ranks:
        check_count("k", rank)
    names: list[str] = []
    for name in metrics:
        if name in _WITH_K:
            names += [f"{name[:-1]}{rank}" for rank in ranks]
        elif name in RANKED or name in _CLUSTERING or is_at_k(name):
            names.append(name)
        else:
            known = ", ".join((*_WITH_K, *RANKED, *_CLUSTERING))
            raise ValueError(f"metrics must be {known}, or as precision_at_10, got {name!r}")
    return list(dict.fromkeys(names))
