"""Neighbors that have each other among theirs, as in re-ranking."""

import torch
from torch import Tensor

from pml_ext.neighbors.search import search
from pml_ext.neighbors.similarity import similarity_chunks
from pml_ext.precision import full_precision


@torch.no_grad()
def neighbor_groups(unit: Tensor, k1: int, size: int) -> Tensor:
    """Return each item, then its k-reciprocal neighbors and others, each from near to far, ``(N, size)``.

    Args:
        unit: ``(N, D)``, rows of length 1.
        k1: Length of the lists of neighbors, as in ``refine_with_neighbors``.
        size: Items in a group, as in ``refine_with_neighbors``; fewer if there are fewer items.

    Examples:
        >>> unit = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
        >>> neighbor_groups(unit, k1=1, size=2).tolist()
        [[0, 1], [1, 0], [2, 1]]
    """
    with full_precision(unit.device):
        return _neighbor_groups(unit, k1, size)


def _neighbor_groups(unit: Tensor, k1: int, size: int) -> Tensor:
    items = torch.arange(len(unit), device=unit.device)
    searched = search(unit, unit, min(k1, len(unit) - 1), items)
    nearest = torch.cat(
        [items[:, None], torch.cat([neighbors for _, neighbors in searched])], 1
    )  # the item itself first
    half = nearest[:, : round(k1 / 2) + 1]  # lists include the item itself
    is_mutual, is_half_mutual = _is_mutual(nearest), _is_mutual(half)
    groups = []
    for rows, similarity in similarity_chunks(unit):
        member = torch.zeros_like(similarity, dtype=torch.bool)  # (n, N): who is a k-reciprocal neighbor
        _mark(member, nearest[rows], is_mutual[rows])
        own = member.clone()
        for column in range(nearest.shape[1]):
            neighbor = nearest[rows, column]
            theirs, mutual = half[neighbor], is_half_mutual[neighbor]  # (n, h)
            shared = (own.gather(1, theirs) & mutual).sum(1)
            overlaps = is_mutual[rows, column] & (3 * shared > 2 * mutual.sum(1))
            _mark(member, theirs, mutual & overlaps[:, None])
        score = similarity.double() + 4 * member  # neighbors first, then the others, each from near to far
        groups.append(_nearest(score, rows, size))
    return torch.cat(groups)


def _nearest(similarity: Tensor, rows: Tensor, k: int) -> Tensor:
    """Return the k most similar of each row, the row itself first."""
    similarity[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return similarity.topk(min(k, similarity.shape[1]), dim=1).indices


def _is_mutual(nearest: Tensor) -> Tensor:
    """Return which neighbors have the item among theirs, ``(N, k)``."""
    items = torch.arange(len(nearest), device=nearest.device)[:, None]
    return torch.stack([(nearest[column] == items).any(1) for column in nearest.T], 1)


def _mark(member: Tensor, indices: Tensor, which: Tensor) -> None:
    """Set the marked ones of some indices of each row to True."""
    rows = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices)
    member[rows[which], indices[which]] = True
