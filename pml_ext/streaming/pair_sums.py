"""Log-sum-exps over the positives and over the negatives of each sample, without a matrix of all pairs."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml_ext.precision import full_precision, narrow
from pml_ext.streaming.gradients import first_derivative_only
from pml_ext.streaming.pair_tiles import Pairs, PairTiles, Tile, through_unit

_LOG2_E = math.log2(math.e)


class PairSums(NamedTuple):
    r"""What each anchor's pairs add up to, ``(B,)`` each.

    Attributes:
        positive: $\log \sum e^{a s}$ over its positives, -inf if it has none.
        negative: $\log \sum e^{b s}$ over its negatives, -inf if it has none.
        similarity: $\sum s$ over its positives.
        number: How many positives there are, int64.
    """

    positive: Tensor
    negative: Tensor
    similarity: Tensor
    number: Tensor


class _Settings(NamedTuple):
    positive: float  # the factors of similarities
    negative: float
    epsilon: float | None
    chunk_size: int | None
    name: str


class _Hardest(NamedTuple):
    """What decides which pairs count, ``(B,)`` each."""

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
    r"""Return log-sum-exps over each anchor's positives and negatives.

    Forward walks over the pairs once, with ``epsilon`` twice; backward once more. Between them a few numbers for each
    sample are kept.

    Args:
        pairs: What is compared, in float32 or float64. ``embeddings`` and ``refs`` get gradients.
        positive_scale: $a$, the factor of similarities in the exponent of positives. Not 0.
        negative_scale: $b$, that in the exponent of negatives. Not 0.
        epsilon: Only pairs that ``MultiSimilarityMiner(epsilon)`` finds are in the log-sum-exps: positives with
            $s - \epsilon$ below the anchor's most similar negative, negatives with $s + \epsilon$ above its least
            similar positive. None: all pairs.
        chunk_size: Rows and columns of a tile. None: as many as stay in the cache.
        name: What a message calls the result, where it is differentiated twice.
    """
    settings = _Settings(positive_scale, negative_scale, epsilon, chunk_size, name)
    with full_precision(pairs.embeddings.device):
        sums = _PairSums.apply(*pairs, settings)
    return PairSums(*sums)


def _is_bounded(pairs: Pairs, settings: _Settings) -> bool:
    """Whether no exponential can overflow and none that counts can underflow, without subtracting the largest."""
    largest = 1.0
    if not pairs.normalize:
        norms = [_largest_norm(x) for x in (pairs.embeddings, pairs.refs) if x is not None]
        largest = norms[0] * norms[-1]
    exponent = largest * max(abs(settings.positive), abs(settings.negative)) * _LOG2_E
    return exponent < math.log2(torch.finfo(pairs.embeddings.dtype).max) - 28  # of up to 2^27 numbers, the sum too


def _largest_norm(x: Tensor) -> float:
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return float(norms.amax()) if len(x) else 0.0


def _make_tiles(pairs: Pairs, settings: _Settings, bounded: bool) -> PairTiles:
    factor = 1.0 if settings.epsilon is not None else settings.negative * _LOG2_E
    return PairTiles(pairs, factor, bounded, settings.chunk_size)


def _find_hardest(tiles: PairTiles) -> _Hardest:
    """Return the most similar negative and the least similar positive of each anchor."""
    negative = tiles.unit.new_full((len(tiles.unit),), -torch.inf)
    positive = torch.full_like(negative, torch.inf)
    for columns in tiles.columns():
        for tile in tiles.tiles(columns):
            if tile.same is not None:
                values, *pair, _ = tile.take_out_same()
                for side in pair[: 1 + tile.both]:
                    positive.scatter_reduce_(0, side, values, "amin")
            for dim, anchors in tile.sides():
                torch.maximum(negative[anchors], tile.block.amax(dim), out=negative[anchors])
    return _Hardest(negative, positive)


class _Exponents:
    """The exponents of a tile to base 2, whose exponentials are several times faster than to base e, and as exact."""

    def __init__(self, tile: Tile, settings: _Settings, hardest: _Hardest | None) -> None:
        self.hardest = hardest
        self.positive: Tensor | None = None
        scale = settings.negative * _LOG2_E
        if tile.same is not None:
            values, *self.pair, self.places = tile.take_out_same()
            self.positive = values * (settings.positive / (settings.negative if hardest is None else 1 / _LOG2_E))
        self.negative = tile.block
        if hardest is not None:  # compared as the miner does, before they are scaled
            assert settings.epsilon is not None
            self.positive_minus_epsilon = None if self.positive is None else values - settings.epsilon
            self.negative_plus_epsilon = tile.block + settings.epsilon
            self.negative = tile.block.mul_(scale)
        # of each side, which negatives count: a mask of the tile, or None for all
        self.counting = [
            None if hardest is None else self.negative_plus_epsilon > hardest.positive[anchors].unsqueeze(dim)
            for dim, anchors in tile.sides()
        ]

    def positives(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield of each side the exponents of positives, -inf for those that do not count, and the anchors."""
        assert self.positive is not None
        for anchors in self.pair[: len(self.counting)]:
            values = self.positive
            if self.hardest is not None:
                assert self.positive_minus_epsilon is not None
                values = values.masked_fill(~(self.positive_minus_epsilon < self.hardest.negative[anchors]), -torch.inf)
            yield values, anchors


