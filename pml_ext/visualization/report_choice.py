"""Which queries and classes a report shows."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pml_ext.evaluation.metrics import METRICS
from pml_ext.visualization.report_comparison import MAX_ROWS
from pml_ext.visualization.report_page import MAX_CLASS_ROWS
from pml_ext.visualization.report_search import Searched

_QUERIES_OF_CLASS = 2
_CLASSES_WITH_PICTURES = 200  # the worst ones; others show names
_CHANGED_WITH_PICTURES = 50  # of the classes that have lost most, and of those that have gained most
_SAME = 1e-9  # metrics that differ by less are equal


class ClassMeans(NamedTuple):
    """How many queries a class has, and the means of their metrics."""

    images: int
    metrics: tuple[float, ...]


class Chosen(NamedTuple):
    """Queries and classes, by their numbers; with one run, nothing has changed."""

    worst: list[int]
    random: list[int]
    better: list[int]  # in this run, by most
    worse: list[int]
    num_changed: tuple[int, int, int]  # queries that are better in this run, worse, and the same
    ranked: list[int]  # all classes with a match, the worst first
    changed: list[int]  # the same, from the largest loss of this run to its largest gain
    detailed: list[int]  # classes that can be opened
    pictured: list[int]  # those that have pictures then
    queries_of: dict[int, list[int]]  # class -> its worst queries


def choose(
    searched: Searched,
    other: Searched | None,
    means: dict[int, ClassMeans],
    other_means: dict[int, ClassMeans],
    of_query: Tensor,
    num_queries: int,
    seed: int,
) -> Chosen:
    """Choose what is shown.

    Args:
        searched: This run.
        other: The other run, or None.
        means: Means of the classes in this run.
        other_means: Means of the classes in the other run; empty if there is none.
        of_query: ``(N,)``, classes.
        num_queries: Number of queries of each kind.
        seed: Seed of what is chosen at random.
    """
    by_score = _worst_first(searched)
    worst = by_score[:num_queries]
    num_changed, better, worse = (0, 0, 0), list[int](), list[int]()
    if other is not None:
        num_changed, better, worse = _changed_queries(searched, other, num_queries, seed)
    ranked = sorted(means, key=lambda code: means[code].metrics[::-1])
    changed = sorted(other_means, key=lambda code: means[code].metrics[2] - other_means[code].metrics[2])
    extreme = changed[: MAX_ROWS // 2] + changed[-MAX_ROWS // 2 :]
    return Chosen(
        worst,
        _random_queries(searched, num_queries, seed, worst),
        better,
        worse,
        num_changed,
        ranked,
        changed,
        list(dict.fromkeys(ranked[:MAX_CLASS_ROWS] + extreme)),
        ranked[:_CLASSES_WITH_PICTURES] + changed[:_CHANGED_WITH_PICTURES] + changed[-_CHANGED_WITH_PICTURES:],
        {
            code: [by_score[i] for i in places]
            for code, places in first_of_each(of_query[by_score].numpy(), _QUERIES_OF_CLASS).items()
        },
    )


def class_means(searched: Searched, of_query: Tensor) -> dict[int, ClassMeans]:
    """Return, for each class with a match, how many queries it has and the means of their metrics."""
    with_match = searched.num_right > 0
    classes, inverse, sizes = torch.unique(of_query[with_match], return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), len(METRICS), dtype=torch.float64).index_add_(
        0, inverse, searched.metrics[with_match]
    )
    means = (sums / sizes[:, None]).tolist()
    return {
        code: ClassMeans(size, tuple(values))
        for code, size, values in zip(classes.tolist(), sizes.tolist(), means, strict=True)
    }


def first_of_each(groups: np.ndarray[Any, Any], limit: int) -> dict[int, list[int]]:
    """Return the positions of the first ``limit`` entries of each group, in their order."""
    by_group = np.argsort(groups, kind="stable")
    values, starts = np.unique(groups[by_group], return_index=True)
    ends = np.append(starts, len(groups))[1:].tolist()
    return {
        value: by_group[start : min(start + limit, end)].tolist()
        for value, start, end in zip(values.tolist(), starts.tolist(), ends, strict=True)
    }


def _worst_first(searched: Searched) -> list[int]:
    """Return all queries with a match, by AP@R, then those first whose neighbor looks most certain."""
    scores, certain = searched.metrics[:, 2].tolist(), searched.similarity.tolist()
    possible = [i for i, score in enumerate(scores) if math.isfinite(score)]
    return sorted(possible, key=lambda i: (scores[i], -certain[i], i))


def _random_queries(searched: Searched, num_queries: int, seed: int, taken: Sequence[int]) -> list[int]:
    """Return random queries with a match that are not taken yet."""
    order = _shuffled(len(searched.metrics), seed).tolist()
    left_out = set(taken) | set((searched.num_right == 0).nonzero().flatten().tolist())
    return [i for i in order if i not in left_out][:num_queries]


def _changed_queries(
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
