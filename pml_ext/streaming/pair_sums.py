"""Log-sum-exps over the positives and over the negatives of each sample, without a matrix of all pairs."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml_ext.precision import full_precision, narrow
from pml_ext.streaming.gradients import first_derivative_only
from pml_ext.streaming.pair_tiles import Pairs, PairTiles, Sorted, Tile, in_batch_order, through_unit

_LOG2_E = math.log2(math.e)


class PairSums(NamedTuple):
    r"""What each anchor's pairs add up to, ``(B,)`` each.

    Attributes:
        positive: $\log \sum e^{a s}$ over its positives, -inf if it has none.
        negative: $\log \sum e^{b s}$ over its negatives, -inf if it has none.
        similarity: $\sum s$ over its positives.
        count: How many positives there are, int64.
    """

    positive: Tensor
    negative: Tensor
    similarity: Tensor
    count: Tensor


class _Settings(NamedTuple):
    positive: float  # the factors of similarities
    negative: float
    epsilon: float | None
    normalize: bool
    chunk_size: int | None
    name: str


class _Hardest(NamedTuple):
    """What decides which pairs count, ``(B,)`` each, in the order of labels."""

    negative: Tensor  # the most similar one, -inf if there is none
    positive: Tensor  # the least similar one, inf if there is none


def pair_sums(
    pairs: Pairs,
    positive_scale: float,
    negative_scale: float,
    epsilon: float | None = None,
    chunk_size: int | None = None,
    name: str = "a sum over pairs",
) -> PairSums:
    """Return log-sum-exps over each anchor's positives and negatives.

    Forward walks over the pairs once, with ``epsilon`` twice; backward once more. Between them a few numbers for each
    sample are kept.

    Args:
        pairs: What is compared, in float32 or float64; ``embeddings`` not empty. They and ``refs`` get gradients.
        positive_scale: $a$, the factor of similarities in the exponent of positives. Not 0.
        negative_scale: $b$, that in the exponent of negatives. Not 0.
        epsilon: Only pairs that ``MultiSimilarityMiner(epsilon)`` finds are in the log-sum-exps: positives with
            $s - \\epsilon$ below the anchor's most similar negative, negatives with $s + \\epsilon$ above its least
            similar positive. None: all pairs.
        chunk_size: Rows and columns of a tile. None: as many as stay in the cache.
        name: What a message calls the result, where it is differentiated twice.
    """
    with full_precision(pairs.embeddings.device):
        order = Sorted.by_labels(pairs)
        count = in_batch_order(order.counts(), order.order)
        settings = _Settings(positive_scale, negative_scale, epsilon, pairs.normalize, chunk_size, name)
        sums = _PairSums.apply(pairs.embeddings, pairs.refs, order, settings)
    return PairSums(*sums, count)


def _is_bounded(embeddings: Tensor, refs: Tensor | None, settings: _Settings) -> bool:
    """Whether no exponential can overflow and none that counts can underflow, without subtracting the largest."""
    largest = 1.0
    if not settings.normalize:
        norms = [_norms(x).amax() for x in (embeddings, refs) if x is not None]
        largest = float(norms[0] * norms[-1])
    exponent = largest * max(abs(settings.positive), abs(settings.negative)) * _LOG2_E
    return exponent < math.log2(torch.finfo(embeddings.dtype).max) - 28  # of up to 2^27 numbers, the sum too


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def _make_tiles(
    embeddings: Tensor, refs: Tensor | None, order: Sorted, settings: _Settings, bounded: bool
) -> PairTiles:
    factor = 1.0 if settings.epsilon is not None else settings.negative * _LOG2_E
    return PairTiles(embeddings, refs, order, settings.normalize, factor, bounded, settings.chunk_size)


def _find_hardest(tiles: PairTiles) -> _Hardest:
    """Return the most similar negative and the least similar positive of each anchor."""
    negative = tiles.unit.new_full((len(tiles.unit),), -torch.inf)
    positive = torch.full_like(negative, torch.inf)
    for columns in tiles.column_chunks():
        references, _ = tiles.references(columns)
        for tile in tiles.tiles(columns, references):
            if tile.same is not None:
                values, rows, others, _ = tile.take_same(-torch.inf)
                for anchors in (rows, others)[: 1 + tile.both]:
                    positive.scatter_reduce_(0, anchors, values, "amin")
            for dim, anchors in _sides(tile):
                torch.maximum(negative[anchors], tile.block.amax(dim), out=negative[anchors])
    return _Hardest(negative, positive)


def _sides(tile: Tile) -> tuple[tuple[int, slice], ...]:
    """Return what to sum over, and for which anchors: rows, and columns where they are anchors too."""
    return ((1, tile.rows), (0, tile.columns))[: 1 + tile.both]


class _Exponents:
    """The exponents of a tile to base 2, whose exponentials are several times faster than to base e, and as exact."""

    def __init__(self, tile: Tile, settings: _Settings, hardest: _Hardest | None) -> None:
        self.tile, self.hardest = tile, hardest
        self.places = self.anchors = self.others = self.positive = None
        epsilon = settings.epsilon
        if tile.same is not None:
            values, self.anchors, self.others, self.places = tile.take_same(-torch.inf)
            scale = settings.positive * _LOG2_E
            self.positive = values * (settings.positive / settings.negative if hardest is None else scale)
            if hardest is not None:
                self.easier = values - epsilon
        self.negative = tile.block
        if hardest is not None:  # compared as the miner does, before they are scaled
            self.harder = tile.block + epsilon
            self.negative = tile.block.mul_(settings.negative * _LOG2_E)

    def positives_of(self, columns: bool) -> tuple[Tensor, Tensor]:
        """Return the exponents of positives, -inf for those that do not count, and whose they are, ``(p,)`` each.

        Args:
            columns: Whether the anchors are the columns.
        """
        anchors, values = self.others if columns else self.anchors, self.positive
        assert anchors is not None and values is not None
        if self.hardest is not None:
            values = values.masked_fill(~(self.easier < self.hardest.negative[anchors]), -torch.inf)
        return values, anchors

    def counting(self, dim: int, anchors: slice) -> Tensor | None:
        """Return which negatives count, a mask of the tile, or None for all."""
        if self.hardest is None:
            return None
        return self.harder > self.hardest.positive[anchors].unsqueeze(dim)


def _sum_exponentials(
    tiles: PairTiles, settings: _Settings, hardest: _Hardest | None, bounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both log-sum-exps to base 2 and the sums of similarities, ``(B,)`` each, in the order of labels."""
    lowest = torch.finfo(tiles.unit.dtype).min
    start = 0.0 if bounded else lowest
    largest = [tiles.unit.new_full((len(tiles.unit),), start) for _ in range(2)]  # of the exponents so far
    total = [torch.zeros_like(largest[0]) for _ in range(2)]  # of the exponentials over that
    similarity = torch.zeros_like(total[0])
    for columns in tiles.column_chunks():
        references, _ = tiles.references(columns)
        for tile in tiles.tiles(columns, references):
            exponents = _Exponents(tile, settings, hardest)
            if exponents.positive is not None:
                for side in range(1 + tile.both):
                    values, anchors = exponents.positives_of(side == 1)
                    if not bounded:
                        before = largest[0].clone()
                        largest[0].scatter_reduce_(0, anchors, values, "amax")
                        total[0] *= (before - largest[0]).exp2_()
                        values = values - largest[0][anchors]
                    total[0].index_add_(0, anchors, values.exp2())
                    similarity.index_add_(0, anchors, exponents.positive)
            counting = [exponents.counting(*side) for side in _sides(tile)]
            block = exponents.negative
            if bounded:
                block.exp2_()
                for (dim, anchors), mask in zip(_sides(tile), counting, strict=True):
                    total[1][anchors] += (block if mask is None else block * mask).sum(dim)
                continue
            if counting[0] is not None:
                block.masked_fill_(~counting[0], -torch.inf)
            before = largest[1][tile.rows].clone()
            now = torch.maximum(before, block.amax(1), out=largest[1][tile.rows])
            total[1][tile.rows] *= (before - now).exp2_()
            total[1][tile.rows] += block.sub_(now[:, None]).exp2_().sum(1)
    pos, neg = (x.log2_().add_(y) for x, y in zip(total, largest, strict=True))
    return pos, neg, similarity.div_(settings.positive * _LOG2_E)


