"""Graphs of nearest neighbors."""

import torch
from torch import Tensor

from pml_ext.neighbors.search import search
from pml_ext.neighbors.similarity import unit_embeddings
from pml_ext.validation import check_batch, check_count, check_mini_batches


@torch.no_grad()
def knn_graph(embeddings: Tensor, k: int, batch: Tensor | None = None) -> Tensor:
    """Return a graph with edges from each sample's nearest neighbors by cosine to the sample.

    Neighbors that are equally similar come in their order.

    Args:
        embeddings: ``(N, D)``, floating point, finite.
        k: Neighbors of each sample, itself not included, >= 1. Fewer where there are fewer samples.
        batch: ``(N,)``, sorted integers: the mini-batch of each sample. Neighbors are those of the same mini-batch.

    Returns:
        ``(2, E)``, int64, torch-geometric's ``edge_index``: senders (neighbors), receivers; receivers ascend, and the
        senders of each go from near to far. No self loops.

    Raises:
        TypeError: If ``batch`` is not an integer tensor or ``embeddings`` are not floating point.
        ValueError: If a shape or value breaks a rule.

    Examples:
        >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_graph(points, k=1).tolist()
        [[1, 0, 1], [0, 1, 2]]
    """
    check_batch(embeddings)
    check_count("k", k)
    if batch is not None:
        check_mini_batches(batch, len(embeddings))
    unit, edges = unit_embeddings(embeddings), []
    for start, stop in _mini_batches(batch, len(unit)):
        part, itself = unit[start:stop], torch.arange(stop - start)
        searched = search(part, part, min(k, len(part) - 1), itself)
        neighbors = torch.cat([neighbors for _, neighbors in searched])  # (n, k)
        receivers = torch.arange(start, stop, device=unit.device).repeat_interleave(neighbors.shape[1])
        edges.append(torch.stack([neighbors.flatten() + start, receivers]))
    return torch.cat(edges, 1) if edges else torch.empty(2, 0, dtype=torch.long, device=embeddings.device)


def _mini_batches(batch: Tensor | None, length: int) -> list[tuple[int, int]]:
    if batch is None:
        return [(0, length)] if length else []
    ends = torch.unique_consecutive(batch, return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
