"""What a report finds out by searching: metrics and neighbors of each query, and which classes are confused."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pml_ext.evaluation.class_codes import ClassCodes
from pml_ext.evaluation.metrics import METRICS
from pml_ext.evaluation.ranking import query_values
from pml_ext.neighbors.search import search

_PAIRS_AT_ONCE = 1 << 20
_SAME = 1e-9  # metrics that differ by less are equal


class Searched(NamedTuple):
    """What the search gives for each query: metrics are NaN for those without a match."""

    metrics: Tensor  # (N, 3), float64: precision at 1, R-precision, AP@R
    num_right: Tensor  # (N,), int64: right images that there are (R)
    nearest: Tensor  # (N, num_neighbors)
    similarity: Tensor  # (N,), of the nearest
    first: dict[int, int]  # code of a pair -> how many queries of the one class have the other as first neighbor
    among_r: Tensor  # (2, n): codes of pairs, and how often they occur among the R nearest

    @property
    def mean_metrics(self) -> tuple[float, ...]:
        """The means over all queries that have a match."""
        return tuple(self.metrics[self.num_right > 0].mean(0).tolist())


class Confusions(NamedTuple):
    """Pairs of different classes, those with the largest share first: queries of class a have neighbors of class b."""

    a: np.ndarray[Any, Any]  # (n,), int64
    b: np.ndarray[Any, Any]  # (n,), int64
    first: dict[int, int]
    among_r: np.ndarray[Any, Any]  # (n,), share of the R nearest
    num_classes: int

    def num_first(self, i: int) -> int:
        """Return how many queries of the pair's one class have the other as first neighbor."""
        return self.first.get(int(self.a[i]) * self.num_classes + int(self.b[i]), 0)


def search_all(unit: Tensor, gallery: Tensor, codes: ClassCodes, num_neighbors: int, progress: bool) -> Searched:
    """Search every query, and compare the classes of queries and neighbors.

    Args:
        unit: ``(N, D)``, rows of length 1.
        gallery: ``(M, D)``, likewise; ``unit`` itself if the queries search each other.
        codes: Class codes of both.
        num_neighbors: That are kept, fewer if there are fewer.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If no query has a match.
    """
    alone = gallery is unit
    num_neighbors = min(num_neighbors, len(gallery) - alone)
    num_classes = len(codes.classes)
    num_right = torch.bincount(codes.gallery, minlength=num_classes)[codes.queries] - int(alone)
    if not (num_right > 0).any():
        raise ValueError("labels must have a match for one image at least, got none")
    metrics = torch.full((len(unit), len(METRICS)), torch.nan, dtype=torch.float64)
    nearest = torch.empty(len(unit), num_neighbors, dtype=torch.long)
    first, among_r = [], _PairCounts(num_classes**2)
    depths = num_right.clamp(min=num_neighbors)
    for rows, neighbors in search(unit, gallery, depths, torch.arange(len(unit)) if alone else None, progress=progress):
        nearest[rows] = neighbors[:, :num_neighbors]
        of_query, of_neighbor, others = codes.queries[rows, None], codes.gallery[neighbors], num_right[rows]
        for i, name in enumerate(METRICS):
            metrics[rows, i] = query_values(name, of_neighbor == of_query, others)  # 0 / 0 where there is no other
        pairs = of_query * num_classes + of_neighbor  # (n, k)
        within = torch.arange(pairs.shape[1]) < others[:, None]
        first.append(pairs[:, 0].clone())  # a view would keep all pairs
        among_r.add(pairs[within])
    metrics[num_right == 0] = torch.nan
    similarity = (unit * gallery[nearest[:, 0]]).sum(1)
    found, counts = counted(torch.cat(first), num_classes**2).tolist()
    return Searched(metrics, num_right, nearest, similarity, dict(zip(found, counts, strict=True)), among_r.total())


class _PairCounts:
    """Counts codes that come in parts, in memory of the codes that occur."""

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes
        self.parts: list[Tensor] = []
        self.waiting = 0
        self.limit = _PAIRS_AT_ONCE

    def add(self, codes: Tensor) -> None:
        self.parts.append(counted(codes, self.num_codes))
        self.waiting += self.parts[-1].shape[1]
        if self.waiting > self.limit:
            self.parts = [self.total()]
            self.waiting = self.parts[0].shape[1]
            self.limit = max(_PAIRS_AT_ONCE, 2 * self.waiting)  # so that each code is merged a few times only

    def total(self) -> Tensor:
        """Return the codes that occur, and how often, ``(2, n)``."""
        codes, counts = torch.cat(self.parts, 1)
        occurring, place = torch.unique(codes, return_inverse=True)
        return torch.stack([occurring, torch.zeros_like(occurring).index_add_(0, place, counts)])