class _Upstream(NamedTuple):
    """The gradients by the three sums, and the two log-sum-exps to base 2, ``(B,)`` each, in the order of labels."""

    positive: Tensor
    negative: Tensor
    similarity: Tensor
    positive_sum: Tensor
    negative_sum: Tensor


def _gradients(
    tiles: PairTiles,
    settings: _Settings,
    hardest: _Hardest | None,
    bounded: bool,
    upstream: _Upstream,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by embeddings and references: the last walk."""
    refs = tiles.refs
    grad = torch.zeros_like(tiles.unit) if needs[0] else None
    ref_grad = None if refs is None or not needs[1] else torch.empty_like(refs)
    factor = upstream.negative * settings.negative
    if bounded:
        factor = factor * upstream.negative_sum.neg().exp2_()
    for columns in tiles.column_chunks():
        references, inverse = tiles.references(columns)
        by_columns = torch.zeros_like(references) if ref_grad is not None else None
        if refs is None and grad is not None:
            by_columns = grad[columns]
        for tile in tiles.tiles(columns, references):
            exponents = _Exponents(tile, settings, hardest)
            counting = [exponents.counting(*side) for side in _sides(tile)]
            slopes = exponents.negative
            if not bounded:
                slopes -= upstream.negative_sum[tile.rows, None]
            slopes.exp2_()
            weights = factor[tile.rows, None] if counting[0] is None else counting[0] * factor[tile.rows, None]
            if tile.both:
                weights = weights + (factor[columns] if counting[1] is None else counting[1] * factor[columns])
            slopes *= weights
            if exponents.positive is not None:
                own = torch.zeros_like(exponents.positive)
                for side in range(1 + tile.both):
                    values, anchors = exponents.positives_of(side == 1)
                    own += (values - upstream.positive_sum[anchors]).exp2_().mul_(upstream.positive[anchors])
                    own.add_(upstream.similarity[anchors], alpha=1 / settings.positive)
                slopes.view(-1)[exponents.places] = own.mul_(settings.positive)
            if grad is not None:
                grad[tile.rows].addmm_(slopes, references)
            if by_columns is not None:
                by_columns.addmm_(slopes.T, tiles.unit[tile.rows])
        if refs is not None and ref_grad is not None and by_columns is not None:
            places = tiles.order.ref_order[columns]
            by_columns = through_unit(by_columns, references, inverse)
            ref_grad[places] = by_columns if refs.dtype == by_columns.dtype else narrow(by_columns, refs[places])
    return None if grad is None else tiles.gradient(grad), ref_grad


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, refs: Tensor | None, order: Sorted, settings: _Settings
    ) -> tuple[Tensor, ...]:
        bounded = _is_bounded(embeddings, refs, settings)
        tiles = _make_tiles(embeddings, refs, order, settings, bounded)
        hardest = None if settings.epsilon is None else _find_hardest(tiles)
        pos, neg, similarity = _sum_exponentials(tiles, settings, hardest, bounded)
        # an anchor without pairs gets inf in place of -inf: all its exponentials are 0 then
        kept = (x.masked_fill(x == -torch.inf, torch.inf) for x in (pos, neg))
        ctx.save_for_backward(embeddings, refs, *kept, *(hardest or ()))
        ctx.order, ctx.settings, ctx.bounded = order, settings, bounded
        sums = pos / _LOG2_E, neg / _LOG2_E, similarity
        return tuple(in_batch_order(x, order.order) for x in sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        embeddings, refs, positive_sum, negative_sum, *hardest = ctx.saved_tensors
        with torch.no_grad(), full_precision(embeddings.device):
            tiles = _make_tiles(embeddings, refs, ctx.order, ctx.settings, ctx.bounded)
            upstream = _Upstream(*(grad[ctx.order.order] for grad in grads), positive_sum, negative_sum)
            kept = _Hardest(*hardest) if hardest else None
            found = _gradients(tiles, ctx.settings, kept, ctx.bounded, upstream, ctx.needs_input_grad[:2])
        inputs = tuple(x for x in (embeddings, refs, *grads) if x is not None)
        return (*first_derivative_only(ctx.settings.name, found, inputs), None, None)
