"""Exact search for the nearest rows of a gallery, in chunks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pml_ext.precision import full_precision, upcast_half

_SIMILARITIES_AT_ONCE = 1 << 24  # 64 MB
_NEIGHBORS_AT_ONCE = 1 << 21  # 16 MB
_KEYS_AT_ONCE = 1 << 20  # 8 MB
_TILE = 1 << 16  # gallery rows that are compared at once
_BLOCK = 64  # similarities of which only the largest is looked at first


@torch.no_grad()
def search(
    queries: Tensor,
    gallery: Tensor,
    k: int | Tensor,
    own: Tensor | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the nearest gallery rows of each query by Euclidean distance, a chunk of queries at a time.

    Rows that lie equally near come in the order of their indices. Distances are compared by
    ``x @ y - |y|^2 / 2``, computed in float32 (in float64 where queries are of that type): for rows of length 1 this is
    the order of cosines. Memory beyond the embeddings is that of one chunk.

    Args:
        queries: ``(N, D)``, floating point, finite.
        gallery: ``(M, D)``, of the same dtype and device.
        k: Neighbours of each query, 0 to M (M - 1 with ``own``); or ``(N,)``, a number for each, int64 on the CPU:
            queries that want about as many are then searched together.
        own: ``(N,)``, int64: the gallery row that is the query itself, which is never its neighbour.
        chunk_size: Queries at a time, >= 1. None: so many that their similarities and neighbours take about 200 MB.
        progress: Whether to show a progress bar.

    Yields:
        Indices of some queries, ``(n,)``, and their neighbours from near to far, ``(n, k)``, k being the largest of
        the chunk; both int64, on the device of the queries. Each query comes once: in order where k is a number.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [3.0]])
        >>> chunks = search(points, points, k=1, own=torch.arange(3), chunk_size=2)
        >>> [(rows.tolist(), neighbors.tolist()) for rows, neighbors in chunks]
        [([0, 1], [[1], [0]]), ([2], [[1]])]
    """
    depths = torch.full((len(queries),), k) if isinstance(k, int) else k
    order = torch.arange(len(queries)) if isinstance(k, int) else torch.argsort(depths, stable=True)
    half_norms = torch.cat([upcast_half(part).square().sum(1) / 2 for part in torch.split(gallery, 1 << 14)])  # (M,)
    with tqdm(total=len(queries), desc="searching", disable=not progress) as bar, _Smallest(gallery.device) as smallest:
        done = 0
        while done < len(queries):
            chunk = order[done : done + (chunk_size or _chunk_size(depths, order, done, len(gallery)))]
            rows, depth = chunk.to(queries.device), int(depths[chunk[-1]])
            itself = None if own is None else own.to(queries.device)[rows]
            with full_precision(queries.device):
                yield rows, _nearest(upcast_half(queries[rows]), gallery, half_norms, depth, itself, smallest)
            done += len(chunk)
            bar.update(len(chunk))


def _chunk_size(depths: Tensor, order: Tensor, done: int, num_rows: int) -> int:
    """Return how many of the next queries fit: their number of neighbours grows, and that of the last counts."""
    size = max(1, _SIMILARITIES_AT_ONCE // min(num_rows, _TILE))
    while size > 1:
        depth = int(depths[order[min(done + size, len(order)) - 1]])
        if size * depth <= _NEIGHBORS_AT_ONCE:
            break
        size //= 2
    return size


def _nearest(
    queries: Tensor, gallery: Tensor, half_norms: Tensor, k: int, own: Tensor | None, smallest: "_Smallest"
) -> Tensor:
    """Return the k nearest gallery rows, ``(n, k)``."""
    if not k:
        return torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    if queries.dtype == torch.float64:  # a float64 and an index do not fit into a key
        similarity = torch.addmm(half_norms, queries, gallery.T, beta=-1)  # (n, M)
        _leave_out(similarity, own, 0)
        return similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
    best = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    start = 0
    for tile, norms in zip(
        *(torch.tensor_split(x, -(-len(gallery) // _TILE)) for x in (gallery, half_norms)), strict=True
    ):
        similarity = torch.addmm(norms, queries, upcast_half(tile).T, beta=-1)  # (n, T)
        _leave_out(similarity, own, start)
        keys = smallest.of_similarity(similarity, k, start)
        best = keys if not start else smallest.of_keys(torch.cat([best, keys], 1), k)
        start += len(tile)
    return best & 0xFFFFFFFF


def _leave_out(similarity: Tensor, own: Tensor | None, start: int) -> None:
    """Put each query's own row behind all others, if it is among the columns, the first of which is row ``start``."""
    if own is None:
        return
    column = own - start
    (inside,) = torch.nonzero((column >= 0) & (column < similarity.shape[1]), as_tuple=True)
    similarity[inside, column[inside]] = -torch.inf


class _Smallest:
    """The k smallest keys of each row, sorted; a key holds a similarity, the largest first, and an index below it."""

    def __init__(self, device: torch.device) -> None:
        self.on_cpu = device.type == "cpu"
        self.pool = ThreadPoolExecutor(torch.get_num_threads())

    def __enter__(self) -> "_Smallest":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def of_similarity(self, similarity: Tensor, k: int, start: int) -> Tensor:
        """Return the keys of the k most similar columns (all, where there are fewer), ``(n, k)``.

        Args:
            similarity: ``(n, T)``, float32.
            k: >= 1.
            start: Index of the first column.
        """
        width = similarity.shape[1]
        if width > 4 * _BLOCK * k:
            # The k best columns lie in the k blocks with the best columns: what is in another is behind all of theirs.
            blocks = torch.nn.functional.pad(similarity, (0, -width % _BLOCK), value=-torch.inf)
            blocks = blocks.view(len(similarity), -1, _BLOCK)
            block = self.of_similarity(blocks.amax(2), k, 0) & 0xFFFFFFFF  # (n, k)
            rows = torch.arange(len(similarity), device=similarity.device)[:, None]
            columns = block[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=similarity.device)
            keys = _keys(blocks[rows, block].flatten(1), columns.flatten(1) + start)
            return self.of_keys(keys, k)
        columns, rows_at_once = (
            torch.arange(start, start + width, device=similarity.device),
            max(1, _KEYS_AT_ONCE // width),
        )
        return torch.cat([self.of_keys(_keys(part, columns), k) for part in torch.split(similarity, rows_at_once)])

    def of_keys(self, keys: Tensor, k: int) -> Tensor:
        """Return the k smallest of each row, sorted."""
        k = min(k, keys.shape[1])
        if not self.on_cpu:
            return keys.topk(k, dim=1, largest=False).values
        parts = keys.tensor_split(torch.get_num_threads() if keys.numel() > _KEYS_AT_ONCE // 16 else 1)
        return torch.from_numpy(np.concatenate(list(self.pool.map(lambda part: _smallest(part.numpy(), k), parts))))


def _keys(similarity: Tensor, columns: Tensor) -> Tensor:
    """Return int64 numbers in the order of similarities from large to small; of columns, where those are equal."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: no -0.0
    descending = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return descending.long().bitwise_left_shift_(32).bitwise_or_(columns)


def _smallest(keys: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    if k < keys.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    return np.sort(keys, axis=1)
