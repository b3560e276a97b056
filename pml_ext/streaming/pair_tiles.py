"""A walk over the similarities of samples, a tile at a time, without a matrix of all of them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pml_ext.precision import widen
from pml_ext.streaming.gradients import through_norm, unit_rows
from pml_ext.streaming.proxy_chunks import auto_block
from pml_ext.validation import check_batch, check_integers

class Pairs(NamedTuple):
    """What is compared with what.

    Attributes:
        embeddings: ``(B, D)``, the anchors.
        labels: ``(B,)``, int64.
        refs: ``(R, D)``, what they are compared with. None: the batch itself.
        ref_labels: ``(R,)``, None with ``refs=None``.
        own: ``(B,)``, where in the references each anchor lies: it is not compared with itself. None: nowhere, or for
            the batch itself, each in its place.
        normalize: The similarity is the cosine (True) or the dot product (False).
    """

    embeddings: Tensor
    labels: Tensor
    refs: Tensor | None = None
    ref_labels: Tensor | None = None
    own: Tensor | None = None
    normalize: bool = True

    def check(self) -> None:
        """Check shapes, types and values, as the losses do.

        Raises:
            TypeError: If a tensor has the wrong type or dtype.
            ValueError: If a shape or a value breaks a rule.
        """
        check_batch(self.embeddings, self.labels, None, self.refs, self.ref_labels)
        if self.own is None:
            return
        check_integers("own", self.own)
        if self.refs is None:
            raise ValueError("own must come with ref_emb, got own alone")
        if self.own.shape != self.labels.shape:
            raise ValueError(f"own must have the shape of labels, {tuple(self.labels.shape)}, got {tuple(self.own.shape)}")
        if len(self.own) and not 0 <= int(self.own.min()) <= int(self.own.max()) < len(self.refs):
            extremes = f"{int(self.own.min())} to {int(self.own.max())}"
            raise ValueError(f"own must lie in 0 to {len(self.refs) - 1}, got {extremes}")


    def widened(self) -> "Pairs":
        """Return the same in float32 or better, labels and places as int64 on the device of the embeddings.

        References stay as they are, unless they are wider: they are raised a chunk at a time.
        """
        dtypes = [x.dtype for x in (self.embeddings, self.refs) if x is not None]
        dtype = torch.promote_types(torch.promote_types(dtypes[0], dtypes[-1]), torch.float32)
        integers = ("labels", "ref_labels", "own")
        given = {name: getattr(self, name) for name in integers if getattr(self, name) is not None}
        moved = {name: x.to(self.embeddings.device, torch.int64) for name, x in given.items()}
        return self._replace(embeddings=widen(self.embeddings, dtype), **moved)


class Sorted(NamedTuple):
    """Both sides in the order of their labels: an anchor's positives lie side by side.

    Attributes:
        order: ``(B,)``, the anchors.
        ref_order: ``(R,)``, the references; the same tensor for the batch itself.
        first: ``(B,)``, where the positives of each anchor begin, in this order.
        last: ``(B,)``, where they end.
        own: ``(B,)``, where the anchor itself lies, -1 for nowhere.
    """

    order: Tensor
    ref_order: Tensor
    first: Tensor
    last: Tensor
    own: Tensor

    @classmethod
    def by_labels(cls, pairs: Pairs) -> "Sorted":
        """Return the order of both sides."""
        labels, order = pairs.labels.sort(stable=True)
        if pairs.refs is None:
            ref_labels, ref_order, own = labels, order, torch.arange(len(labels), device=labels.device)
        else:
            assert pairs.ref_labels is not None
            ref_labels, ref_order = pairs.ref_labels.sort(stable=True)
            own = torch.full_like(labels, -1)
            if pairs.own is not None:
                place = torch.empty_like(ref_order)
                place[ref_order] = torch.arange(len(ref_order), device=labels.device)
                own = place[pairs.own[order]]
        first, last = (torch.searchsorted(ref_labels, labels, right=right) for right in (False, True))
        return cls(order, ref_order, first, last, own)

    def counts(self) -> Tensor:
        """Return how many positives each anchor has, ``(B,)``."""
        itself = (self.own >= self.first) & (self.own < self.last)
        return self.last - self.first - itself.long()


class Tile(NamedTuple):
    """The similarities of some anchors with some references.

    Attributes:
        rows: Which anchors, in the order of labels.
        columns: Which references, likewise.
        block: ``(n, m)``, the similarities times the walk's factor. In memory that the next tile will use.
        same: Which of the n * m numbers belong to one label, an anchor with itself included; None if none.
        itself: Which of ``same`` are an anchor with itself.
        anchors: The rows of ``same``, counted in the tile.
        others: The columns of ``same``, likewise.
        both: Whether the references are anchors too, whose tile with these references the walk leaves out.
    """

    rows: slice
    columns: slice
    block: Tensor
    same: Tensor | None
    itself: Tensor | None
    anchors: Tensor | None
    others: Tensor | None
    both: bool

    def take_same(self, fill: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the similarities of the positive pairs, and where they lie; and write ``fill`` over them.

        Returns:
            Similarities, rows in the walk, columns in the walk, and places in the tile, ``(p,)`` each.
        """
        flat = self.block.view(-1)
        assert self.same is not None and self.itself is not None
        assert self.anchors is not None and self.others is not None
        keep = ~self.itself
        places = self.same[keep]
        values = flat[places]
        flat[self.same] = fill
        return values, self.anchors[keep] + self.rows.start, self.others[keep] + self.columns.start, places