def counted(codes: Tensor, num_codes: int) -> Tensor:
    """Return the codes that occur, from 0 to ``num_codes - 1``, and how often, ``(2, n)``."""
    if num_codes > len(codes):
        return torch.stack(torch.unique(codes, return_counts=True))
    counts = torch.bincount(codes)  # needs no sort
    (occurring,) = counts.nonzero(as_tuple=True)
    return torch.stack([occurring, counts[occurring]])


def class_means(searched: Searched, of_query: Tensor) -> dict[int, tuple[int, tuple[float, ...]]]:
    """Return, for each class with a match, how many queries it has and the means of their metrics."""
    with_match = searched.num_right > 0
    classes, inverse, sizes = torch.unique(of_query[with_match], return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), len(METRICS), dtype=torch.float64).index_add_(
        0, inverse, searched.metrics[with_match]
    )
    means = (sums / sizes[:, None]).tolist()
    return {
        code: (size, tuple(values)) for code, size, values in zip(classes.tolist(), sizes.tolist(), means, strict=True)
    }


def confusions(searched: Searched, of_query: Tensor, num_classes: int) -> Confusions:
    """Return the confused pairs, those with the largest share among the R nearest first, then the most frequent."""
    pairs, counts = searched.among_r.numpy()
    a, b = np.divmod(pairs, num_classes)
    num_ranked = torch.zeros(num_classes, dtype=torch.long).index_add_(0, of_query, searched.num_right).numpy()
    (different,) = np.nonzero(a != b)
    share = counts[different] / num_ranked[a[different]]
    order = np.lexsort((pairs[different], -counts[different], -share))
    kept = different[order]
    return Confusions(a[kept], b[kept], searched.first, share[order], num_classes)


def first_of_each(groups: np.ndarray[Any, Any], limit: int) -> dict[int, list[int]]:
    """Return the positions of the first ``limit`` entries of each group, in their order."""
    by_group = np.argsort(groups, kind="stable")
    values, starts = np.unique(groups[by_group], return_index=True)
    ends = np.append(starts, len(groups))[1:].tolist()
    return {
        value: by_group[start : min(start + limit, end)].tolist()
        for value, start, end in zip(values.tolist(), starts.tolist(), ends, strict=True)
    }


def worst_first(searched: Searched) -> list[int]:
    """Return all queries with a match, by AP@R, then those first whose neighbor looks most certain."""
    scores, certain = searched.metrics[:, 2].tolist(), searched.similarity.tolist()
    possible = [i for i, score in enumerate(scores) if math.isfinite(score)]
    return sorted(possible, key=lambda i: (scores[i], -certain[i], i))


def random_queries(searched: Searched, num_queries: int, seed: int, taken: Sequence[int]) -> list[int]:
    """Return random queries with a match that are not taken yet."""
    order = _shuffled(len(searched.metrics), seed).tolist()
    left_out = set(taken) | set((searched.num_right == 0).nonzero().flatten().tolist())
    return [i for i in order if i not in left_out][:num_queries]


def changed_queries(
    searched: Searched, other: Searched, num_queries: int, seed: int
) -> tuple[tuple[int, int, int], list[int], list[int]]:
    """Compare the AP@R of each query in two searches.

    Returns:
        How many queries are better, worse and the same in the first; those that are better by most; and those that are
        worse by most. Equal ones come in random order.
    """
    difference = np.nan_to_num((searched.metrics - other.metrics)[:, 2].numpy())
    rank = np.argsort(_shuffled(len(difference), seed).numpy())
    better, worse = (
        [i for i in np.lexsort((rank, -signed))[:num_queries].tolist() if signed[i] > _SAME]
        for signed in (difference, -difference)
    )
    num_better, num_worse = int((difference > _SAME).sum()), int((difference < -_SAME).sum())
    return (num_better, num_worse, int((searched.num_right > 0).sum()) - num_better - num_worse), better, worse


def _shuffled(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
