"""log(1 + sum of exponentials), the sum in Multi-Similarity and Proxy-Anchor: safe from overflow, any derivative."""

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
