"""Exact search for the nearest other rows of each row."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from pml_ext.neighbors.similarity import similarity_chunks

_ROWS_AT_ONCE = 4096  # as faiss itself
_NEIGHBORS_AT_ONCE = 1 << 24  # 200 MB


def nearest_others(
    embeddings: Tensor, k: int, parts: int | None = None, progress: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Search all rows among all others by squared distance, as PML does: by faiss, in float32, on the CPU.

    Ties and near-ties come out as in PML's ``AccuracyCalculator``, and so do metrics computed from them. For rows of
    length 1 the order is that of cosines, but for rounding.

    Args:
        embeddings: ``(N, D)``, float32, on the CPU.
        k: Neighbours of each row, itself not included, 1 to N - 1.
        parts: How many parts of about one size the rows are searched in, >= 1; memory is that of a part's neighbours.
            None: as many as keep that below 200 MB.
        progress: Whether to show a progress bar.

    Yields:
        The indices of some rows, ``(n,)``, and their neighbours from near to far, ``(n, k)``, until all rows have been
        there, in their order.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [3.0]])
        >>> [(rows.tolist(), neighbors.tolist()) for rows, neighbors in nearest_others(points, k=1, parts=2)]
        [([0, 1], [[1], [0]]), ([2], [[1]])]
    """
    import faiss  # on use: only some of the package searches

    index = faiss.IndexFlatL2(embeddings.shape[1])
    index.add(embeddings.numpy())
    if parts is None:  # of one size, since faiss rounds differently for fewer than 20 queries
        parts = math.ceil(len(embeddings) / max(_ROWS_AT_ONCE, _NEIGHBORS_AT_ONCE // (k + 1)))
    split = torch.tensor_split(torch.arange(len(embeddings)), parts)
    for rows in tqdm(split, desc="neighbours", disable=not progress):
        yield rows, _without_self(torch.from_numpy(index.search(embeddings[rows].numpy(), k + 1)[1]), rows)


def nearest_by_cosine(unit: Tensor, k: int) -> Tensor:
    """Return the k rows most similar to each row, itself not included, ``(N, k)``, from near to far.

    Through faiss for float32 on the CPU, else by products and ``torch.topk`` in chunks.

    Args:
        unit: ``(N, D)``, rows of length 1.
        k: 0 to N - 1.
    """
    if not k:
        return torch.empty(len(unit), 0, dtype=torch.long, device=unit.device)
    if unit.device.type == "cpu" and unit.dtype == torch.float32:
        import faiss  # on use: only some of the package searches

        neighbors = torch.from_numpy(faiss.knn(unit.numpy(), unit.numpy(), k + 1, faiss.METRIC_INNER_PRODUCT)[1])
        return _without_self(neighbors, torch.arange(len(unit)))
    nearest = []
    for rows, similarity in similarity_chunks(unit):
        similarity[torch.arange(len(rows), device=unit.device), rows] = -torch.inf
        nearest.append(similarity.topk(k, dim=1).indices)
    return torch.cat(nearest)


def _without_self(neighbors: Tensor, rows: Tensor) -> Tensor:
    """Drop each row's own index, or its last entry where equal rows have pushed that out.

    Args:
        neighbors: ``(n, k + 1)``, indices.
        rows: ``(n,)``, the index of each row itself.
    """
    own = neighbors == rows[:, None]
    own[:, -1] |= ~own.any(1)
    return neighbors[~own].view(len(neighbors), -1)
