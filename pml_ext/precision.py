"""Half precision: embeddings may come in it, losses are computed in float32 or better."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

_NEAR_ZERO = 2**-10


def upcast_half(x: Tensor) -> Tensor:
    """Return float32 for float16 and bfloat16, as ``widen`` does; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else widen(x, torch.float32)


def widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the same or a wider dtype, whose gradient comes back through ``narrow``."""
    if x.dtype == torch.float16 and dtype != x.dtype:
        widened: Tensor = _Widen.apply(x, dtype)
        return widened
    return x.to(dtype)


def narrow(grad: Tensor, x: Tensor) -> Tensor:
    """Return a gradient in the dtype of what it belongs to.

    Normalizing divides the gradient by the norm: for a row near zero float16 cannot hold it. Infinities would keep a
    ``GradScaler`` from ever taking a step, so there such a number gets no gradient. Other overflows stay infinite: they
    tell the scaler that its scale is too large.

    Args:
        grad: A gradient in float32 or wider.
        x: What it is the gradient by, of any dtype.
    """
    narrowed = grad.to(x.dtype)
    if x.dtype == torch.float16:
        narrowed = narrowed.masked_fill(narrowed.isinf() & (x.abs() < _NEAR_ZERO), 0.0)
    return narrowed


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast does not act on ``device``."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def full_precision_in_backward(outputs: Iterable[Tensor], inputs: Iterable[Tensor | None]) -> None:
    """Keep autocast away from the gradients of what has been computed, wherever ``backward()`` is called.

    Autograd's own formulas are cast too where backward runs under autocast. Each node of the graph between gets a hook
    that turns it off; autograd itself restores the state before the next node. Compiled graphs are left alone.

    Args:
        outputs: What was computed.
        inputs: What from: the graph ahead of them is not ours.
    """
    if torch.compiler.is_compiling():
        return
    seen: set[Any] = {x.grad_fn for x in inputs if x is not None}
    for output in outputs:
        hook, waiting = partial(_leave_autocast, output.device.type), [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen or not node.next_functions:  # the last: a leaf, which computes nothing
                continue
            seen.add(node)
            node.register_prehook(hook)
            waiting += [following for following, _ in node.next_functions]


def _leave_autocast(device_type: str, _: Any) -> None:
    torch.set_autocast_enabled(device_type, False)


class _Widen(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return narrow(grad, *ctx.saved_tensors), None
