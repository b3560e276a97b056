"""A walk over many proxies, a chunk at a time, in buffers that stay in the cache; some may be elsewhere."""

from collections.abc import Callable, Iterator
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from pml_ext.streaming.gradients import along_unit, inverse_norm
from pml_ext.validation import check_batch, check_embeddings, check_integers

_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # numbers in a block: 1 MB, about a core's cache, and 32 MB
_SMALLEST = 512  # below, the calls cost more than the cache saves


class Shard(NamedTuple):
    """Which classes are here, and how to add up what all shards have found.

    Attributes:
        first: The first class that is here.
        num_classes: How many there are in all.
        sum: Returns the sum over all shards of a tensor that each has.
        max: The largest such number, in the same way.
    """

    first: int
    num_classes: int
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


def rows_here(table: Tensor, labels: Tensor, shard: Shard | None) -> Tensor:
    """Return the rows of a table that belong to labels, ``(B, ...)``; zeros for classes that are elsewhere.

    Args:
        table: ``(n, ...)``, the rows of the classes that are here.
        labels: ``(B,)``, int64, of all classes.
        shard: None: all classes are here.
    """
    if shard is None:
        return table[labels]
    here = labels - shard.first
    inside = (here >= 0) & (here < len(table))
    rows = table.new_zeros(len(labels), *table.shape[1:])
    rows[inside] = table[here[inside]]
    return rows


def rows_of(table: Tensor, labels: Tensor, shard: Shard | None) -> Tensor:
    """Return the rows that belong to labels, ``(B, ...)``, from whatever shard has them."""
    rows = rows_here(table, labels, shard)
    return rows if shard is None else shard.sum(rows)


class Chunk(NamedTuple):
    """Some consecutive proxies.

    Attributes:
        start: The first one's class.
        stop: The last one's class + 1.
        rows: ``(n, D)``, in the dtype of the walk, of unit length if the walk normalizes. Valid until the next chunk.
        inverse: 1 / |proxy|, ``(n, 1)``, if the walk normalizes.
        samples: The samples of these classes, ``(m,)``, or None if there are none.
        columns: Their classes - start, ``(m,)``; of no meaning without samples.
    """

    start: int
    stop: int
    rows: Tensor
    inverse: Tensor | None
    samples: Tensor | None
    columns: Tensor


class ProxyChunks:
    """The proxies in chunks, each with the samples of its classes.

    Args:
        proxies: ``(C, D)``, floating point.
        labels: ``(B,)``, int64, on the same device.
        normalize: Whether to scale proxies to length 1.
        dtype: What to compute in.
        chunk_size: Proxies in a chunk. None: as many as keep a block of ``(B, n)`` or ``(n, D)`` in the cache.
        shard: Which classes the proxies are. None: all.

    Raises:
        ValueError: If ``chunk_size`` is not an integer >= 1.
    """

    def __init__(
        self,
        proxies: Tensor,
        labels: Tensor,
        normalize: bool,
        dtype: torch.dtype,
        chunk_size: int | None = None,
        shard: Shard | None = None,
    ) -> None:
        check_chunk_size(chunk_size)
        self.all_here = shard is None
        self.labels = labels if shard is None else labels - shard.first  # outside 0 to C - 1: elsewhere
        self.proxies, self.dtype = proxies, dtype
        size = chunk_size or auto_chunk_size(len(labels), proxies.shape[1], proxies.device)
        self.size = max(1, min(size, len(proxies)))
        self._block = proxies.new_empty(len(labels) * self.size, dtype=dtype)
        self._rows = proxies.new_empty(self.size, proxies.shape[1], dtype=dtype) if normalize else None

    def block(self, chunk: Chunk) -> Tensor:
        """Return memory for one number for each sample and proxy, ``(B, n)``; the same for every chunk."""
        n = chunk.stop - chunk.start
        return self._block[: len(self.labels) * n].view(len(self.labels), n)

    def __iter__(self) -> Iterator[Chunk]:
        num_classes = len(self.proxies)
        if self.size == num_classes and self.all_here:  # a small problem: nothing to look up
            cuts, order = [0, len(self.labels)], None
        else:
            in_order, order = self.labels.sort()
            starts = torch.arange(0, num_classes + self.size, self.size, device=in_order.device)
            cuts = torch.searchsorted(in_order, starts.clamp_max_(num_classes)).tolist()
        for i, start in enumerate(range(0, num_classes, self.size)):
            rows = self.proxies[start : start + self.size].to(self.dtype)
            inverse = samples = None
            columns = self.labels
            if self._rows is not None:
                inverse = inverse_norm(rows)
                rows = torch.mul(rows, inverse, out=self._rows[: len(rows)])
            if order is None:
                samples = torch.arange(len(self.labels), device=self.labels.device)
            elif cuts[i] < cuts[i + 1]:
                samples = order[cuts[i] : cuts[i + 1]]
                columns = self.labels[samples] - start
            yield Chunk(start, start + len(rows), rows, inverse, samples, columns)


