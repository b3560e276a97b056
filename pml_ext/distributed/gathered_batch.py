"""One batch out of the parts of all ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml_ext.distributed.collectives import Group, gather_numbers, gather_rows, rank_in
from pml_ext.types import Indices

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Part(NamedTuple):
    """What one rank contributes: embeddings with or without labels."""

    embeddings: Tensor
    labels: Tensor | None


class Gathered(NamedTuple):
    """The rows of all ranks in rank order."""

    embeddings: Tensor  # own rows carry the graph
    labels: Tensor | None
    sizes: list[int]
    rank: int

    def own_first(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows as PML orders them: own rows, then those of the other ranks."""
        order = self._order(self.embeddings.device)
        return self.embeddings[order], None if self.labels is None else self.labels[order]

    def to_rank_order(self, indices: Tensor) -> Tensor:
        """Return where rows, counted with own rows first, lie in rank order."""
        return self._order(indices.device)[indices]

    def to_own_first(self, indices: Tensor) -> Tensor:
        """Return where rows, counted in rank order, lie with own rows first."""
        return self._order(indices.device).argsort()[indices]

    def _order(self, device: torch.device) -> Tensor:
        rows = torch.split(torch.arange(sum(self.sizes), device=device), self.sizes)
        others = [part for rank, part in enumerate(rows) if rank != self.rank]
        return torch.cat([rows[self.rank], *others])


class ScaleGradient(torch.autograd.Function):
    """Multiply the gradient by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def agree(
    parts: Sequence[Part | None], error: Exception | None, seed: int, group: Group, given: dict[str, bool] | None = None
) -> tuple[list[list[int]], int]:
    """Tell all ranks of sizes, seed and errors, so that no rank waits for one that has stopped.

    Args:
        parts: The batch, and the references or None.
        error: What is wrong with this rank's input, if anything is.
        seed: The first rank's is taken.
        group: The ranks.
        given: What must hold on all ranks or on none, by name.

    Returns:
        The numbers of rows of each rank, for each part; the seed.

    Raises:
        ValueError: If this or another rank was given bad input, or ranks differ in width, dtype or arguments.
    """
    given = given or {}
    numbers = [0 if error is None else 1, seed, sum(2**i for i, here in enumerate(given.values()) if here)]
    for part in parts:
        numbers += _describe(part, error)
    found = gather_numbers(numbers, group)
    _raise_everywhere(error, [row[0] for row in found])
    for rank, row in enumerate(found):
        for i, name in enumerate(given):
            if (row[2] ^ numbers[2]) >> i & 1:
                raise ValueError(f"{name} on all ranks or on none, got another choice on rank {rank}")
        for i, name in enumerate(("embeddings", "ref_emb")[: len(parts)]):
            own, theirs = numbers[4 + 4 * i : 7 + 4 * i], row[4 + 4 * i : 7 + 4 * i]
            if own != theirs:
                raise ValueError(
                    f"{name} must have one width and dtype on all ranks, and labels on all or none, got "
                    f"{_name(own)} here and {_name(theirs)} on rank {rank}"
                )
    return [[row[3 + 4 * i] for row in found] for i in range(len(parts))], found[0][1]


def confirm(error: Exception | None, number: int, group: Group) -> list[int]:
    """Tell all ranks whether something has gone wrong on one, and a number.

    Returns:
        The number of each rank.

    Raises:
        ValueError: If something has gone wrong on another rank; on that rank, what it is.
    """
    found = gather_numbers([0 if error is None else 1, number], group)
    _raise_everywhere(error, [row[0] for row in found])
    return [row[1] for row in found]


def _raise_everywhere(error: Exception | None, failed: list[int]) -> None:
    if error is not None:
        raise error
    if any(failed):
        rank = failed.index(1)
        raise ValueError(f"all ranks must be given a valid batch, got an error on rank {rank}, which tells what")


def gather(part: Part, sizes: list[int], group: Group, gradient_factor: float, name: str) -> Gathered:
    """Return the rows of all ranks, own rows with the graph and their gradient multiplied."""
    rank = rank_in(group)
    rows = gather_rows(part.embeddings, sizes, group, name)
    rows[rank] = ScaleGradient.apply(part.embeddings, gradient_factor)
    labels = None
    if part.labels is not None:
        own = part.labels.to(part.embeddings.device, torch.int64)
        labels = torch.cat(gather_rows(own, sizes, group, "labels"))
    return Gathered(torch.cat(rows), labels, sizes, rank)


def checksum(indices_tuple: Indices) -> int:
    """Return a number that tells tuples of indices apart, whatever the order of their pairs or triplets."""
    triplets = len(indices_tuple) == 3
    total = len(indices_tuple)
    for together in (indices_tuple,) if triplets else (indices_tuple[:2], indices_tuple[2:]):
        mixed = torch.zeros_like(together[0], dtype=torch.int64)
        for x in together:  # integers that wrap around
            mixed = (mixed + x.long() + 1) * 6364136223846793005 + 1442695040888963407
            mixed = mixed ^ (mixed >> 29)
        total = (total * 31 + int(mixed.sum())) % 2**62
    return total


def _describe(part: Part | None, error: Exception | None) -> list[int]:
    if part is None or error is not None:
        return [0, 0, 0, 0]
    dtype = part.embeddings.dtype
    code = 1 + _DTYPES.index(dtype) if dtype in _DTYPES else 0
    return [len(part.embeddings), part.embeddings.shape[1], code, 1 if part.labels is None else 2]


def _name(numbers: list[int]) -> str:
    width, code, labels = numbers
    if not labels:
        return "none"
    dtype = _DTYPES[code - 1] if code else "another dtype"
    return f"width {width}, {dtype}, {'labels' if labels == 2 else 'no labels'}"
