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
    check_memory,
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
    memory: int
    grad_enabled: bool  # inside a function, grad mode is off and needs_input_grad is true even under no_grad


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
    memory: int = 0,
) -> Tensor:
    r"""Return each sample's exact cross-entropy, in memory that does not grow with batch times classes.

    $$L_i = \log\Big(1 + \sum_{j \ne y_i} e^{s (c_{ij} + m + m_{y_i j} - c_{i y_i})}\Big)$$

    The sum runs over all classes: forward walks over the proxies once for the sum, backward once more for the
    gradients. Between them four numbers for each sample are kept. Exponentials of the first walk wait for backward, and
    spare it as many logits, where the gradient by the proxies will be, all of them up to B = D; further ones in
    ``memory``.

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
        memory: Bytes for exponentials that wait elsewhere, which backward gives back: those of n classes take 4 B n,
            in float64 twice as many, and a little more.

    Returns:
        ``(B,)``, float32, or float64 if an argument is. Of a shard too it is the whole loss, for which shards exchange
        three numbers for each sample (and the descriptions of the batch's classes); the gradient by the embeddings is
        the shard's part of it. It has first derivatives only: differentiating a gradient raises NotImplementedError.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or ``scale``, ``margin`` or ``class_margins`` requires a
            gradient, which ``AdaptiveAdditiveMarginLoss`` can give.
        ValueError: If a shape or value breaks a rule: labels out of range, embeddings that are not finite, a
            ``chunk_size`` that is not an integer >= 1, a ``memory`` that is not an integer >= 0.
    """
    check_chunk_size(chunk_size)
    check_memory(memory)
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
        walked = normalize, chunk_size, shard, memory
        settings = _Settings(scale, margin, class_margins, *walked, torch.is_grad_enabled())
        labels = labels.to(embeddings.device, torch.int64)
        losses: Tensor = _MarginSoftmax.apply(widen(embeddings, dtype), proxies, labels, settings)
        return losses


class _Kept(NamedTuple):
    exponentials: Tensor | None  # of a chunk, (B, n), over the largest logit so far; None once they have been used
    largest: Tensor  # that one, (B, 1)


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

    def of(self, chunk: Chunk, out: Tensor | None = None) -> Tensor:
        """Return $s (c_{ij} + m_{y_i j})$ of a chunk, ``(B, n)``, in ``out`` or memory that the next chunk will use."""
        block = torch.mm(self.scaled, chunk.rows.T, out=self.chunks.block(chunk) if out is None else out)
        if self.margins is not None:
            self.margins.add_to(block, chunk.start)
        return block


def _losses(
    logits: _Logits, shard: Shard | None, proxy_grad: Tensor | None, memory: int
) -> tuple[Tensor, Tensor, Tensor, list[_Kept | None]]:
    """Return $L_i$, ``(B,)``, and each sample's largest logit and the sum of exponentials over that: the first walk.

    The two stay apart, ``(B, 1)`` each: added up, a large offset that all logits have would swallow the sum. Last comes
    what is kept of each chunk: in the memory of the gradient to come, then in ``memory`` bytes. No gradient of an
    earlier chunk will be written to where a chunk's exponentials wait.
    """
    largest = logits.own.clone()  # so far
    total = torch.zeros_like(largest)
    batch_size, width = logits.unit.shape
    kept: list[_Kept | None] = []
    for chunk in logits.chunks:
        size, numbers = (batch_size, len(chunk.rows)), batch_size * len(chunk.rows)
        place = None
        start = chunk.start * max(batch_size, width)
        if proxy_grad is not None and start + numbers <= proxy_grad.numel():
            place = proxy_grad.view(-1)[start : start + numbers].view(size)
        elif (taken := (numbers + batch_size) * largest.element_size()) <= memory:
            memory -= taken
            place = largest.new_empty(size)
        block = logits.of(chunk, place)
        if chunk.samples is not None:
            block[chunk.samples, chunk.columns] = -torch.inf
        before, largest = largest, torch.maximum(largest, block.amax(1, keepdim=True))
        total.mul_((before - largest).exp2_()).add_(block.sub_(largest).exp2_().sum(1, keepdim=True))
        kept.append(None if place is None else _Kept(block, largest))
    if shard is not None:
        before, largest = largest, shard.max(largest)
        total = shard.sum(total.mul_((before - largest).exp2_()))
    difference = (total.log2() + (largest - logits.own)) / _LOG2_E
    losses = torch.logaddexp(difference, torch.zeros_like(difference)).squeeze(1)
    return losses, largest, total.add_((logits.own - largest).exp2_()), kept


