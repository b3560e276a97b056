"""Exact search for the nearest rows of a gallery, in chunks."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from pml_ext.precision import full_precision, upcast_half

_DISTANCES_AT_ONCE = 1 << 24  # 64 MB
_NEIGHBORS_AT_ONCE = 1 << 21  # 16 MB
_KEYS_AT_ONCE = 1 << 19  # 4 MB
_ROWS_AT_ONCE = 1 << 14
_TILE = 1 << 16  # gallery rows that are compared at once
_INDEX = (1 << 32) - 1  # the lower half of a key
_LOW = int(sys.byteorder == "big")  # where the lower half of an int32 lies
_BLOCK = 64  # distances of which only the smallest is looked at first
_ALIKE = 192  # rows by a multiple of which the kernels of BLAS (8 to 64 wide) go on without a remainder


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
    ``|y|^2 / 2 - x @ y``, computed in float32 (in float64 where queries are of that type): for rows of length 1 this is
    the order of cosines. Memory beyond the embeddings is that of one chunk. Rows that lie far from 0, compared with
    their distances, are moved there first, which rounding would hide otherwise; then a copy of the
    gallery is added, in the type of the comparison.

    Args:
        queries: ``(N, D)``, floating point, finite.
        gallery: ``(M, D)``, of the same dtype and device.
        k: Neighbors of each query, 0 to M (M - 1 with ``own``); or ``(N,)``, a number for each, int64 on the CPU:
            queries that want about as many are then searched together, and those with -1 not at all.
        own: ``(N,)``, int64: the gallery row that is the query itself, which is never its neighbor.
        chunk_size: Queries at a time, >= 1. None: so many that their distances and neighbors take about 200 MB.
        progress: Whether to show a progress bar.

    Yields:
        Indices of some queries, ``(n,)``, and their neighbors from near to far, ``(n, k)``, k being the largest of
        the chunk; both int64, on the device of the queries. Each query comes once, in order where k is a number.

    Examples:
        >>> points = torch.tensor([[0.0], [1.0], [3.0]])
        >>> chunks = search(points, points, k=1, own=torch.arange(3), chunk_size=2)
        >>> [(rows.tolist(), neighbors.tolist()) for rows, neighbors in chunks]
        [([0, 1], [[1], [0]]), ([2], [[1]])]
    """
    depths = torch.full((len(queries),), k) if isinstance(k, int) else k
    order = torch.arange(len(queries)) if isinstance(k, int) else torch.argsort(depths, stable=True)
    order = order[int((depths < 0).sum()) :]
    half_norms = _half_norms(gallery)
    center = _far_center(gallery, half_norms)
    if center is not None:
        moved = torch.empty(gallery.shape, dtype=center.dtype, device=gallery.device)
        for start, part in zip(range(0, len(gallery), _ROWS_AT_ONCE), _parts(gallery), strict=True):
            torch.sub(part, center, out=moved[start : start + len(part)])
        gallery = moved
        half_norms = _half_norms(gallery)
    with tqdm(total=len(order), desc="searching", disable=not progress) as bar, _Smallest(gallery.device) as smallest:
        done = 0
        while done < len(order):
            chunk = order[done : done + (chunk_size or _chunk_size(depths, order, done, len(gallery)))]
            rows, depth = chunk.to(queries.device), int(depths[chunk[-1]])
            itself = None if own is None else own.to(queries.device)[rows]
            asked = upcast_half(queries[rows])
            with full_precision(queries.device):
                asked = asked if center is None else asked - center
                neighbors = _nearest(asked, gallery, half_norms, depth, itself, smallest)
            yield rows, neighbors
            done += len(chunk)
            bar.update(len(chunk))


def _parts(gallery: Tensor) -> Iterator[Tensor]:
    return map(upcast_half, torch.split(gallery, _ROWS_AT_ONCE))


def _half_norms(gallery: Tensor) -> Tensor:
    """Return half of the squared length of each row, ``(M,)``."""
    return torch.cat([x.square().sum(1) / 2 for x in _parts(gallery)])


def _far_center(gallery: Tensor, half_norms: Tensor) -> Tensor | None:
    """Return the mean of rows whose offset is ten times as long as what they differ by, or longer; else None.

    It is rounded to a power of two that is not above their spread: what was equally far stays so, as whole numbers are.
    """
    if not len(gallery):
        return None
    mean = torch.stack([x.sum(0) for x in _parts(gallery)]).sum(0) / len(gallery)
    if not mean.square().sum() > 0.99 * 2 * half_norms.mean():  # also where a square is too large for the type
        return None
    spread = torch.stack([(x - mean).square().sum() for x in _parts(gallery)]).sum().div(gallery.numel()).sqrt()
    step = 2.0 ** spread.log2().floor()
    return (mean / step).round() * step if step > 0 else mean


def _chunk_size(depths: Tensor, order: Tensor, done: int, num_rows: int) -> int:
    """Return how many of the next queries fit: their number of neighbors grows, and that of the last counts."""
    size = max(1, _DISTANCES_AT_ONCE // min(num_rows, _TILE))
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
        distance = _distances(queries, gallery, half_norms)
        _leave_out(distance, own, 0)
        return distance.sort(dim=1, stable=True).indices[:, :k]
    tile = -(-max(_TILE, 8 * k) // _ALIKE) * _ALIKE
    best = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), tile):
        distance = _distances(queries, gallery[start : start + tile], half_norms[start : start + tile])
        _leave_out(distance, own, start)
        if smallest.on_cpu and len(gallery) <= min(tile, 4 * _BLOCK * k):
            return smallest.sorted_columns(distance, k)
        best = torch.cat([best, smallest.of_distances(distance, k, start)], 1)
    return smallest.of_keys(best, k, in_order=True) & _INDEX


