"""Margins between classes from a second modality, formed for some classes at a time."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pml_ext.streaming.shard import Shard, rows_of

Kind = Literal["squared", "euclidean", "table"]


class ClassMargins(NamedTuple):
    r"""$m_{yj} = a + b \, d_{yj}$ for two classes that are both described, 0 for the others.

    Attributes:
        table: ``(C, E)``, rows whose squared distance or distance is $d$, zeros for a class that is not described;
            or ``(C, C)``, $d$ itself. ``pml_ext.streaming.class_distances`` makes them. Of a shard of n classes their
            rows, ``(n, E)``, or the columns that are theirs, ``(C, n)``.
        described: ``(C,)`` or ``(n,)``, bool.
        kind: What ``table`` holds: "squared", "euclidean" or "table".
        constant: $a$.
        slope: $b$.
    """

    table: Tensor
    described: Tensor
    kind: Kind
    constant: float
    slope: float

    def of(self, labels: Tensor, dtype: torch.dtype, scale: float = 1.0, shard: Shard | None = None) -> "BatchMargins":
        """Return the margins of the classes of a batch, ``(B,)``, times ``scale``, against those that are here."""
        return BatchMargins(self, labels, dtype, scale, shard)


class BatchMargins:
    """The rows of ``ClassMargins`` that belong to a batch. What all chunks need is computed once."""

    def __init__(
        self, margins: ClassMargins, labels: Tensor, dtype: torch.dtype, scale: float, shard: Shard | None
    ) -> None:
        self.margins, self.labels = margins, labels
        self.constant, self.slope = margins.constant * scale, margins.slope * scale
        self.described = rows_of(margins.described.to(dtype), labels, shard)[:, None]  # (B, 1)
        if margins.kind == "table":
            return
        self.own = rows_of(margins.table, labels, shard).to(dtype)  # (B, E)
        if margins.kind == "squared":  # |t|^2 + |u|^2 - 2 t.u: the margins are matrix products
            weight = self.constant + self.slope * _square(self.own)[:, None]
            self.weights = torch.cat([weight, torch.full_like(weight, self.slope)], 1) * self.described
            self.own = self.own * (-2 * self.slope)

    def add_to(self, block: Tensor, start: int) -> None:
        """Add the margins against the classes from ``start`` on to ``block``, ``(B, n)``, in place."""
        stop = start + block.shape[1]
        kind, table = self.margins.kind, self.margins.table
        described = self.margins.described[start:stop].to(block.dtype)
        if kind == "squared":
            other = table[start:stop].to(block.dtype)
            block.addmm_(self.own, other.T)  # zeros where one is not described
            block.addmm_(self.weights, torch.stack([described, _square(other)]))
            return
        if kind == "table":
            distances = table[:, start:stop].index_select(0, self.labels).to(block.dtype)
        else:  # not by matrix products, which cancel for classes that are close together
            other = table[start:stop].to(block.dtype)
            distances = torch.cdist(self.own, other, compute_mode="donot_use_mm_for_euclid_dist")
        block += distances.mul_(self.slope).add_(self.constant).mul_(self.described).mul_(described)


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).square_()
