"""What ranks tell each other: numbers, rows of different counts, and errors."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # (see below)
from torch import Tensor

# DistributedDataParallel imports torch.distributed.nn, whose default arguments keep the group of that moment for ever:
# gloo's threads outlive destroy_process_group, and may abort the process while it exits. Imported before there is one,
# it keeps none.

Group = Any  # a ProcessGroup, or None for all ranks
T = TypeVar("T")


def world_size(group: Group) -> int:
    """Return the number of ranks, 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank_in(group: Group) -> int:
    """Return the rank of this process in a group."""
    return dist.get_rank(group)


def gather_numbers(numbers: Sequence[int], group: Group) -> list[list[int]]:
    """Return the integers of each rank; all must give the same count.

    Raises:
        RuntimeError: If a rank does not answer in time.
    """
    own = torch.tensor(numbers, dtype=torch.int64, device=_device(group))
    gathered = torch.empty(world_size(group) * len(own), dtype=torch.int64, device=own.device)
    _named("all_gather of the sizes of the batches", lambda: dist.all_gather_into_tensor(gathered, own, group=group))
    return gathered.view(-1, len(own)).tolist()


def gather_rows(x: Tensor, sizes: Sequence[int], group: Group, name: str) -> list[Tensor]:
    """Return the rows of each rank, without a graph; ranks may have different numbers of rows.

    Args:
        x: ``(sizes[rank], ...)``, of one dtype and width on all ranks.
        sizes: Number of rows of each rank.
        group: The ranks.
        name: What an error calls it.

    Raises:
        RuntimeError: If a rank does not answer in time.
    """
    most = max(sizes)
    padded = torch.zeros(most, *x.shape[1:], dtype=x.dtype, device=_device(group))
    padded[: len(x)] = x.detach()
    sent = padded.view(torch.uint8).flatten()  # bytes: not every backend knows every dtype
    gathered = torch.empty(len(sizes) * len(sent), dtype=torch.uint8, device=sent.device)
    _named(f"all_gather of {name}", lambda: dist.all_gather_into_tensor(gathered, sent, group=group))
    rows = gathered.view(x.dtype).view(len(sizes), most, *x.shape[1:]).to(x.device)
    return [part[:size] for part, size in zip(rows, sizes, strict=True)]


def all_reduce(x: Tensor, group: Group, name: str, op: str = "sum") -> Tensor:
    """Return the sum (or "max") of a tensor over the ranks, without a graph.

    Raises:
        RuntimeError: If a rank does not answer in time.
    """
    total = x.detach().to(_device(group)).clone(memory_format=torch.contiguous_format)
    kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
    _named(f"all_reduce of {name}", lambda: dist.all_reduce(total, kind, group=group))
    return total.to(x.device)


def broadcast(tensors: Sequence[Tensor], group: Group) -> None:
    """Overwrite tensors with those of the group's first rank.

    Raises:
        RuntimeError: If a rank does not answer in time.
    """
    source = dist.get_global_rank(group, 0) if group is not None else 0
    for x in tensors:
        sent = x.detach().clone().reshape(-1).view(torch.uint8).to(_device(group))
        _named("broadcast of the loss's parameters", partial(dist.broadcast, sent, source, group=group))
        with torch.no_grad():
            x.copy_(sent.to(x.device).view(x.dtype).view(x.shape))


@contextmanager
def shared_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers on all ranks, and leave each rank's own generators as they were."""
    devices = [device] if device.type == "cuda" else []  # and no other device's generator is touched
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 (PML's miners draw from it)
    with torch.random.fork_rng(devices):
        seed_generators(seed, device)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's generators of the CPU and of one device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def draw_seed() -> int:
    """Return a number from the main generator: another in each call, the same again where checkpointing runs twice."""
    return int(torch.randint(2**31, ()))


def ranks_of(group: Group) -> tuple[int, ...]:
    """Return the ranks of a group, none without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return ()
    return tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))


def _device(group: Group) -> torch.device:
    """Return where a backend wants its tensors."""
    cuda = "nccl" in str(dist.get_backend(group)) and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _named(name: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:  # a timeout, a rank that has died
        raise RuntimeError(f"{name} failed, a rank may be slow or dead: {error}") from error
