"""log(1 + sum of exponentials), the sum in Multi-Similarity and Proxy-Anchor, in few passes over memory.

Each function has a plain form, which ``torch.compile`` fuses and which can be differentiated any number of times, and
an autograd function that takes the gradient from the exponentials of the forward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    r"""One term of ``sum_log1p_sum_exp``: $w \log(1 + \sum_j e^{a m_{ij} + b})$.

    Attributes:
        drop: The entries to leave out of the sum, a bool mask like the matrix.
        scale: $a$.
        shift: $b$.
        weight: $w$.
    """

    drop: Tensor
    scale: float
    shift: float
    weight: float = 1.0


def sum_log1p_sum_exp(mat: Tensor, terms: list[Term]) -> Tensor:
    """Return the sum of the terms for each row of a matrix.

    Safe from overflow. A term is 0, and so is its gradient, where nothing is kept.

    Args:
        mat: ``(B, R)``, float32 or float64.
        terms: What to add up.

    Returns:
        ``(B,)``.
    """
    if _is_plain_better(mat):
        return _plain_sum(mat, terms)
    value: Tensor = _SumLog1pSumExp.apply(mat, terms)[0]
    return value


def class_log1p_sum_exp(
    mat: Tensor, labels: Tensor, scale: float, shift: float, sample_shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""Return, for each class, log(1 + sum of exponentials) over its own samples, and over those of other classes.

    $$P_c = \log(1 + \sum_{i: y_i = c} e^{a m_{ic} + b + b_i}) \qquad
      N_c = \log(1 + \sum_{i: y_i \ne c} e^{-a m_{ic} + b + b_i})$$

    Safe from overflow. 0, and so is the gradient, where there is no sample.

    Args:
        mat: ``(B, C)``, float32 or float64.
        labels: ``(B,)``, int64 in 0 to C - 1.
        scale: $a$.
        shift: $b$.
        sample_shift: $b_i$, ``(B,)``, without gradient. None: 0.

    Returns:
        Two tensors ``(C,)``.
    """
    if _is_plain_better(mat):
        return _plain_class_sums(mat, labels, scale, shift, sample_shift)
    pos, neg, *_ = _ClassLog1pSumExp.apply(mat, labels, scale, shift, sample_shift)
    return pos, neg


def _is_plain_better(mat: Tensor) -> bool:
    return torch.compiler.is_compiling() or not (mat.requires_grad and torch.is_grad_enabled() and mat.numel())


def _exponents(mat: Tensor, term: Term) -> Tensor:
    return (mat * term.scale + term.shift).masked_fill(term.drop, torch.finfo(mat.dtype).min)


def _plain_sum(mat: Tensor, terms: list[Term]) -> Tensor:
    total = mat.new_zeros(())
    for term in terms:
        total = total + term.weight * _log1p_exp(_exponents(mat, term).logsumexp(1))
    return total


def _class_exponents(
    mat: Tensor, labels: Tensor, scale: float, shift: float, sample_shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    own = labels[:, None]
    pos_exp, neg_exp = mat.gather(1, own).squeeze(1) * scale + shift, mat * -scale + shift
    if sample_shift is not None:
        pos_exp, neg_exp = pos_exp + sample_shift, neg_exp + sample_shift[:, None]
    return pos_exp, neg_exp.scatter(1, own, torch.finfo(mat.dtype).min)


def _plain_class_sums(
    mat: Tensor, labels: Tensor, scale: float, shift: float, sample_shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    pos_exp, neg_exp = _class_exponents(mat, labels, scale, shift, sample_shift)
    neg = _log1p_exp(neg_exp.logsumexp(0))
    zeros = mat.new_zeros(mat.shape[1])
    largest = zeros.scatter_reduce(0, labels, pos_exp.detach(), "amax")  # of 0 and the exponents, since 1 = exp(0)
    total = (-largest).exp().index_add(0, labels, (pos_exp - largest[labels]).exp())
    return largest + total.log(), neg


def _log1p_exp(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _exponentials(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Turn exponents, in place, into exp(x) / (1 + sum of exp(x)); return log(1 + sum of exp(x)) and them."""
    largest = x.amax(dim, keepdim=True).clamp_min_(0)  # of 0 and the exponents, since 1 = exp(0)
    x.sub_(largest).exp_()
    total = x.sum(dim, keepdim=True).add_(largest.neg().exp_())
    x.div_(total)
    return total.log_().add_(largest).squeeze(dim), x


class _SumLog1pSumExp(torch.autograd.Function):
    @staticmethod
    def forward(mat: Tensor, terms: list[Term]) -> tuple[Tensor, Tensor]:
        values, slopes = [], []
        for term in terms:
            x = mat.mul(term.scale).add_(term.shift).masked_fill_(term.drop, torch.finfo(mat.dtype).min)
            value, x = _exponentials(x, 1)
            values.append(value.mul_(term.weight))
            slopes.append(x.mul_(term.weight * term.scale))
        for value, slope in zip(values[1:], slopes[1:], strict=True):
            values[0] += value
            slopes[0] += slope
        return values[0], slopes[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[Term]], output: tuple[Tensor, Tensor]) -> None:
        mat, ctx.terms = inputs
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(mat, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        mat, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can be differentiated again
            slope = torch.zeros_like(mat)
            for term in ctx.terms:
                x = _exponents(mat, term)
                value = _log1p_exp(x.logsumexp(1, keepdim=True))
                slope = slope + term.weight * term.scale * (x - value).exp()
        return slope * grad[:, None], None


class _ClassLog1pSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        mat: Tensor, labels: Tensor, scale: float, shift: float, sample_shift: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = labels[:, None]
        pos_exp, neg_exp = mat.gather(1, own).squeeze(1).mul_(scale).add_(shift), mat.mul(-scale).add_(shift)
        if sample_shift is not None:
            pos_exp += sample_shift
            neg_exp += sample_shift[:, None]
        neg, neg_slope = _exponentials(neg_exp.scatter_(1, own, torch.finfo(mat.dtype).min), 0)
        largest = mat.new_zeros(mat.shape[1]).scatter_reduce_(0, labels, pos_exp, "amax")
        pos_slope = pos_exp.sub_(largest[labels]).exp_()
        total = largest.neg().exp_().index_add_(0, labels, pos_slope)
        pos_slope.div_(total[labels]).mul_(scale)
        return total.log_().add_(largest), neg, pos_slope, neg_slope.mul_(-scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mat, labels, ctx.scale, ctx.shift, sample_shift = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(mat, labels, sample_shift, *output[2:])

    @staticmethod
    def backward(
        ctx: Any, pos_grad: Tensor | None, neg_grad: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        mat, labels, sample_shift, pos_slope, neg_slope = ctx.saved_tensors
        own = labels[:, None]
        if torch.is_grad_enabled():
            pos, neg = _plain_class_sums(mat, labels, ctx.scale, ctx.shift, sample_shift)
            pos_exp, neg_exp = _class_exponents(mat, labels, ctx.scale, ctx.shift, sample_shift)
            pos_slope = ctx.scale * (pos_exp - pos[labels]).exp()
            neg_slope = -ctx.scale * (neg_exp - neg).exp()
        grad = torch.zeros_like(mat) if neg_grad is None else neg_slope * neg_grad
        if pos_grad is not None:  # the slope of the others' sum is 0 there
            grad = grad.scatter(1, own, (pos_slope * pos_grad[labels])[:, None])
        return grad, None, None, None, None
