"""Proxy-Anchor without a matrix of batch times classes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pml_ext.precision import full_precision, narrow, widen
from pml_ext.streaming.gradients import first_derivative_only, through_norm, unit_rows
from pml_ext.streaming.proxy_chunks import ProxyChunks, Shard, check_chunk_size, check_walk, write_gradient
from pml_ext.validation import as_number, check_settings, validation_wanted

_LOG2_E = math.log2(math.e)


class _Settings(NamedTuple):
    alpha: float
    margin: float
    normalize: bool
    per_class: bool
    chunk_size: int | None
    shard: Shard | None


def proxy_anchor_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    alpha: float = 32.0,
    margin: float = 0.1,
    sample_shift: Tensor | None = None,
    normalize: bool = True,
    per_class: bool = False,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the two exact parts of the Proxy-Anchor loss, in memory that does not grow with batch times classes.

    $$P_c = \log\Big(1 + \sum_{i: y_i = c} e^{-\alpha (s_{ic} - \delta) + b_i}\Big) \qquad
      N_c = \log\Big(1 + \sum_{i: y_i \ne c} e^{\alpha (s_{ic} + \delta) + b_i}\Big)$$

    The exponential sum of a proxy runs over the batch, so a chunk of proxies is complete in itself. By default the
    parts are reduced, and one walk over the chunks gives their values and gradients: the similarities of a chunk are
    computed once. ``per_class=True`` gives $P_c$ and $N_c$ themselves; then backward walks a second time, with a
    weight for each proxy.

    Args:
        embeddings: ``(B, D)``, finite. Half precision is raised to float32. Of no sample all parts are 0.
        proxies: ``(C, D)``, on the same device. Each chunk is raised to the wider dtype of both.
        labels: ``(B,)``, integers in 0 to C - 1 (of a shard: to the number of all classes - 1).
        alpha: $\alpha$ > 0.
        margin: $\delta$.
        sample_shift: $b_i$, ``(B,)``, without gradient; with $-\infty$ a sample counts nowhere. None: 0.
        normalize: $s$ is the cosine (True) or the dot product (False).
        per_class: Whether to return the parts of each class.
        chunk_size: Proxies in a chunk. None: what keeps its similarities in the cache.
        shard: Which classes the proxies are. None: all.

    Returns:
        The mean of $P_c$ over the classes in the batch and the mean of $N_c$ over all classes, scalars; with
        ``per_class`` $P_c$ and $N_c$, ``(C,)`` each. Of a shard, the part of these means that its classes have: the
        sum over shards, of values and of the gradient by the embeddings, is that of the whole. Float32, or float64 if
        an argument is. They have first derivatives only: differentiating a gradient raises NotImplementedError.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or ``alpha`` or ``margin`` requires a gradient, which
            ``ProxyAnchorLoss`` can give.
        ValueError: If a shape or value breaks a rule: labels out of range, embeddings that are not finite, no sample of
            a shard, a ``chunk_size`` that is not an integer >= 1; a ``sample_shift`` of another shape or device, with
            NaN or infinity, or that requires a gradient.
    """
    check_chunk_size(chunk_size)
    alpha, margin = as_number("alpha", alpha), as_number("margin", margin)
    if validation_wanted():
        check_settings({"alpha": alpha}, {"margin": margin})
        check_walk(embeddings, proxies, labels, shard)
        if sample_shift is not None:
            _check_shift(sample_shift, embeddings)
    if sample_shift is not None and sample_shift.requires_grad:
        raise ValueError("sample_shift must not require a gradient, got one that does")
    with full_precision(embeddings.device):
        dtype = torch.promote_types(torch.promote_types(embeddings.dtype, proxies.dtype), torch.float32)
        embeddings, labels = widen(embeddings, dtype), labels.to(embeddings.device, torch.int64)
        if not len(embeddings):
            if shard is not None:
                raise ValueError("embeddings must have rows where the proxies are a shard, got none")
            nothing = (embeddings.sum() + proxies.sum().to(dtype)) * 0  # with a graph
            nothing = nothing.expand(len(proxies)) if per_class else nothing
            return nothing, nothing
        settings = _Settings(alpha, margin, normalize, per_class, chunk_size, shard)
        pos, neg = _ProxyAnchor.apply(embeddings, proxies, labels, sample_shift, settings, torch.is_grad_enabled())
        return pos, neg


