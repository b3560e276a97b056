"""Notice that a loss's parameters are in no optimizer."""

import gc
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_BATCHES = 10
_SAMPLE = 8  # numbers of each parameter that are compared
_AT_ONCE = 1 << 20  # gradients that are looked through


class OptimizerWatch:
    """Warn once if parameters of a loss get gradients, stay as they are, and no optimizer has them.

    PML's trainers do not complain about a missing ``metric_loss_optimizer``: proxies and classifiers would stay random.
    """

    def __init__(self) -> None:
        self._done = False
        self._looks = 0
        self._trained: set[str] = set()
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}  # positions and values, on the parameter's device

    def look(self, loss_func: nn.Module) -> None:
        """Look at a loss before a batch; at its values in the first of ``_BATCHES`` only, where a device may wait."""
        if self._done or not (loss_func.training and torch.is_grad_enabled()):
            return
        self._looks += 1
        if self._looks % _BATCHES != 1:
            return
        parameters = {name: p for name, p in loss_func.named_parameters() if p.requires_grad and p.is_leaf}
        unchanged = []
        for name, parameter in parameters.items():
            sample = self._samples.pop(name, None)
            if sample is not None and not torch.equal(_values(parameter, sample[0]), sample[1]):
                self._trained.add(name)  # whoever stops to train it later knows it
            elif name not in self._trained:
                if sample is not None and _has_gradient(parameter, sample[0]):
                    unchanged.append(name)
                positions = _positions(parameter)
                self._samples[name] = positions, _values(parameter, positions)
        in_an_optimizer = _of_optimizers(parameters[name] for name in unchanged)
        self._trained |= {name for name in unchanged if id(parameters[name]) in in_an_optimizer}
        unchanged = [name for name in unchanged if name not in self._trained]
        self._done = bool(unchanged) or self._trained >= set(parameters)
        if unchanged:
            warnings.warn(
                f"{type(loss_func).__name__} has parameters that {_BATCHES} batches have not changed: give "
                'loss_func.parameters() to an optimizer (with PML\'s trainers: optimizers["metric_loss_optimizer"]); '
                f"unchanged: {', '.join(unchanged)}",
                stacklevel=4,
            )


@torch.no_grad()
def _positions(parameter: nn.Parameter) -> Tensor:
    """Return where a few numbers stand: with the largest gradients, which the next step changes, if there are any."""
    x = _local(parameter)
    count = min(_SAMPLE, x.numel())
    grad = _local_gradient(parameter)
    if grad is None:  # spread evenly; by integers, since float32 has none of its own above 2^24
        return torch.arange(count, device=x.device) * (x.numel() - 1) // max(count - 1, 1)
    best, positions, start = grad.new_empty(0), torch.empty(0, dtype=torch.long, device=grad.device), 0
    for part in torch.split(grad.flatten(), _AT_ONCE):  # a copy of all would double what the loss takes
        values, indices = part.abs().topk(min(count, len(part)))
        best, order = torch.cat([best, values]).topk(min(count, len(best) + len(values)))
        positions, start = torch.cat([positions, indices + start])[order], start + len(part)
    return positions


def _values(parameter: nn.Parameter, positions: Tensor) -> Tensor:
    return _local(parameter).detach().flatten()[positions.to(parameter.device)].clone()


def _has_gradient(parameter: nn.Parameter, positions: Tensor) -> bool:
    grad = _local_gradient(parameter)
    return grad is not None and bool(grad.flatten()[positions.to(grad.device)].any())


def _local(x: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _local_gradient(parameter: nn.Parameter) -> Tensor | None:
    grad = parameter.grad
    return None if grad is None or grad.is_sparse else _local(grad)


def _of_optimizers(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Return the ids of the parameters that any optimizer has: one that accumulates gradients may not have stepped yet.

    All objects are looked through, so this is asked before a warning only.
    """
    wanted = {id(parameter) for parameter in parameters}
    if not wanted:
        return set()
    optimizers = [x for x in gc.get_objects() if issubclass(type(x), torch.optim.Optimizer)]
    return wanted & {id(p) for x in optimizers for group in x.param_groups for p in group["params"]}
