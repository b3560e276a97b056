"""log(1 + sum of exponentials), the sum in Multi-Similarity and Proxy-Anchor."""

import torch
from torch import Tensor


def log1p_sum_exp(exponents: Tensor, keep: Tensor, dim: int) -> Tensor:
    r"""Return $\log(1 + \sum e^x)$ over the entries to keep: 0, and so is the gradient, where there are none.

    Safe from overflow, differentiable any number of times.

    Args:
        exponents: $x$, a matrix of floats.
        keep: A bool mask of its shape.
        dim: What to sum over.
    """
    total = exponents.masked_fill(~keep, torch.finfo(exponents.dtype).min).logsumexp(dim)
    return torch.logaddexp(total, torch.zeros_like(total))
