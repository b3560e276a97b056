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
        self._awaited: set[str] = set()  # parameters that are sampled with their next gradient
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}  # positions and values, on the parameter's device

    def __reduce__(self) -> tuple[type["OptimizerWatch"], tuple[()]]:
        """Begin anew in a copy: its parameters do not have the hooks of these."""
        return OptimizerWatch, ()

    def look(self, loss_func: nn.Module) -> None:
        """Look at a loss before a backward pass, in the first of ``_BATCHES`` only: a device may have to wait."""
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
                if sample is not None:
                    unchanged.append(name)
                self._await(name, parameter)
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

    def _await(self, name: str, parameter: nn.Parameter) -> None:
        """Sample a parameter when it gets a gradient, which may be cleared before the next batch."""

        def sample(parameter: Tensor) -> None:
            handle.remove()
            self._awaited.discard(name)
            positions = _positions(parameter)
            if positions is not None:
                self._samples[name] = positions, _values(parameter, positions)

        if name not in self._awaited:
            self._awaited.add(name)
            handle = parameter.register_post_accumulate_grad_hook(sample)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _positions(parameter: Tensor) -> Tensor | None:
    """Return where the numbers with the largest gradients stand, which the next step changes; None without any."""
    if parameter.grad is None or parameter.grad.is_sparse:
        return None
    grad = _local(parameter.grad)
    count = min(_SAMPLE, grad.numel())
    best, positions, start = grad.new_empty(0), torch.empty(0, dtype=torch.long, device=grad.device), 0
    for part in torch.split(grad.flatten(), _AT_ONCE):  # a copy of all would double what the loss takes
        values, indices = part.abs().topk(min(count, len(part)))
        best, order = torch.cat([best, values]).topk(min(count, len(best) + len(values)))
        positions, start = torch.cat([positions, indices + start])[order], start + len(part)
    return positions if best.any() else None


def _values(parameter: Tensor, positions: Tensor) -> Tensor:
    return _local(parameter).detach().flatten()[positions.to(parameter.device)].clone()


def _local(x: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _of_optimizers(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Return the ids of the parameters that any optimizer has: one that accumulates gradients may not have stepped yet.

    All objects are looked through, so this is asked before a warning only.
    """
    wanted = {id(parameter) for parameter in parameters}
    if not wanted:
        return set()
    optimizers = [x for x in gc.get_objects() if issubclass(type(x), torch.optim.Optimizer)]
    return wanted & {id(p) for x in optimizers for group in x.param_groups for p in group["params"]}
