"""Some consecutive classes out of all, the others being elsewhere."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Shard(NamedTuple):
    """Which classes are here, and how to add up what all shards have found.

    Attributes:
        first: The first class that is here.
        num_classes: How many there are in all.
        sum: Returns the sum over all shards of a tensor that each has.
        max: Likewise the largest.
    """

    first: int
    num_classes: int
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


def local_labels(labels: Tensor, shard: Shard | None) -> Tensor:
    """Return the labels counted from the shard's first class: below 0 or too large for classes that are elsewhere."""
    return labels if shard is None else labels - shard.first


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
