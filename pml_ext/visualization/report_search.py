"""What a report finds out by searching: metrics and neighbors of each query, and which classes are confused."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pml_ext.evaluation.class_codes import ClassCodes
from pml_ext.evaluation.metrics import METRICS
from pml_ext.evaluation.ranking import query_values
from pml_ext.neighbors.search import search

_PAIRS_AT_ONCE = 1 << 20


class Searched(NamedTuple):
    """Embeddings of a run, and what they find for each query: metrics are NaN for those without a match."""

    unit: Tensor  # (N, D), rows of length 1
    gallery: Tensor  # (M, D), likewise; ``unit`` itself where the queries search each other
    metrics: Tensor  # (N, 3), float64: precision at 1, R-precision, AP@R
    num_right: Tensor  # (N,), int64: right images that there are (R)
    nearest: Tensor  # (N, num_neighbors)
    similarity: Tensor  # (N,), of the nearest
    first: dict[int, int]  # code of a pair -> how many queries of the one class have the other as first neighbor
    among_r: Tensor  # (2, n): codes of pairs, and how often they occur among the R nearest

    def shown(self, query: int, num_neighbors: int | None = None) -> list[int]:
        """Return the keys of a query and its neighbors: images of a gallery count on behind the queries."""
        first = 0 if self.gallery is self.unit else len(self.unit)
        return [query, *(first + i for i in self.nearest[query, :num_neighbors].tolist())]

    def similarities(self, query: int, num_neighbors: int | None = None) -> list[float]:
        """Return the cosines of a query and its neighbors."""
        return (self.gallery[self.nearest[query, :num_neighbors]] * self.unit[query]).sum(1).tolist()

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
    sizes: np.ndarray[Any, Any]  # (C,), queries of each class

    def num_first(self, i: int) -> int:
        """Return how many queries of the pair's one class have the other as first neighbor."""
        return self.first.get(int(self.a[i]) * len(self.sizes) + int(self.b[i]), 0)


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
    first_pairs = dict(zip(found, counts, strict=True))
    return Searched(unit, gallery, metrics, num_right, nearest, similarity, first_pairs, among_r.total())


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


def confusions(searched: Searched, of_query: Tensor, num_classes: int) -> Confusions:
    """Return the confused pairs, those with the largest share among the R nearest first, then the most frequent."""
    pairs, counts = searched.among_r.numpy()
    a, b = np.divmod(pairs, num_classes)
    num_ranked = torch.zeros(num_classes, dtype=torch.long).index_add_(0, of_query, searched.num_right).numpy()
    (different,) = np.nonzero(a != b)
    share = counts[different] / num_ranked[a[different]]
    order = np.lexsort((pairs[different], -counts[different], -share))
    kept = different[order]
    sizes = torch.bincount(of_query, minlength=num_classes).numpy()
    return Confusions(a[kept], b[kept], searched.first, share[order], sizes)