class PairTiles:
    """Anchors and references in chunks of rows, in the order of their labels.

    Of the batch with itself only the tiles on and above the diagonal are walked over, where ``symmetric`` says so.

    Args:
        embeddings: ``(B, D)``, the anchors, float32 or float64.
        refs: ``(R, D)``, what they are compared with, raised a chunk at a time. None: the batch itself.
        order: The order of both.
        normalize: The similarity is the cosine (True) or the dot product (False).
        factor: What similarities are multiplied by, in the product.
        symmetric: Whether to leave out tiles whose transpose has been there.
        chunk_size: Rows and columns of a tile. None: as many as stay in the cache.
    """

    def __init__(
        self,
        embeddings: Tensor,
        refs: Tensor | None,
        order: Sorted,
        normalize: bool,
        factor: float,
        symmetric: bool,
        chunk_size: int | None,
    ) -> None:
        self.refs, self.order, self.normalize = refs, order, normalize
        self.symmetric = symmetric and refs is None
        self.unit, self.inverse = unit_rows(embeddings[order.order], normalize)
        self.scaled = self.unit if factor == 1 else self.unit * factor
        num_anchors, num_refs = len(order.order), len(order.ref_order)
        block = auto_block(self.unit.device)
        self.num_rows = min(chunk_size or math.isqrt(block), num_anchors)
        self.num_columns = self.num_rows
        if refs is not None:
            self.num_columns = min(chunk_size or block // self.num_rows, num_refs)
        self._block = self.unit.new_empty(self.num_rows * self.num_columns)
        starts = range(0, num_anchors, self.num_rows)
        stops = [min(start + self.num_rows, num_anchors) for start in starts]
        ends = torch.stack([order.first[list(starts)], order.last[[stop - 1 for stop in stops]]]).tolist()
        self._row_chunks = list(zip(map(slice, starts, stops), *ends, strict=True))

    def column_chunks(self) -> Iterator[slice]:
        """Yield which references are next."""
        num_refs = len(self.order.ref_order)
        for start in range(0, num_refs, self.num_columns):
            yield slice(start, min(start + self.num_columns, num_refs))

    def references(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Return rows of references, of unit length where the walk normalises, ``(m, D)``, and 1 / |x|, ``(m, 1)``."""
        if self.refs is None:
            return self.unit[columns], None if self.inverse is None else self.inverse[columns]
        return unit_rows(self.refs[self.order.ref_order[columns]].to(self.unit.dtype), self.normalize)

    def tiles(self, columns: slice, references: Tensor) -> Iterator[Tile]:
        """Yield the tiles of some references with all anchors; of the batch itself, with those up to the diagonal."""
        n = columns.stop - columns.start
        for rows, first, last in self._row_chunks:
            if self.symmetric and rows.start > columns.start:
                return
            block = self._block[: (rows.stop - rows.start) * n].view(-1, n)
            torch.mm(self.scaled[rows], references.T, out=block)
            same: tuple[Tensor | None, ...] = (None,) * 4
            if first < columns.stop and columns.start < last:
                same = self._same(rows, columns)
            yield Tile(rows, columns, block, *same, self.symmetric and rows.start < columns.start)

    def _same(self, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        """Return the places of pairs of one label, which are an anchor with itself, their rows and their columns."""
        n = columns.stop - columns.start
        first, last = ((x[rows] - columns.start).clamp_(0, n) for x in (self.order.first, self.order.last))
        counts = last - first
        anchors = torch.repeat_interleave(counts)
        others = torch.arange(len(anchors), device=anchors.device) + (last - counts.cumsum(0))[anchors]
        itself = self.order.own[rows][anchors] == others + columns.start
        return anchors * n + others, itself, anchors, others

    def gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient by the embeddings, given that by ``unit``, ``(B, D)`` in the order of labels; changed."""
        return in_batch_order(through_unit(grad, self.unit, self.inverse), self.order.order)


def through_unit(grad: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """Return the gradient by rows, given that by rows of unit length, where they were made so."""
    return grad if inverse is None else through_norm(grad, unit, inverse)


def in_batch_order(x: Tensor, order: Tensor) -> Tensor:
    """Return rows that are in the order of labels in that of the batch."""
    return torch.empty_like(x).index_copy_(0, order, x)
