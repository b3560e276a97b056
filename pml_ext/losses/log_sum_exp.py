"""Logarithms of sums of exponentials: safe from overflow, any derivative."""

import torch
from torch import Tensor


def log1p_sum_exp(exponents: Tensor, keep: Tensor, dim: int) -> Tensor:
    r"""Return $\log(1 + \sum e^x)$ over the entries to keep: 0, and so is the gradient, where there are none.

    Args:
        exponents: $x$, a matrix of floats.
        keep: A bool mask of its shape.
        dim: What to sum over.
    """
    x = exponents.masked_fill(~keep, -torch.inf)
    largest = x.new_zeros(())
    if x.shape[dim]:
        largest = x.detach().amax(dim, keepdim=True).clamp_min(0)  # of the exponents and 0, since 1 = exp(0)
    rest = (x - largest).exp().sum(dim, keepdim=True) + torch.expm1(-largest)  # the sum, with its 1, is 1 + rest
    return (rest.log1p() + largest).squeeze(dim)


def log1p_sum_exp_by_class(exponents: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Return $\log(1 + \sum e^x)$ over each class's own entries, ``(num_classes,)``; 0 for a class without.

    Args:
        exponents: $x$, ``(B,)``, floats.
        labels: ``(B,)``, int64 in 0 to ``num_classes`` - 1.
        num_classes: C.
    """
    zeros = exponents.new_zeros(num_classes)
    largest = zeros.scatter_reduce(0, labels, exponents.detach(), "amax")  # of the exponents and 0
    rest = torch.expm1(-largest).index_add(0, labels, (exponents - largest[labels]).exp())
    return rest.log1p() + largest


def log_sum_exp(exponents: Tensor, keep: Tensor) -> Tensor:
    r"""Return $\log \sum e^x$ of each row over the entries to keep, ``(B,)``: -inf where there are none.

    Args:
        exponents: $x$, ``(B, R)``, floats.
        keep: A bool mask of its shape.
    """
    some = keep.any(1)
    x = exponents.masked_fill(~keep, torch.finfo(exponents.dtype).min)  # not -inf, whose sum has no gradient
    return x.logsumexp(1).masked_fill(~some, -torch.inf)


def log_sum_exp_by_row(exponents: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    r"""Return $\log \sum e^x$ over the entries of each row, ``(num_rows,)``: -inf for a row without.

    Args:
        exponents: $x$, ``(P,)``, floats.
        rows: ``(P,)``, int64 in 0 to ``num_rows`` - 1.
        num_rows: B.
    """
    zeros = exponents.new_zeros(num_rows)
    largest = zeros.scatter_reduce(0, rows, exponents.detach(), "amax", include_self=False)
    total = zeros.index_add(0, rows, (exponents - largest[rows]).exp())
    none = total == 0
    return (total.masked_fill(none, 1.0).log() + largest).masked_fill(none, -torch.inf)