def auto_chunk_size(batch_size: int, width: int, device: torch.device) -> int:
    """Return how many proxies keep the blocks of a chunk in the cache."""
    return max(_SMALLEST, auto_block(device) // max(batch_size, width, 1))


def auto_block(device: torch.device) -> int:
    """Return how many numbers of float32 stay in the cache, with what else is looked at."""
    return _BLOCK.get(device.type, _BLOCK["cuda"])


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise if ``chunk_size`` is neither None nor an integer >= 1.

    Raises:
        ValueError: Then.
    """
    if chunk_size is not None and (
        not isinstance(chunk_size, Integral) or isinstance(chunk_size, bool) or chunk_size < 1
    ):
        raise ValueError(f"chunk_size must be None or an integer >= 1, got {chunk_size!r}")


def check_memory(memory: int) -> None:
    """Raise if ``memory`` is not a number of bytes.

    Raises:
        ValueError: If it is not an integer >= 0.
    """
    if not isinstance(memory, Integral) or isinstance(memory, bool) or memory < 0:
        raise ValueError(f"memory must be an integer >= 0, in bytes, got {memory!r}")


def check_walk(embeddings: Tensor, proxies: Tensor, labels: Tensor, shard: Shard | None) -> None:
    """Check what a walk over proxies is given, as the losses check it.

    Args:
        embeddings: ``(B, D)``, floating point, finite.
        proxies: ``(C, D)``, floating point, on the device of the embeddings.
        labels: ``(B,)``, integers in 0 to C - 1, or of a shard to the number of all classes - 1.
        shard: Which classes the proxies are. None: all.

    Raises:
        TypeError: If a tensor has the wrong type or dtype.
        ValueError: If a shape or a value breaks a rule.
    """
    check_embeddings("proxies", proxies)
    check_integers("labels", labels)
    num_classes = len(proxies) if shard is None else shard.num_classes
    check_batch(embeddings, labels, num_classes=num_classes, embedding_size=proxies.shape[1])
    if proxies.device != embeddings.device:
        raise ValueError(f"proxies must be on the device of embeddings, {embeddings.device}, got {proxies.device}")


def write_gradient(grad: Tensor, chunk: Chunk, out: Tensor) -> None:
    """Write the gradient by a chunk's proxies to its place.

    Args:
        grad: The gradient by ``chunk.rows``; changed.
        chunk: The chunk.
        out: The gradient by all proxies, ``(C, D)``, of the same dtype.
    """
    out = out[chunk.start : chunk.stop]
    if chunk.inverse is None:
        out.copy_(grad)
        return
    grad.addcmul_(chunk.rows, along_unit(grad, chunk.rows, chunk.inverse), value=-1)  # as through_norm, in place
    torch.mul(grad, chunk.inverse, out=out)  # the only pass over memory that is not in the cache
