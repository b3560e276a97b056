"""A call that is refused leaves no trace."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor, nn

from pml_ext.pml_internals import statistics_of
from pml_ext.validation import validation_wanted


def unchanged_where_refused(module: nn.Module) -> AbstractContextManager[None]:
    """Restore statistics, running norms and memories of a loss where what is inside raises.

    Nothing is kept where input is not checked: compiled, validation off, or inside of a loss that keeps it.
    """
    return _kept(module) if validation_wanted() else nullcontext()


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    restores = _restores(module)
    try:
        yield
    except Exception:
        for restore in restores:
            restore()
        raise


def _restores(module: nn.Module) -> list[Callable[[], None]]:
    restores: list[Callable[[], None]] = []
    for part in module.modules():
        if statistics := statistics_of(part):
            restores.append(partial(vars(part).update, statistics))
        if hasattr(type(part), "saved_state"):
            saved_state: Any = part.saved_state
            restores.append(saved_state())
        elif part._buffers and part.training and not isinstance(part, BaseMetricLossFunction):  # whose are constants
            restores += [partial(_copy, x, x.clone()) for x in part.buffers(recurse=False)]
    return restores


@torch.no_grad()
def _copy(x: Tensor, old: Tensor) -> None:
    x.copy_(old)
