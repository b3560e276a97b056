"""Notice that a loss's parameters are in no optimizer."""

import warnings

import torch
from torch import nn

_BATCHES = 100  # more than gradients are accumulated over


class OptimizerWatch:
    """Warn once if parameters of a loss get gradients and stay as they are.

    PML's trainers do not complain about a missing ``metric_loss_optimizer``: proxies and classifiers would stay random.
    """

    def __init__(self) -> None:
        self._done = False
        self._version: int | None = None
        self._unchanged = 0

    def look(self, loss_func: nn.Module) -> None:
        """Look at a loss before a batch."""
        if self._done or not (loss_func.training and torch.is_grad_enabled()):
            return
        parameter = next((p for p in loss_func.parameters() if p.requires_grad), None)
        if parameter is None or not parameter.is_leaf:
            return
        version = parameter._version
        self._done = self._version not in (None, version)  # somebody trains them
        self._version = version
        if self._done or parameter.grad is None:
            return
        self._unchanged += 1
        if self._unchanged > _BATCHES:
            self._done = True
            warnings.warn(
                f"{type(loss_func).__name__} has parameters that {_BATCHES} batches have not changed: give "
                'loss_func.parameters() to an optimizer (with PML\'s trainers: optimizers["metric_loss_optimizer"])',
                stacklevel=4,
            )