def _check_shift(shift: Tensor, embeddings: Tensor) -> None:
    if not isinstance(shift, Tensor) or not shift.is_floating_point():
        raise TypeError(
            f"sample_shift must be a floating point tensor, got {getattr(shift, 'dtype', type(shift).__name__)}"
        )
    if shift.shape != embeddings.shape[:1] or shift.device != embeddings.device:
        raise ValueError(
            f"sample_shift must have shape (batch_size,) = ({len(embeddings)},) on {embeddings.device}, got "
            f"{tuple(shift.shape)} on {shift.device}"
        )
    if not bool((shift < torch.inf).all()):
        raise ValueError("sample_shift must be finite or -inf, got NaN or inf")


def _walk(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    shift: Tensor | None,
    settings: _Settings,
    upstream: tuple[Any, Any] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """Return $P_c$, $N_c$ and, given the gradients by them, numbers or ``(C,)``, those by embeddings and proxies."""
    alpha, margin, normalize, _, chunk_size, shard = settings
    unit, inverse = unit_rows(embeddings, normalize)
    scaled = unit * (alpha * _LOG2_E)  # exponentials to base 2 are several times faster, and as exact
    constant = alpha * margin * _LOG2_E
    # Cosines are bounded, so their exponentials are, unless alpha is large: then the largest need not be subtracted.
    bounded = normalize and shift is None and alpha * (1 + abs(margin)) * _LOG2_E < 100
    shift = None if shift is None else shift[:, None] * _LOG2_E
    pos, neg = embeddings.new_zeros(len(proxies)), embeddings.new_empty(len(proxies))
    emb_grad = torch.zeros_like(embeddings) if upstream is not None and needs[0] else None
    proxy_grad = None  # in the walk's dtype: before it is scaled, float16 could not hold it
    if upstream is not None and needs[1]:
        proxy_grad = torch.empty_like(proxies, dtype=embeddings.dtype)
    chunks = ProxyChunks(proxies, labels, normalize, embeddings.dtype, chunk_size, shard)
    buffer = embeddings.new_empty(chunks.size if proxy_grad is not None else 0, embeddings.shape[1])
    for chunk in chunks:
        classes = slice(chunk.start, chunk.stop)

        # P_c = log(1 + sum of exp(-alpha (s - margin) + shift)) over own samples, with its slopes by the exponents
        block = torch.mm(scaled, chunk.rows.T, out=chunks.block(chunk))  # alpha s, (B, n)
        if chunk.samples is not None:
            own = chunk.samples, chunk.columns
            exponents = constant - block[own]
            if shift is not None:
                exponents += shift[chunk.samples, 0]
            pos[classes], own_slopes = _sum_own(exponents, chunk.columns, pos[classes])
            block[own] = -torch.inf

        # N_c = log(1 + sum of exp(alpha (s + margin) + shift)) over all others
        if shift is not None:
            block += shift
        if bounded:  # exp(alpha * margin) is left out of the block
            missing = math.exp(alpha * margin)
            rest = block.exp2_().sum(0).mul_(missing)  # the sum, with its 1, is 1 + rest
            torch.log1p(rest, out=neg[classes])
        else:
            missing = 1.0
            largest = (block.amax(0) + constant).clamp_min_(0)  # of the exponents and 0, since 1 = exp(0)
            rest = block.sub_(largest - constant).exp2_().sum(0).add_((largest * (-1 / _LOG2_E)).expm1_())
            torch.add(rest.log1p(), largest, alpha=1 / _LOG2_E, out=neg[classes])
        if upstream is None:
            continue

        # dN_c / ds = alpha exp(...) / (1 + sum), dP_c / ds likewise with -alpha, each times the gradient from above
        pos_grad, neg_grad = (x[classes] if isinstance(x, Tensor) else x for x in upstream)
        block *= alpha * missing * neg_grad / (1 + rest)
        if chunk.samples is not None:
            block[own] = own_slopes * (-alpha * (pos_grad[chunk.columns] if isinstance(pos_grad, Tensor) else pos_grad))
        if emb_grad is not None:
            emb_grad.addmm_(block, chunk.rows)
        if proxy_grad is not None:
            write_gradient(torch.mm(block.T, unit, out=buffer[: len(chunk.rows)]), chunk, proxy_grad)
    if emb_grad is not None and inverse is not None:
        emb_grad = through_norm(emb_grad, unit, inverse)
    return pos, neg, (emb_grad, proxy_grad)


def _sum_own(exponents: Tensor, columns: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 + sum of 2^exponents) of each column, ``(n,)``, and its slopes by ln(2) exponents, ``(m,)``."""
    largest = zeros.scatter_reduce(0, columns, exponents, "amax")
    exponentials = (exponents - largest[columns]).exp2_()
    largest = largest / _LOG2_E
    rest = zeros.index_add(0, columns, exponentials).add_(largest.neg().expm1_())
    return largest + rest.log1p(), exponentials / (1 + rest)[columns]


class _ProxyAnchor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        proxies: Tensor,
        labels: Tensor,
        shift: Tensor | None,
        settings: _Settings,
        grad_enabled: bool,  # inside, grad mode is off and needs_input_grad is true even under no_grad
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embeddings, proxies, labels, shift)
        ctx.settings, ctx.grads, ctx.upstream = settings, None, None
        if settings.per_class:
            pos, neg, _ = _walk(embeddings, proxies, labels, shift, settings, None, ctx.needs_input_grad)
            return pos, neg
        num_present = len(set(labels.tolist()) if labels.is_cpu else torch.unique(labels))  # without sorting a few
        num_classes = len(proxies) if settings.shard is None else settings.shard.num_classes
        ctx.upstream = 1 / num_present, 1 / num_classes
        wanted = ctx.upstream if grad_enabled and any(ctx.needs_input_grad) else None
        pos, neg, ctx.grads = _walk(embeddings, proxies, labels, shift, settings, wanted, ctx.needs_input_grad)
        return pos.sum() / num_present, neg.sum() / num_classes

    @staticmethod
    def backward(ctx: Any, pos_grad: Tensor | None, neg_grad: Tensor | None) -> tuple[Any, ...]:
        embeddings, proxies, labels, shift = ctx.saved_tensors
        if pos_grad is None and neg_grad is None:
            return (None,) * 6
        with torch.no_grad(), full_precision(embeddings.device):
            grads, ctx.grads = ctx.grads, None  # handed over: a copy of them would cost as much as they do
            upstream: tuple[Any, Any]
            factor = 1.0
            if ctx.settings.per_class:
                zeros = embeddings.new_zeros(len(proxies))
                upstream = zeros if pos_grad is None else pos_grad, zeros if neg_grad is None else neg_grad
            else:
                factor, of_negatives = (0.0 if x is None else x.item() for x in (pos_grad, neg_grad))
                upstream = ctx.upstream
                if factor != of_negatives:  # one walk assumes one number for both parts
                    upstream = factor * upstream[0], of_negatives * upstream[1]
                    grads, factor = None, 1.0
            if grads is None:  # also in a second backward through one graph
                grads = _walk(embeddings, proxies, labels, shift, ctx.settings, upstream, ctx.needs_input_grad)[2]
            if factor != 1:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(factor)
            grads = grads[0], None if grads[1] is None else narrow(grads[1], proxies)
        inputs = (embeddings, proxies, *(x for x in (pos_grad, neg_grad) if x is not None))
        return (*first_derivative_only("Proxy-Anchor", grads, inputs), None, None, None, None)