def _distances(queries: Tensor, gallery: Tensor, half_norms: Tensor) -> Tensor:
    """Return ``(n, T)`` squared distances, halved, without what only the query gives.

    Equal rows of the gallery get equal numbers. A product rounds rows otherwise in a remainder that its kernels handle
    apart, or with a single vector: so rows are filled up.
    """
    if len(queries) == 1:
        return _distances(queries.repeat(2, 1), gallery, half_norms)[:1]
    distance = queries.new_empty(len(queries), len(gallery))
    end = len(gallery) // _ALIKE * _ALIKE
    torch.addmm(half_norms[:end], queries, upcast_half(gallery[:end]).T, alpha=-1, out=distance[:, :end])
    missing = -len(gallery) % _ALIKE
    if missing:
        rows, norms = functional.pad(upcast_half(gallery[end:]), (0, 0, 0, missing)), half_norms[end:]
        last = torch.addmm(functional.pad(norms, (0, missing)), queries, rows.T, alpha=-1)
        distance[:, end:] = last[:, : len(norms)]
    return distance


def _leave_out(distance: Tensor, own: Tensor | None, start: int) -> None:
    """Put each query's own row behind all others, if it is among the columns, the first of which is row ``start``."""
    if own is None:
        return
    column = own - start
    (inside,) = torch.nonzero((column >= 0) & (column < distance.shape[1]), as_tuple=True)
    distance[inside, column[inside]] = torch.inf


class _Smallest:
    """The k smallest keys of each row; a key holds a distance, and an index below it."""

    def __init__(self, device: torch.device) -> None:
        self.on_cpu = device.type == "cpu"
        self.pool = ThreadPoolExecutor(torch.get_num_threads())

    def __enter__(self) -> "_Smallest":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def of_distances(self, distance: Tensor, k: int, start: int) -> Tensor:
        """Return the keys of the k nearest columns (all, where there are fewer), ``(n, k)``, in any order.

        Args:
            distance: ``(n, T)``, float32; -0.0 becomes 0.0 in it.
            k: >= 1.
            start: Index of the first column.
        """
        width = distance.shape[1]
        columns = torch.arange(start, start + width, device=distance.device)
        if width <= 4 * _BLOCK * k:
            parts = torch.split(distance, max(1, _KEYS_AT_ONCE // width))
            return torch.cat([self.of_keys(_keys(part, columns), k) for part in parts])
        # The k best columns lie in the k blocks with the best columns: what is in another is behind all of theirs.
        end = width // _BLOCK * _BLOCK
        blocks = distance[:, :end].view(len(distance), -1, _BLOCK)
        block = self.of_distances(blocks.amin(2), k, 0) & _INDEX  # (n, k)
        rows = torch.arange(len(distance), device=distance.device)[:, None]
        candidates = columns[:end].view(-1, _BLOCK)[block]  # (n, k, block)
        keys = _keys(blocks[rows, block].flatten(1), candidates.flatten(1))
        return self.of_keys(torch.cat([keys, _keys(distance[:, end:], columns[end:])], 1), k)

    def sorted_columns(self, distance: Tensor, k: int) -> Tensor:
        """Return the k nearest columns, ``(n, k)``, from near to far: faster than keys where k is a large part.

        Args:
            distance: ``(n, T)``, float32, on the CPU.
            k: 1 to T.
        """
        columns = np.empty((len(distance), k), dtype=np.int64)
        parts = (np.array_split(x, torch.get_num_threads()) for x in (distance.numpy(), columns))
        list(self.pool.map(_sort_columns, *parts))
        return torch.from_numpy(columns)

    def of_keys(self, keys: Tensor, k: int, in_order: bool = False) -> Tensor:
        """Return the k smallest of each row, from small to large if asked for."""
        k = min(k, keys.shape[1])
        if not self.on_cpu:
            return keys.topk(k, dim=1, largest=False, sorted=in_order).values
        parts = keys.tensor_split(torch.get_num_threads() if keys.numel() > _KEYS_AT_ONCE // 16 else 1)
        chosen = self.pool.map(lambda part: _smallest(part.numpy(), k, in_order), parts)
        return torch.from_numpy(np.concatenate(list(chosen)))


def _keys(distance: Tensor, columns: Tensor) -> Tensor:
    """Return int64 numbers in the order of distances and, where those are equal, of columns."""
    bits = distance.add_(0.0).view(torch.int32)  # no -0.0
    ascending = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # as floats are; negative ones descend
    return ascending.long().bitwise_left_shift_(32).bitwise_or_(columns)


def _sort_columns(distance: np.ndarray[Any, Any], columns: np.ndarray[Any, Any]) -> None:
    """Write the nearest columns of each row, found by two stable sorts of 16 bits: radix sorts in NumPy."""
    for row, out in zip(distance, columns, strict=True):
        bits = (row + np.float32(0)).view(np.int32)  # in the order of floats, as in ``_keys``
        bits ^= bits >> 31 & 0x7FFFFFFF
        low, high = bits.view(np.uint16)[_LOW::2], bits.view(np.int16)[1 - _LOW :: 2]
        order = low.argsort(kind="stable")
        out[:] = order[high[order].argsort(kind="stable")[: len(out)]]


def _smallest(keys: np.ndarray[Any, Any], k: int, in_order: bool) -> np.ndarray[Any, Any]:
    if k < keys.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    return np.sort(keys, axis=1) if in_order else keys
