"""The sum that Multi-Similarity and Proxy-Anchor share: log(1 + sum of exponentials), in few passes over memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    r"""One term of ``sum_log1p_sum_exp``: $w \log(1 + \sum_j e^{a m_{ij} + b_{ij}})$.

    Attributes:
        drop: The entries to leave out of the sum: a bool mask like the matrix, or ``(B, 1)``, int64, the one column to
            leave out in each row.
        scale: $a$.
        shift: $b$, a number or a tensor that broadcasts to the matrix and needs no gradient.
        weight: $w$.
    """

    drop: Tensor
    scale: float
    shift: float | Tensor
    weight: float = 1.0


def sum_log1p_sum_exp(mat: Tensor, terms: list[Term], dim: int) -> Tensor:
    """Return the sum of the terms for each row (``dim=1``) or column (``dim=0``) of a matrix.

    Safe from overflow. A term is 0, and so is its gradient, where nothing is kept. The forward pass keeps one matrix
    for the gradient, made from the exponentials that it has anyway. Can be differentiated twice.

    Args:
        mat: ``(B, R)``, float32 or float64.
        terms: What to add up.
        dim: 0 to sum exponentials over rows, 1 over columns.

    Returns:
        ``(R,)`` for ``dim=0``, ``(B,)`` for ``dim=1``.
    """
    saves_a_pass = mat.requires_grad and torch.is_grad_enabled() and mat.numel()
    if torch.compiler.is_compiling() or not saves_a_pass:
        values = [term.weight * _log1p_sum_exp(mat, term, dim) for term in terms]
        return values[0] if len(values) == 1 else torch.stack(values).sum(0)
    value: Tensor = _SumLog1pSumExp.apply(mat, terms, dim)[0]
    return value


def _exponents(mat: Tensor, term: Term) -> Tensor:
    x = mat * term.scale + term.shift
    lowest = torch.finfo(x.dtype).min
    return x.masked_fill(term.drop, lowest) if term.drop.dtype == torch.bool else x.scatter(1, term.drop, lowest)


def _log1p_sum_exp(mat: Tensor, term: Term, dim: int) -> Tensor:
    lse = _exponents(mat, term).logsumexp(dim)
    return torch.logaddexp(lse, torch.zeros_like(lse))


def _value_and_slope(mat: Tensor, term: Term, dim: int) -> tuple[Tensor, Tensor]:
    """Return a term and its derivative by each entry, changing in place all but the first copy of the matrix."""
    x = mat.mul(term.scale).add_(term.shift)
    lowest = torch.finfo(x.dtype).min
    x = x.masked_fill_(term.drop, lowest) if term.drop.dtype == torch.bool else x.scatter_(1, term.drop, lowest)
    largest = x.amax(dim, keepdim=True).clamp_min_(0)  # of the exponents and 0, since 1 = exp(0)
    x.sub_(largest).exp_()
    total = x.sum(dim, keepdim=True).add_(largest.neg().exp_())
    x.mul_(term.weight * term.scale / total)
    return total.log_().add_(largest).mul_(term.weight).squeeze(dim), x


class _SumLog1pSumExp(torch.autograd.Function):
    @staticmethod
    def forward(mat: Tensor, terms: list[Term], dim: int) -> tuple[Tensor, Tensor]:
        value, slope = _value_and_slope(mat, terms[0], dim)
        for term in terms[1:]:
            next_value, next_slope = _value_and_slope(mat, term, dim)
            value += next_value
            slope += next_slope
        return value, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, list[Term], int], output: tuple[Tensor, Tensor]) -> None:
        mat, ctx.terms, ctx.dim = inputs
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(mat, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        mat, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True wants a slope that can be differentiated again
            slope = torch.zeros_like(mat)
            for term in ctx.terms:
                value = _log1p_sum_exp(mat, term, ctx.dim).unsqueeze(ctx.dim)
                slope = slope + term.weight * term.scale * (_exponents(mat, term) - value).exp()
        return slope * grad.unsqueeze(ctx.dim), None, None
