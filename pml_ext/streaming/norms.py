"""Normalisation of rows and its gradient, by hand."""

import torch
from torch import Tensor

_EPS = 1e-12  # torch.nn.functional.normalize's


def inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / |x| of each row, ``(N, 1)``; 1e12 for a row of zeros, as ``torch.nn.functional.normalize`` has it."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(_EPS).reciprocal()


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient by x, given the gradient by x / |x|.

    Args:
        grad: ``(N, D)``.
        unit: x / |x|, ``(N, D)``.
        inverse: 1 / |x|, ``(N, 1)``.
    """
    along = (grad * unit).sum(1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1) * inverse
