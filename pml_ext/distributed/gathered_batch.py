"""One batch out of the parts of all ranks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pml_ext.distributed.collectives import Group, gather_numbers, gather_rows, rank_in
from pml_ext.refused import unchanged_where_refused
from pml_ext.types import Indices

T = TypeVar("T")

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


class _Told(NamedTuple):
    """What ranks tell each other before they exchange rows, as integers."""

    failed: int  # 1 where the input of this rank is bad
    seed: int
    given: int  # one bit for each thing that must be given on all ranks or on none


class _PartShape(NamedTuple):
    """What ranks tell each other about a part, as integers; all 0 where there is none."""

    length: int = 0
    width: int = 0
    dtype: int = 0  # position in _DTYPES + 1, 0: another
    labels: int = 0  # 1: without, 2: with labels

    @classmethod
    def of(cls, part: Part) -> "_PartShape":
        dtype = part.embeddings.dtype
        code = 1 + _DTYPES.index(dtype) if dtype in _DTYPES else 0
        length, width = part.embeddings.shape
        return cls(length, width, code, 1 if part.labels is None else 2)

    def kind(self) -> tuple[int, int, int]:
        """Return what must be the same on all ranks."""
        return self.width, self.dtype, self.labels

    def describe(self) -> str:
        if not self.labels:
            return "none"
        dtype = _DTYPES[self.dtype - 1] if self.dtype else "another dtype"
        return f"width {self.width}, {dtype}, {'labels' if self.labels == 2 else 'no labels'}"


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
    shapes = [_PartShape() for _ in parts]
    if error is None:
        try:
            shapes = [_PartShape() if part is None else _PartShape.of(part) for part in parts]
        except Exception as failed:  # what nothing has checked where validation is off
            error = failed
    told = _Told(error is not None, seed, sum(2**i for i, here in enumerate(given.values()) if here))
    rows = gather_numbers([*told, *(number for shape in shapes for number in shape)], group)
    all_told = [_Told(*row[: len(told)]) for row in rows]
    _raise_everywhere(error, [theirs.failed for theirs in all_told])
    for rank, theirs in enumerate(all_told):
        for i, name in enumerate(given):
            if (theirs.given ^ told.given) >> i & 1:
                raise ValueError(f"{name} on all ranks or on none, got another choice on rank {rank}")
    sizes = []
    for i, (name, shape) in enumerate(zip(("embeddings", "ref_emb"), shapes, strict=False)):
        start = len(told) + i * len(shape)
        all_shapes = [_PartShape(*row[start : start + len(shape)]) for row in rows]
        for rank, their_shape in enumerate(all_shapes):
            if their_shape.kind() != shape.kind():
                raise ValueError(
                    f"{name} must have one width and dtype on all ranks, and labels on all or none, got "
                    f"{shape.describe()} here and {their_shape.describe()} on rank {rank}"
                )
        sizes.append([their_shape.length for their_shape in all_shapes])
    return sizes, all_told[0].seed


def confirm(error: Exception | None, number: int, group: Group) -> list[int]:
    """Tell all ranks whether something has gone wrong on one, and a number.

    Returns:
        The number of each rank.

    Raises:
        ValueError: If something has gone wrong on another rank; on that rank, what it is.
    """
    told = gather_numbers([0 if error is None else 1, number], group)
    _raise_everywhere(error, [failed for failed, _ in told])
    return [theirs for _, theirs in told]


class FailedElsewhereError(Exception):
    """Another rank has failed, and told so amid a call."""


def on_all_ranks(call: Callable[[], T], module: nn.Module, group: Group) -> T:
    """Return what a call gives, if no rank has failed in it; else all raise, and a module is as it was before.

    Raises:
        ValueError: If another rank has failed; on that rank, what it has failed of.
    """
    with unchanged_where_refused(module):
        result, error = None, None
        try:
            result = call()
        except FailedElsewhereError as told:
            raise ValueError(str(told)) from None
        except Exception as failed:  # what fails here, may fail on this rank alone
            error = failed
        confirm(error, 0, group)
    return result  # type: ignore[return-value]


def _raise_everywhere(error: Exception | None, failed: list[int]) -> None:
    if error is not None:
        raise error
    if any(failed):
        rank = failed.index(1)
        raise ValueError(f"all ranks must be given a valid batch, got an error on rank {rank}: see its message")


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