def _sum_exponentials(
    tiles: PairTiles, settings: _Settings, hardest: _Hardest | None, bounded: bool
) -> tuple[Tensor, ...]:
    """Return both log-sum-exps to base 2, the sums of similarities and the numbers of positives, ``(B,)`` each."""
    lowest = torch.finfo(tiles.unit.dtype).min
    start = 0.0 if bounded else lowest
    largest = [tiles.unit.new_full((len(tiles.unit),), start) for _ in range(2)]  # of the exponents so far
    total = [torch.zeros_like(largest[0]) for _ in range(2)]  # of the exponentials over that
    similarity = torch.zeros_like(total[0])
    count = torch.zeros_like(tiles.labels)
    for columns in tiles.columns():
        for tile in tiles.tiles(columns):
            exponents = _Exponents(tile, settings, hardest)
            if exponents.positive is not None:
                for values, owners in exponents.positives():
                    if not bounded:
                        before = largest[0].clone()
                        largest[0].scatter_reduce_(0, owners, values, "amax")
                        total[0] *= (before - largest[0]).exp2_()
                        values = values - largest[0][owners]
                    total[0].index_add_(0, owners, values.exp2())
                    similarity.index_add_(0, owners, exponents.positive)
                    count.index_add_(0, owners, torch.ones_like(owners))
            block = exponents.negative
            if bounded:
                block.exp2_()
                for (dim, anchors), mask in zip(tile.sides(), exponents.counting, strict=True):
                    total[1][anchors] += (block if mask is None else block * mask).sum(dim)
                continue
            if exponents.counting[0] is not None:
                block.masked_fill_(~exponents.counting[0], -torch.inf)
            before = largest[1][tile.rows].clone()
            now = torch.maximum(before, block.amax(1), out=largest[1][tile.rows])
            total[1][tile.rows] *= (before - now).exp2_()
            total[1][tile.rows] += block.sub_(now[:, None]).exp2_().sum(1)
    pos, neg = (x.log2_().add_(y) for x, y in zip(total, largest, strict=True))
    return pos, neg, similarity.div_(settings.positive * _LOG2_E), count


class _Upstream(NamedTuple):
    """The gradients by the three sums, and the two log-sum-exps to base 2, ``(B,)`` each."""

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
    refs = tiles.pairs.refs
    grad = torch.zeros_like(tiles.unit) if needs[0] else None
    ref_grad = torch.empty_like(refs) if refs is not None and needs[1] else None
    factor = upstream.negative * settings.negative
    if bounded:
        factor = factor * upstream.negative_sum.neg().exp2_()
    for columns in tiles.columns():
        by_columns = None
        if refs is not None:
            by_columns = None if ref_grad is None else torch.zeros_like(columns.rows)
        elif grad is not None:
            by_columns = grad[columns.place]
        for tile in tiles.tiles(columns):
            exponents = _Exponents(tile, settings, hardest)
            slopes = exponents.negative
            if not bounded:
                slopes -= upstream.negative_sum[tile.rows, None]
            slopes.exp2_()
            weights = [
                factor[anchors].unsqueeze(dim) if mask is None else mask * factor[anchors].unsqueeze(dim)
                for (dim, anchors), mask in zip(tile.sides(), exponents.counting, strict=True)
            ]
            slopes *= weights[0] + weights[1] if tile.both else weights[0]
            if exponents.positive is not None:
                own = torch.zeros_like(exponents.positive)
                for values, owners in exponents.positives():
                    own += (values - upstream.positive_sum[owners]).exp2_().mul_(upstream.positive[owners])
                    own.add_(upstream.similarity[owners], alpha=1 / settings.positive)
                slopes.view(-1)[exponents.places] = own.mul_(settings.positive)
            if grad is not None:
                grad[tile.rows].addmm_(slopes, columns.rows)
            if by_columns is not None:
                by_columns.addmm_(slopes.T, tiles.unit[tile.rows])
        if refs is not None and ref_grad is not None and by_columns is not None:
            by_columns = through_unit(by_columns, columns.rows, columns.inverse)
            ref_grad[columns.place] = narrow(by_columns, refs[columns.place])
    return None if grad is None else through_unit(grad, tiles.unit, tiles.inverse), ref_grad


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, labels: Tensor, refs: Tensor | None, *settings: Any
    ) -> tuple[Tensor, ...]:
        *others, ctx.settings = settings
        pairs = Pairs(embeddings, labels, refs, *others)
        ctx.bounded = _is_bounded(pairs, ctx.settings)
        tiles = _make_tiles(pairs, ctx.settings, ctx.bounded)
        hardest = None if ctx.settings.epsilon is None else _find_hardest(tiles)
        pos, neg, similarity, count = _sum_exponentials(tiles, ctx.settings, hardest, ctx.bounded)
        # an anchor without pairs gets inf in place of -inf: all its exponentials are 0 then
        sums = (x.masked_fill(x == -torch.inf, torch.inf) for x in (pos, neg))
        ref_labels, own, ctx.normalize = others
        ctx.save_for_backward(embeddings, labels, refs, ref_labels, own, *sums, *(hardest or ()))
        ctx.mark_non_differentiable(count)
        return pos / _LOG2_E, neg / _LOG2_E, similarity, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        embeddings, labels, refs, ref_labels, own, positive_sum, negative_sum, *kept = ctx.saved_tensors
        hardest = _Hardest(*kept) if kept else None
        pairs = Pairs(embeddings, labels, refs, ref_labels, own, ctx.normalize)
        with torch.no_grad(), full_precision(pairs.embeddings.device):
            tiles = _make_tiles(pairs, ctx.settings, ctx.bounded)
            upstream = _Upstream(grads[0], grads[1], grads[2], positive_sum, negative_sum)
            needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
            found = _gradients(tiles, ctx.settings, hardest, ctx.bounded, upstream, needs)
        inputs = tuple(x for x in (pairs.embeddings, pairs.refs, *grads[:3]) if x is not None)
        by_embeddings, by_refs = first_derivative_only(ctx.settings.name, found, inputs)
        return by_embeddings, None, by_refs, None, None, None, None
