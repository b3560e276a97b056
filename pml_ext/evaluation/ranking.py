"""Values of single queries, from which of their neighbors are right."""

import re

import torch
from torch import Tensor

RANKED = ("r_precision", "mean_average_precision_at_r", "mean_average_precision", "mean_reciprocal_rank")
"""Names of the metrics without a k of their own."""

_AT_K = re.compile(r"(precision|recall|hit_rate)_at_([1-9]\d*)")


def is_at_k(name: str) -> bool:
    """Whether this is the name of a metric with a k, such as "recall_at_8"."""
    return isinstance(name, str) and _AT_K.fullmatch(name) is not None


def needed_ranks(name: str, num_right: Tensor, gallery_size: int, max_rank: int | None = None) -> Tensor:
    """Return how many neighbors of each query a metric looks at.

    Args:
        name: Name of the metric.
        num_right: ``(N,)``, int64: right samples in the gallery (R).
        gallery_size: Neighbors that there are.
        max_rank: The largest rank that counts, as in ``query_values``.
    """
    at_k = _AT_K.fullmatch(name)
    if at_k:
        return torch.full_like(num_right, min(int(at_k[2]), gallery_size))
    if name in ("r_precision", "mean_average_precision_at_r"):
        return num_right
    return torch.full_like(num_right, min(max_rank or gallery_size, gallery_size))


def query_values(name: str, right: Tensor, num_right: Tensor, max_rank: int | None = None) -> Tensor:
    """Return a metric of each query, ``(n,)``, float64, 0 to 1.

    Args:
        name: Name of the metric: one of ``RANKED``, or "precision_at_k", "recall_at_k" or "hit_rate_at_k" with a number
            for k.
        right: ``(n, k)``, bool: which of the neighbors, from near to far, are of the query's class; all that
            ``needed_ranks`` says, more do no harm.
        num_right: ``(n,)``, int64, >= 1: right samples in the gallery (R).
        max_rank: Up to which rank "mean_average_precision" and "mean_reciprocal_rank" look. None: to the last.

    Source:
        R-precision and MAP@R: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, section 3.2.
    """
    at_k = _AT_K.fullmatch(name)
    if at_k:
        nearest = right[:, : min(int(at_k[2]), right.shape[1])]
        return nearest.sum(1).double() / float(at_k[2]) if at_k[1] == "precision" else nearest.any(1).double()
    ranks = torch.arange(1, right.shape[1] + 1, device=right.device)
    if name in ("r_precision", "mean_average_precision_at_r"):
        right = right & (ranks <= num_right[:, None])
    elif max_rank is not None:
        right = right[:, :max_rank]
        ranks = ranks[:max_rank]
    if name == "r_precision":
        return right.sum(1).double() / num_right
    if name == "mean_reciprocal_rank":
        first = right.to(torch.uint8).argmax(1)
        return right.any(1).double() / (first + 1)
    precision = right.cumsum(1, dtype=torch.float64).div_(ranks).mul_(right)  # at the ranks of right neighbors
    return precision.sum(1) / num_right
