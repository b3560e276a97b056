"""Gradients that are computed by hand and cannot be differentiated again."""

from typing import Any

import torch
from torch import Tensor


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
