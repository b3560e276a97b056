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
            raise ValueError(
                f"own must have the shape of labels, {tuple(self.labels.shape)}, got {tuple(self.own.shape)}"
            )
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


class Columns(NamedTuple):
    """Some references.

    Attributes:
        place: Which.
        rows: ``(m, D)``, in the dtype of the walk, of unit length where it normalizes.
        inverse: 1 / |x|, ``(m, 1)``, where the walk normalizes.
        labels: ``(m,)``, their labels in order.
        order: ``(m,)``, whose these are.
    """

    place: slice
    rows: Tensor
    inverse: Tensor | None
    labels: Tensor
    order: Tensor


class Tile(NamedTuple):
    """The similarities of some anchors with some references.

    Attributes:
        rows: Which anchors.
        columns: Which references.
        block: ``(n, m)``, the similarities times the walk's factor. In memory that the next tile will use.
        same: The rows and columns of the pairs of one label, counted in the tile, ``(p,)`` each; None if there are
            none.
        is_self: Which of these are an anchor with itself, ``(p,)``, bool.
        both: Whether the references are anchors too, whose tile with these anchors the walk leaves out.
    """

    rows: slice
    columns: slice
    block: Tensor
    same: tuple[Tensor, Tensor] | None
    is_self: Tensor | None
    both: bool

    def sides(self) -> tuple[tuple[int, slice], ...]:
        """Return what to sum over, and for which anchors: rows, and columns where they are anchors too."""
        return ((1, self.rows), (0, self.columns))[: 1 + self.both]

    def take_out_same(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take pairs of one label out of the block, in which they become -inf, and return the positive ones.

        Returns:
            Similarities, anchors, references, and places in the flat block, ``(p,)`` each.
        """
        assert self.same is not None
        assert self.is_self is not None
        rows, columns = self.same
        flat, places = self.block.view(-1), rows * self.block.shape[1] + columns
        keep = (~self.is_self).nonzero().squeeze(1)
        kept = places[keep]
        values = flat[kept]
        flat[places] = -torch.inf
        return values, rows[keep] + self.rows.start, columns[keep] + self.columns.start, kept


class PairTiles:
    """Anchors and references in chunks of rows.

    Of the batch with itself only the tiles on and above the diagonal are walked over, where ``symmetric`` says so.

    Args:
        pairs: What is compared. References are raised to the dtype of the embeddings a chunk at a time.
        factor: What similarities are multiplied by, in the product.
        symmetric: Whether to leave out tiles whose transpose has been there.
        chunk_size: Rows and columns of a tile. None: as many as stay in the cache.
    """

    def __init__(self, pairs: Pairs, factor: float, symmetric: bool, chunk_size: int | None) -> None:
        self.pairs, self.labels = pairs, pairs.labels
        self.symmetric = symmetric and pairs.refs is None
        self.unit, self.inverse = unit_rows(pairs.embeddings, pairs.normalize)
        self.scaled = self.unit if factor == 1 else self.unit * factor
        self.ref_labels, self.own = pairs.ref_labels, pairs.own
        block = auto_block(self.unit.device)
        num_rows = max(1, min(chunk_size or math.isqrt(block), len(self.unit)))
        if pairs.refs is None:
            self.ref_labels, self.own = self.labels, torch.arange(len(self.labels), device=self.labels.device)
            self.num_columns = num_rows
        else:
            self.num_columns = max(1, min(chunk_size or block // num_rows, len(pairs.refs)))
        self._block = self.unit.new_empty(num_rows * self.num_columns)
        self._rows = [
            slice(start, min(start + num_rows, len(self.unit))) for start in range(0, len(self.unit), num_rows)
        ]

    def columns(self) -> Iterator[Columns]:
        """Yield the references, a chunk at a time."""
        assert self.ref_labels is not None
        for start in range(0, len(self.ref_labels), self.num_columns):
            place = slice(start, min(start + self.num_columns, len(self.ref_labels)))
            if self.pairs.refs is None:
                rows, inverse = self.unit[place], None if self.inverse is None else self.inverse[place]
            else:
                rows, inverse = unit_rows(self.pairs.refs[place].to(self.unit.dtype), self.pairs.normalize)
            yield Columns(place, rows, inverse, *self.ref_labels[place].sort())

    def tiles(self, columns: Columns) -> Iterator[Tile]:
        """Yield the tiles of some references with all anchors; of the batch itself, with those up to the diagonal."""
        place = columns.place
        num_anchors = place.stop if self.symmetric else len(self.labels)
        chunks = [rows for rows in self._rows if rows.start < num_anchors]
        labels = self.labels[:num_anchors]
        first, last = (torch.searchsorted(columns.labels, labels, right=right) for right in (False, True))
        ends = (last - first).cumsum(0)
        found = [0, *ends[[rows.stop - 1 for rows in chunks]].tolist()]
        n = place.stop - place.start
        for i, rows in enumerate(chunks):
            block = self._block[: (rows.stop - rows.start) * n].view(-1, n)
            torch.mm(self.scaled[rows], columns.rows.T, out=block)
            same = is_self = None
            if found[i] < found[i + 1]:
                anchors = torch.repeat_interleave(last[rows] - first[rows])
                within = torch.arange(found[i], found[i + 1], device=anchors.device) + (last - ends)[rows][anchors]
                same = anchors, columns.order[within]
                is_self = torch.zeros_like(anchors, dtype=torch.bool)
                if self.own is not None:
                    is_self = self.own[rows][anchors] == same[1] + place.start
            yield Tile(rows, place, block, same, is_self, self.symmetric and rows.start < place.start)


def through_unit(grad: Tensor, unit: Tensor, inverse: Tensor | None) -> Tensor:
    """Return the gradient by rows, given that by rows of unit length, where they were made so."""
    return grad if inverse is None else through_norm(grad, unit, inverse)
