"""A call that is refused leaves no trace."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor, nn

from pml_ext.pml_internals import statistics_of
from pml_ext.validation import validation_wanted

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)
_kept_outside: ContextVar[bool] = ContextVar("pml_ext_kept_outside", default=False)


def unchanged_where_refused(module: nn.Module) -> AbstractContextManager[None]:
    """Restore statistics, running norms and memories of a module where what is inside raises.

    Nothing is kept where input is not checked: compiled, validation off, or inside a module that keeps it.
    """
    return _kept(module) if validation_wanted() and not _kept_outside.get() else nullcontext()


def leaves_no_trace_where_refused(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Let a method of a module restore it where the method raises."""

    @wraps(method)
    def kept(self: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with unchanged_where_refused(self):
            return method(self, *args, **kwargs)

    return kept


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    restores = _restores(module)
    token = _kept_outside.set(True)
    try:
        yield
    except Exception:
        for restore in restores:
            restore()
        raise
    finally:
        _kept_outside.reset(token)


def _restores(module: nn.Module) -> list[Callable[[], None]]:
    restores: list[Callable[[], None]] = []
    for part in module.modules():
        if statistics := statistics_of(part):
            restores.append(partial(vars(part).update, statistics))
        if plain := {name: x for name, x in vars(part).items() if isinstance(x, Tensor)}:  # what others keep there
            restores += [partial(_copy, x, x.clone()) for x in plain.values() if not x.requires_grad]
            restores.append(partial(vars(part).update, plain))
        if hasattr(type(part), "saved_state"):
            saved_state: Any = part.saved_state
            restores.append(saved_state())
        elif part._buffers and part.training and not isinstance(part, BaseMetricLossFunction):  # whose are constants
            restores += [partial(_copy, x, x.clone()) for x in part.buffers(recurse=False)]
    return restores


@torch.no_grad()
def _copy(x: Tensor, old: Tensor) -> None:
    x.copy_(old)