def _gradients(
    logits: _Logits,
    losses: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    upstream: Tensor,
    needs: tuple[bool, ...],
    proxy_grad: Tensor | None,
    kept: list[_Kept | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients by embeddings and, in the memory given, by proxies: the second walk.

    $dL_i / dc_{ij}$ is $s$ times the probability of class j, less 1 for the own class.
    """
    unit = logits.unit
    own_slopes = torch.expm1(-losses) * total[:, 0]  # own probability - 1, exact where that is close to 1
    slopes = (scale * upstream)[:, None] / total
    weighted = unit * slopes
    emb_grad = torch.zeros_like(unit) if needs[0] else None
    buffer = unit.new_empty(logits.chunks.size, unit.shape[1])
    for chunk, known in zip(logits.chunks, kept, strict=True):
        if known is None:
            block = logits.of(chunk).sub_(largest).exp2_()  # probabilities times total
        else:
            exponentials = known.exponentials
            if exponentials is None:  # by the same steps, so that a second backward has the same digits
                exponentials = logits.of(chunk).sub_(known.largest).exp2_()
            block = torch.mul(exponentials, (known.largest - largest).exp2_(), out=logits.chunks.block(chunk))
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
    return emb_grad, proxy_grad


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, proxies: Tensor, labels: Tensor, settings: _Settings) -> Tensor:
        logits = _Logits(embeddings, proxies, labels, settings)
        wanted = settings.grad_enabled and any(ctx.needs_input_grad)
        ctx.proxy_grad = _empty_gradient(proxies, embeddings) if wanted and ctx.needs_input_grad[1] else None
        memory = settings.memory if wanted else 0
        losses, largest, total, ctx.kept = _losses(logits, settings.shard, ctx.proxy_grad, memory)
        ctx.save_for_backward(embeddings, proxies, labels, losses, logits.own, largest, total)
        ctx.settings = settings
        ctx.margins = None if settings.shard is None else logits.margins  # of a shard they had to be asked for
        return losses.clone()  # trainers scale the loss in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        embeddings, proxies, labels, losses, own, largest, total = ctx.saved_tensors
        proxy_grad, kept = ctx.proxy_grad, ctx.kept
        ctx.proxy_grad, ctx.kept = None, [x and _Kept(None, x.largest) for x in kept]  # handed over
        with torch.no_grad(), full_precision(embeddings.device):
            logits = _Logits(embeddings, proxies, labels, ctx.settings, own, ctx.margins)
            if not ctx.needs_input_grad[1]:
                proxy_grad = None
            elif proxy_grad is None:
                proxy_grad = _empty_gradient(proxies, embeddings)
            sums = losses, largest, total
            grads = _gradients(logits, *sums, ctx.settings.scale, grad, ctx.needs_input_grad, proxy_grad, kept)
            grads = grads[0], None if grads[1] is None else narrow(grads[1], proxies)
            del proxy_grad, kept  # or autograd would copy the gradient
        return (*first_derivative_only("margin softmax", grads, (embeddings, proxies, grad)), None, None)


def _empty_gradient(proxies: Tensor, embeddings: Tensor) -> Tensor:
    return proxies.new_empty(proxies.shape, dtype=embeddings.dtype)
