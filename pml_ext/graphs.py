"""Graphs of samples: complete ones, and those of nearest neighbours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pml_ext.precision import full_precision, upcast_half
from pml_ext.validation import check_batch, check_count, check_mini_batches

__all__ = ["knn_graph"]

_CHUNK_ELEMENTS = 1 << 24  # similarities at a time: 64 MB


@torch.no_grad()
def knn_graph(embeddings: Tensor, k: int, reciprocal: bool = False, batch: Tensor | None = None) -> Tensor:
    """Return edges from each sample's nearest neighbours by cosine to the sample.

    Through faiss for float32 on the CPU, else by products and ``torch.topk`` in chunks.

    Args:
        embeddings: ``(N, D)``, floating point, finite.
        k: Neighbours of each sample, itself not included, >= 1. Fewer where there are fewer samples.
        reciprocal: Whether to keep only the edges of which both ends are neighbours of each other.
        batch: ``(N,)``, sorted integers: the mini-batch of each sample. Neighbours are those of the same mini-batch.

    Returns:
        ``(2, E)``, int64, torch-geometric's ``edge_index``: senders (neighbours), receivers; receivers ascend, and the
        senders of each go from near to far. No self loops.

    Raises:
        TypeError: If ``batch`` is no integer tensor or ``embeddings`` are not floating point.
        ValueError: If a shape or value breaks a rule.

    Examples:
        >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_graph(points, k=1).tolist()
        [[1, 0, 1], [0, 1, 2]]
        >>> knn_graph(points, k=1, reciprocal=True).tolist()
        [[1, 0], [0, 1]]
    """
    check_batch(embeddings)
    check_count("k", k)
    if batch is not None:
        check_mini_batches(batch, len(embeddings))
    unit, edges = unit_embeddings(embeddings), []
    for start, stop in _mini_batches(batch, len(unit)):
        with full_precision(unit.device):
            neighbors = _neighbors(unit[start:stop], min(k, stop - start - 1))  # (n, k)
        receivers = torch.arange(start, stop, device=unit.device).repeat_interleave(neighbors.shape[1])
        edges.append(torch.stack([neighbors.flatten() + start, receivers]))
    edge_index = torch.cat(edges, 1) if edges else torch.empty(2, 0, dtype=torch.long, device=embeddings.device)
    if reciprocal:
        there, back = (a * len(unit) + b for a, b in (edge_index, edge_index.flip(0)))
        edge_index = edge_index[:, torch.isin(there, back)]
    return edge_index


def complete_graph(num_nodes: int, batch: Tensor | None, device: torch.device) -> Tensor:
    """Return the edges between all nodes of each mini-batch, self loops included, ``(2, E)``."""
    if batch is None:
        nodes = torch.arange(num_nodes, device=device)
        return torch.stack([nodes.repeat(num_nodes), nodes.repeat_interleave(num_nodes)])
    sizes = torch.unique_consecutive(batch, return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # of each node's mini-batch
    senders = sizes.repeat_interleave(sizes)  # how many each node has
    receiver = torch.arange(num_nodes, device=batch.device).repeat_interleave(senders)
    first_edge = (senders.cumsum(0) - senders).repeat_interleave(senders)
    sender = torch.arange(len(receiver), device=batch.device) - first_edge + starts.repeat_interleave(senders)
    return torch.stack([sender, receiver])


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """Return rows of length 1, float32 or better."""
    with full_precision(embeddings.device):
        return torch.nn.functional.normalize(upcast_half(embeddings.detach()))


def similarity_chunks(unit: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices of some rows and their similarities to all rows, ``(n, N)``, until all have been there."""
    step = max(1, _CHUNK_ELEMENTS // max(len(unit), 1))
    for rows in torch.split(torch.arange(len(unit), device=unit.device), step):
        yield rows, unit[rows] @ unit.T


def _neighbors(unit: Tensor, k: int) -> Tensor:
    """Return the k rows nearest to each row, itself not included, ``(N, k)``, from near to far."""
    if not k:
        return torch.empty(len(unit), 0, dtype=torch.long, device=unit.device)
    if unit.device.type == "cpu" and unit.dtype == torch.float32:
        import faiss  # here, or every import of the package would load it

        neighbors = torch.from_numpy(faiss.knn(unit.numpy(), unit.numpy(), k + 1, faiss.METRIC_INNER_PRODUCT)[1])
        return without_self(neighbors, torch.arange(len(unit)))
    found = []
    for rows, similarity in similarity_chunks(unit):
        similarity[torch.arange(len(rows), device=unit.device), rows] = -torch.inf
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


def without_self(neighbors: Tensor, rows: Tensor) -> Tensor:
    """Drop each row's own index, or its last entry where equal rows have pushed that out.

    Args:
        neighbors: ``(n, k + 1)``, indices.
        rows: ``(n,)``, the index of each row itself.
    """
    own = neighbors == rows[:, None]
    own[:, -1] |= ~own.any(1)
    return neighbors[~own].view(len(neighbors), -1)


def _mini_batches(batch: Tensor | None, length: int) -> list[tuple[int, int]]:
    if batch is None:
        return [(0, length)] if length else []
    ends = torch.unique_consecutive(batch, return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
