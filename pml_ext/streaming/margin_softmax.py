"""Softmax with additive margins without a matrix of batch times classes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml_ext.precision import full_precision, narrow, widen
from pml_ext.streaming.class_margins import BatchMargins, ClassMargins
from pml_ext.streaming.gradients import first_derivative_only, through_norm, unit_rows
from pml_ext.streaming.proxy_chunks import (
    Chunk,
    ProxyChunks,
    Shard,
    check_chunk_size,
    check_walk,
    rows_here,
    write_gradient,
)
from pml_ext.validation import as_number, check_settings, validation_wanted

_LOG2_E = math.log2(math.e)


class _Settings(NamedTuple):
    scale: float
    margin: float
    class_margins: ClassMargins | None
    normalize: bool
    chunk_size: int | None
    shard: Shard | None


def margin_softmax_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    scale: float = 16.0,
    margin: float = 0.0,
    class_margins: ClassMargins | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    r"""Return the cross entropy of each sample, exactly, in memory that does not grow with batch times classes.

    $$L_i = \log\Big(1 + \sum_{j \ne y_i} e^{s (c_{ij} + m + m_{y_i j} - c_{i y_i})}\Big)$$

    The sum runs over all classes: forward walks over the proxies once for the sum, backward once more for the
    gradients. Nothing but four numbers a sample are kept between them.

    Args:
        embeddings: ``(B, D)``, finite. Half precision is raised to float32.
        proxies: ``(C, D)``, on the same device. Each chunk is raised to the wider dtype of both.
        labels: ``(B,)``, integers in 0 to C - 1 (of a shard: to the number of all classes - 1).
        scale: $s$ > 0.
        margin: $m$.
        class_margins: $m_{yj}$, without gradient. None: 0.
        normalize: $c$ is the cosine (True) or the dot product (False).
        chunk_size: Proxies in a chunk. None: what keeps its logits in the cache.
        shard: Which classes the proxies are. None: all.

    Returns:
        ``(B,)``, float32, or float64 if an argument is. Of a shard too it is the whole loss, for which shards exchange
        three numbers a sample (and the descriptions of the batch's classes); the gradient by the embeddings is the
        shard's part of it. It has first derivatives only: differentiating a gradient raises NotImplementedError.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or ``scale``, ``margin`` or ``class_margins`` requires a
            gradient, which ``AdaptiveAdditiveMarginLoss`` can give.
        ValueError: If a shape or value breaks a rule: labels out of range, embeddings that are not finite, a
            ``chunk_size`` that is no integer >= 1.
    """
    check_chunk_size(chunk_size)
    scale, margin = as_number("scale", scale), as_number("margin", margin)
    if class_margins is not None:
        if not isinstance(class_margins, ClassMargins):
            raise TypeError(f"class_margins must be a ClassMargins, got {type(class_margins).__name__}")
        class_margins = class_margins.without_gradients()
    if validation_wanted():
        check_settings({"scale": scale}, {"margin": margin})
        check_walk(embeddings, proxies, labels, shard)
        if class_margins is not None:
            class_margins.check(len(proxies), len(proxies) if shard is None else shard.num_classes)
    with full_precision(embeddings.device):
        dtype = torch.promote_types(torch.promote_types(embeddings.dtype, proxies.dtype), torch.float32)
        settings = _Settings(scale, margin, class_margins, normalize, chunk_size, shard)
        labels = labels.to(embeddings.device, torch.int64)
        losses: Tensor = _MarginSoftmax.apply(widen(embeddings, dtype), proxies, labels, settings)
        return losses


class _Logits:
    """The logits of both walks, to base 2, whose exponentials are several times faster, and as exact.

    Attributes:
        own: $s (c_{i y_i} - m)$, ``(B, 1)``: less the margin that all other classes have.
    """

    def __init__(
        self,
        embeddings: Tensor,
        proxies: Tensor,
        labels: Tensor,
        settings: _Settings,
        own: Tensor | None = None,
        margins: BatchMargins | None = None,
    ) -> None:
        scale, shard = settings.scale * _LOG2_E, settings.shard
        self.unit, self.inverse = unit_rows(embeddings, settings.normalize)
        self.scaled = self.unit * scale
        if own is None:
            own_proxies, _ = unit_rows(rows_here(proxies, labels, shard).to(embeddings.dtype), settings.normalize)
            own = (self.scaled * own_proxies).sum(1, keepdim=True)
            own = (own if shard is None else shard.sum(own)) - scale * settings.margin
        self.own = own
        if margins is None and settings.class_margins is not None:
            margins = settings.class_margins.of(labels, embeddings.dtype, scale, shard)
        self.margins = margins
        self.chunks = ProxyChunks(proxies, labels, settings.normalize, embeddings.dtype, settings.chunk_size, shard)

    def of(self, chunk: Chunk) -> Tensor:
        """Return $s (c_{ij} + m_{y_i j})$ of a chunk, ``(B, n)``, in memory that the next chunk will use."""
        block = torch.mm(self.scaled, chunk.rows.T, out=self.chunks.block(chunk))
        if self.margins is not None:
            self.margins.add_to(block, chunk.start)
        return block


def _losses(logits: _Logits, shard: Shard | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return $L_i$, ``(B,)``, and each sample's largest logit and the sum of exponentials over that: the first walk.

    The two stay apart, ``(B, 1)`` each: added up, a large offset that all logits have would swallow the sum.
    """
    largest = logits.own.clone()  # so far
    total = torch.zeros_like(largest)
    for chunk in logits.chunks:
        block = logits.of(chunk)
        if chunk.samples is not None:
            block[chunk.samples, chunk.columns] = -torch.inf
        before, largest = largest, torch.maximum(largest, block.amax(1, keepdim=True))
        total.mul_((before - largest).exp2_()).add_(block.sub_(largest).exp2_().sum(1, keepdim=True))
    if shard is not None:
        before, largest = largest, shard.max(largest)
        total = shard.sum(total.mul_((before - largest).exp2_()))
    difference = (total.log2() + (largest - logits.own)) / _LOG2_E
    losses = torch.logaddexp(difference, torch.zeros_like(difference)).squeeze(1)
    return losses, largest, total.add_((logits.own - largest).exp2_())


def _gradients(
    logits: _Logits,
    proxies: Tensor,
    losses: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    upstream: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by embeddings and proxies: the second walk.

    $dL_i / dc_{ij}$ is $s$ times the probability of class j, less 1 for the own class.
    """
    unit = logits.unit
    own_slopes = torch.expm1(-losses) * total[:, 0]  # own probability - 1, exact where that is close to 1
    slopes = (scale * upstream)[:, None] / total
    weighted = unit * slopes
    emb_grad = torch.zeros_like(unit) if needs[0] else None
    proxy_grad = torch.empty_like(proxies, dtype=unit.dtype) if needs[1] else None
    buffer = unit.new_empty(logits.chunks.size, unit.shape[1])
    for chunk in logits.chunks:
        block = logits.of(chunk).sub_(largest).exp2_()  # probabilities times total
        if chunk.samples is not None:
            block[chunk.samples, chunk.columns] = own_slopes[chunk.samples]
        if emb_grad is not None:
            emb_grad.addmm_(block, chunk.rows)
        if proxy_grad is not None:
            write_gradient(torch.mm(block.T, weighted, out=buffer[: len(chunk.rows)]), chunk, proxy_grad)
    if emb_grad is not None:
        emb_grad *= slopes
        if logits.inverse is not None:
            emb_grad = through_norm(emb_grad, unit, logits.inverse)
    return emb_grad, None if proxy_grad is None else narrow(proxy_grad, proxies)


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, proxies: Tensor, labels: Tensor, settings: _Settings) -> Tensor:
        logits = _Logits(embeddings, proxies, labels, settings)
        losses, largest, total = _losses(logits, settings.shard)
        ctx.save_for_backward(embeddings, proxies, labels, losses, logits.own, largest, total)
        ctx.settings = settings
        ctx.margins = None if settings.shard is None else logits.margins  # of a shard they had to be asked for
        return losses.clone()  # trainers scale the loss in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        embeddings, proxies, labels, losses, own, largest, total = ctx.saved_tensors
        with torch.no_grad(), full_precision(embeddings.device):
            logits = _Logits(embeddings, proxies, labels, ctx.settings, own, ctx.margins)
            sums = losses, largest, total
            grads = _gradients(logits, proxies, *sums, ctx.settings.scale, grad, ctx.needs_input_grad)
        return (*first_derivative_only("margin softmax", grads, (embeddings, proxies, grad)), None, None)
