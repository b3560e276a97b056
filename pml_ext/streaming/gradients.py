"""Gradients by hand: through the normalization of rows, and of first order only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_EPS = 1e-12  # torch.nn.functional.normalize's


def inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / |x| of each row, ``(N, 1)``; 1e12 for a row of zeros, as ``torch.nn.functional.normalize`` has it."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(_EPS).reciprocal()


def unit_rows(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Return x / |x| and 1 / |x|, or x and None."""
    if not normalize:
        return x, None
    inverse = inverse_norm(x)
    return x * inverse, inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient by x, given the gradient by x / |x|.

    A row shorter than 1e-12 is divided by that, a constant: its gradient keeps the part along x.

    Args:
        grad: ``(N, D)``.
        unit: x / |x|, ``(N, D)``.
        inverse: 1 / |x|, ``(N, 1)``.
    """
    return torch.addcmul(grad, unit, along_unit(grad, unit, inverse), value=-1) * inverse


def along_unit(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Return the part of each row of a gradient along x, ``(N, 1)``, that normalizing takes away."""
    return (grad * unit).sum(1, keepdim=True) * (inverse < 1 / _EPS)


def quick_apply(function: Any) -> Callable[..., Any]:
    """Return the ``apply`` of an autograd function with ``setup_context``, faster where ``torch.func`` is not at work.

    PyTorch inspects the signature of such a function at each call, for longer than a small batch takes to compute.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    quick: Any = type(function.__name__, (torch.autograd.Function,), methods)
    return lambda *inputs: (function if torch._C._are_functorch_transforms_active() else quick).apply(*inputs)


def first_derivative_only(name: str, grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> list[Any]:
    """Return gradients that raise when they are differentiated, where ``create_graph=True`` asks for such.

    Autograd would take them for constants otherwise, and second derivatives would silently be wrong.

    Args:
        name: What cannot be differentiated twice.
        grads: The gradients, some may be None.
        inputs: What they depend on, the gradients from above included.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    return [None if grad is None else _FirstDerivative.apply(name, grad, *inputs) for grad in grads]


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name} is streamed and has no second derivatives: use a dense loss of the same value "
            "(pytorch_metric_learning's) for gradient penalties"
        )
