"""What ranks must have alike and no collective carries: settings, modes, weights."""

import inspect
import json
import zlib
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pml_ext.distributed.collectives import Group, gather_numbers, gather_rows
from pml_ext.pml_internals import settings_of, statistics_of
from pml_ext.strict_json import strict_json


def check_same_settings(name: str, module: nn.Module, group: Group) -> None:
    """Compare what every part of a module is set up with, and its parameters and buffers, with those of all ranks.

    Args:
        name: What a message calls the module.
        module: A wrapper with a loss or a miner inside.
        group: The ranks.

    Raises:
        ValueError: On all ranks, if one differs; the message names the first thing that does.
        RuntimeError: If a rank does not answer in time.
    """
    own = _settings(module)
    text = strict_json(own).encode()
    if len({row[0] for row in gather_numbers([zlib.crc32(text)], group)}) == 1:
        return
    sizes = [row[0] for row in gather_numbers([len(text)], group)]
    rows = gather_rows(torch.frombuffer(bytearray(text), dtype=torch.uint8), sizes, group, "the settings")
    for rank, row in enumerate(rows):
        theirs = json.loads(bytes(row.tolist()))
        for key in [*own, *theirs]:
            if own.get(key) != theirs.get(key):
                here, there = (x.get(key, "nothing") for x in (own, theirs))
                raise ValueError(
                    f"{name} must be the same on all ranks, got {key} = {here} here, {there} on rank {rank}"
                )
    raise ValueError(f"{name} must be the same on all ranks, got one that differs on other ranks")


def _settings(module: nn.Module) -> dict[str, str]:
    """Return types, modes, numbers and words by path, and a sum of the bits of each tensor; no statistics."""
    settings = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        settings[f"{prefix}type"] = type(part).__name__
        for name in sorted(_names(part) - set(statistics_of(part))):
            value = getattr(part, name, None)
            if isinstance(value, Number | str | None):
                settings[prefix + name] = str(value)
            elif isinstance(value, Tensor) and name in vars(part):  # neither a parameter nor a buffer
                settings[prefix + name] = _described(value)
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            settings[f"{prefix}extra state"] = str(part.get_extra_state())
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        settings[name] = _described(x)
    return settings


def _described(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} requires_grad={x.requires_grad} {_checksum(x)}"


def _names(part: nn.Module) -> set[str]:
    """Return what a module may be set up with: arguments of its constructors, which keep them under these names."""
    made_by = (vars(cls)["__init__"] for cls in type(part).__mro__[:-1] if "__init__" in vars(cls))
    arguments = (name for init in made_by for name in inspect.signature(init).parameters)
    return {"training", *arguments, *settings_of(part)}


@torch.no_grad()
def _checksum(x: Tensor) -> Any:
    """Return a number that tells tensors of one shape apart, also those of the same rows in another order."""
    if isinstance(x, DTensor):  # each rank has its own part
        return "split"
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if x.element_size() not in words:
        return ""
    bits = x.detach().contiguous().view(words[x.element_size()])
    rows = bits.flatten(1) if bits.ndim > 1 else bits.reshape(-1, 1)
    sums = rows.sum(1, dtype=torch.int64)
    odd = 2 * torch.arange(len(sums), device=sums.device) + 1
    return int((sums * odd).sum())  # integers that wrap around
