"""Sums of hinges over all positive and all negative pairs, without a matrix of them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml_ext.precision import full_precision
from pml_ext.streaming.gradients import first_derivative_only
from pml_ext.streaming.pair_tiles import Columns, Pairs, PairTiles, Tile, through_unit
from pml_ext.streaming.proxy_chunks import auto_block

_NEAR = 2.0**-10  # of |x|^2 + |y|^2: closer pairs are taken from x - y, in which nothing cancels


class HingeSums(NamedTuple):
    r"""What the losses of pairs add up to, of positive and of negative pairs, 0-dimensional each.

    Attributes:
        positive: $\sum h$ over the positive pairs.
        negative: The sum over the negative pairs.
        positive_active: How many positive pairs have $h > 0$, int64.
        negative_active: How many negative pairs have it.
        positive_number: How many positive pairs there are, int64.
        negative_number: How many negative ones.
    """

    positive: Tensor
    negative: Tensor
    positive_active: Tensor
    negative_active: Tensor
    positive_number: Tensor
    negative_number: Tensor


class _Settings(NamedTuple):
    power: int | None
    pos_margin: float
    neg_margin: float
    chunk_size: int | None
    name: str
    grad: bool  # whether gradients are wanted


def pair_hinges(
    pairs: Pairs,
    pos_margin: float,
    neg_margin: float,
    power: int | None = 1,
    chunk_size: int | None = None,
    name: str = "a sum over pairs",
) -> HingeSums:
    r"""Return sums of $\max(0, d - m_+)$ over positive pairs and of $\max(0, m_- - d)$ over negative ones.

    One walk over the pairs takes the sums and, where they are wanted, their gradients, which are kept until backward:
    two of each of ``embeddings`` and ``refs``. Distances of positives, and (``power=1``) of negatives with
    $|x - y|^2$ below a 1024th of $|x|^2 + |y|^2$, are those of $x - y$, exact to rounding; others come from products. A
    pair of distance 0 has no gradient.

    Args:
        pairs: What is compared, all in float32 or all in float64. ``embeddings`` and ``refs`` get gradients.
        pos_margin: $m_+$.
        neg_margin: $m_-$.
        power: $d$ is the Euclidean distance (1), between unit vectors where ``pairs`` normalize, or its square (2).
            None: the hinges are $\max(0, m_+ - s)$ and $\max(0, s - m_-)$ of the similarity $s$.
        chunk_size: Rows and columns of a tile. None: as many as stay in the cache.
        name: What a message calls the result, where it is differentiated twice.
    """
    settings = _Settings(power, pos_margin, neg_margin, chunk_size, name, torch.is_grad_enabled())
    with full_precision(pairs.embeddings.device):
        return HingeSums(*_PairHinges.apply(*pairs, settings))


class _Walk:
    """One walk over all pairs.

    Similarities are $x y$, or $-|x - y|^2$ for a distance; their derivatives are ``factor`` times the other row, for a
    distance less the own one.
    """

    def __init__(self, pairs: Pairs, settings: _Settings, needs: tuple[bool, bool]) -> None:
        self.settings, self.is_distance = settings, settings.power is not None
        self.factor = 2.0 if self.is_distance else 1.0
        self.tiles = PairTiles(pairs, self.factor, True, settings.chunk_size)
        unit = self.tiles.unit
        self.squares = unit.square().sum(1)
        zeros = unit.new_zeros(())
        self.sums: tuple[list[Tensor], list[Tensor]] = ([zeros], [zeros])  # of positives, of negatives
        self.active = torch.zeros(2, dtype=torch.int64, device=unit.device)
        self.numbers = [0, 0]
        self.grads = [torch.zeros_like(unit) for _ in range(2)] if needs[0] else None
        self.ref_grads = None
        if needs[1] and pairs.refs is not None:
            self.ref_grads = [torch.empty_like(pairs.refs) for _ in range(2)]
        for columns in self.tiles.columns():
            self._walk_columns(columns)
        if self.grads is not None:
            self.grads = [through_unit(grad, unit, self.tiles.inverse) for grad in self.grads]

    def _walk_columns(self, columns: Columns) -> None:
        by_columns = None  # of each kind
        if self.tiles.pairs.refs is None:
            by_columns = None if self.grads is None else [grad[columns.place] for grad in self.grads]
        elif self.ref_grads is not None:
            by_columns = [torch.zeros_like(columns.rows) for _ in range(2)]
        squares = columns.rows.square().sum(1)
        for tile in self.tiles.tiles(columns):
            grads = None if self.grads is None else [grad[tile.rows] for grad in self.grads]
            rows = self.tiles.unit[tile.rows]
            for kind, found in enumerate(self._listed(tile, squares)):
                if found is not None:
                    by_both = [None if x is None else x[kind] for x in (grads, by_columns)]
                    self._add_list(kind, (rows, columns.rows), found, by_both, 1 + tile.both)
            slopes = self._add_hinges(1, tile.block, 1 + tile.both)
            for total, own, others, by_own in (
                (grads, rows, columns.rows, slopes),
                (by_columns, columns.rows, rows, slopes.T),
            ):
                if total is not None:
                    total[1].addmm_(by_own, others)
                    if self.is_distance:
                        total[1].addcmul_(by_own.sum(1, keepdim=True), own, value=-1)
        if self.ref_grads is not None and by_columns is not None:
            for grad, by_own in zip(self.ref_grads, by_columns, strict=True):
                grad[columns.place] = through_unit(by_own, columns.rows, columns.inverse)

    def _listed(self, tile: Tile, squares: Tensor) -> list[tuple[Tensor, ...] | None]:
        """Return the rows and columns, counted in the tile, of its positives and of negatives that are too near.

        In the block, which becomes that of similarities, both get -inf, as has each sample with itself.
        """
        block, times = tile.block, 1 + tile.both
        if self.is_distance:
            lengths = self.squares[tile.rows, None] + squares
            block -= lengths
        positives = near = None
        num_same = 0
        if tile.same is not None:
            num_same = len(tile.same[0])
            _, anchors, others, _ = tile.take_out_same()
            positives = anchors - tile.rows.start, others - tile.columns.start
            self.numbers[0] += times * len(anchors)
        self.numbers[1] += times * (block.numel() - num_same)
        if self.settings.power == 1:
            is_near = block >= lengths.mul_(-_NEAR)
            if is_near.any():
                near = tuple(is_near.nonzero().T)
                block[near] = -torch.inf
        return [positives, near]

    def _add_list(
        self,
        kind: int,
        sides: tuple[Tensor, Tensor],
        pairs: tuple[Tensor, ...],
        grads: list[Tensor | None],
        times: int,
    ) -> None:
        """Add hinges of the pairs in a list, rows of both sides, and their gradients by both."""
        size = max(1, auto_block(sides[0].device) // sides[0].shape[1])
        for start in range(0, len(pairs[0]), size):
            places = [i[start : start + size] for i in pairs]
            x, y = (side.index_select(0, i) for side, i in zip(sides, places, strict=True))
            by_x, by_y = (y - x, x - y) if self.is_distance else (y, x)
            similarity = -by_x.square().sum(1) if self.is_distance else (x * y).sum(1)
            slopes = self._add_hinges(kind, similarity, times)[:, None]
            for total, i, by_own in zip(grads, places, (by_x, by_y), strict=True):
                if total is not None:
                    total.index_add_(0, i, slopes * by_own)

    def _add_hinges(self, kind: int, similarity: Tensor, times: int) -> Tensor:
        """Add hinges of pairs of a kind, in whose memory the distances are taken.

        Returns:
            Their derivatives by the similarities, times ``factor``.
        """
        value = similarity.neg_() if self.is_distance else similarity
        if self.settings.power == 1:
            value.sqrt_()
        hinges = value - (self.settings.neg_margin if kind else self.settings.pos_margin)
        if bool(kind) == self.is_distance:
            hinges.neg_()
        active = hinges > 0
        self.active[kind] += active.count_nonzero() * times
        self.sums[kind].append(hinges.clamp_min_(0).sum() * times)
        scale = times if kind else -times
        if self.settings.power != 1:
            return active.to(value.dtype).mul_(scale * self.factor)
        return value.reciprocal().mul_(scale).masked_fill_(~(active & (value > 0)), 0.0)


class _PairHinges(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, labels: Tensor, refs: Tensor | None, *settings: Any
    ) -> tuple[Tensor, ...]:
        *others, ctx.settings = settings
        pairs = Pairs(embeddings, labels, refs, *others)
        needs = (ctx.settings.grad and x for x in (ctx.needs_input_grad[0], ctx.needs_input_grad[2]))
        walk = _Walk(pairs, ctx.settings, tuple(needs))
        ctx.save_for_backward(embeddings, refs, *(walk.grads or (None, None)), *(walk.ref_grads or (None, None)))
        counts = *walk.active, *walk.active.new_tensor(walk.numbers)
        ctx.mark_non_differentiable(*counts)
        return *(torch.stack(sums).sum() for sums in walk.sums), *counts

    @staticmethod
    def backward(ctx: Any, positive: Tensor, negative: Tensor, *_: Tensor) -> tuple[Any, ...]:
        embeddings, refs, *grads = ctx.saved_tensors
        with torch.no_grad():
            found = tuple(
                None if by_positives is None else torch.addcmul(by_positives * positive, by_negatives, negative)
                for by_positives, by_negatives in (grads[:2], grads[2:])
            )
        inputs = tuple(x for x in (embeddings, refs, positive, negative) if x is not None)
        by_embeddings, by_refs = first_derivative_only(ctx.settings.name, found, inputs)
        return by_embeddings, None, by_refs, None, None, None, None
