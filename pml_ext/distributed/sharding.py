"""Classes split over ranks: who has which, tensors of them, and what ranks exchange."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as SplitAlong

from pml_ext.distributed.collectives import Group, all_reduce, draw_seed, gather_numbers, ranks_of, seed_generators
from pml_ext.distributed.gathered_batch import FailedElsewhereError, confirm
from pml_ext.streaming.gradients import first_derivative_only
from pml_ext.streaming.proxy_chunks import Shard

_batch: ContextVar[tuple[tuple[int, ...] | None, Group]] = ContextVar("pml_ext_batch", default=(None, None))


@contextmanager
def whole_batch(ranks: tuple[int, ...] | None, group: Group) -> Iterator[None]:
    """Tell the losses called inside which ranks give them the same batch, that of all these ranks. None: no others."""
    token = _batch.set((ranks, group))
    try:
        yield
    finally:
        _batch.reset(token)


def _reduce(x: Tensor, group: Group, name: str, op: str = "sum") -> Tensor:
    """Return the sum or largest over ranks, if none of those that have the batch has failed: it would not come here.

    Raises:
        FailedElsewhereError: If one has.
    """
    try:
        confirm(None, 0, _batch.get()[1])
    except ValueError as told:
        raise FailedElsewhereError(str(told)) from None
    return all_reduce(x, group, name, op)


class ClassShards:
    """Consecutive classes on each rank, as many as on every other, the last ranks fewer.

    Args:
        num_classes: How many there are in all.
        process_group: A process group, or a device mesh of one dimension.

    Attributes:
        first: The first class of this rank.
        stop: The last class of the shard + 1.

    Raises:
        TypeError: If ``process_group`` is neither.
        ValueError: If torch.distributed is not initialized, or the mesh has several dimensions.
    """

    def __init__(self, num_classes: int, process_group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("process_group must be given after torch.distributed.init_process_group, got one before")
        if isinstance(process_group, DeviceMesh):
            if process_group.ndim != 1:
                raise ValueError(f"process_group must be a mesh of one dimension, got {process_group.ndim}")
            self.mesh = process_group
        elif isinstance(process_group, dist.ProcessGroup):
            kind = "cuda" if "nccl" in str(dist.get_backend(process_group)) else "cpu"
            self.mesh = DeviceMesh.from_group(process_group, kind)
        else:
            raise TypeError(f"process_group must be a ProcessGroup or a DeviceMesh, got {type(process_group).__name__}")
        self.num_classes = num_classes
        self.rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        most = -(-num_classes // ranks)  # as torch.chunk, and with it DTensor, splits rows
        self.first = min(self.rank * most, num_classes)
        self.stop = min(self.first + most, num_classes)

    @property
    def group(self) -> Group:
        """The ranks; not kept here, or gloo's threads would outlive ``destroy_process_group``."""
        return self.mesh.get_group()

    def of_this_batch(self) -> Shard:
        """Return what the walks over proxies want to know.

        Raises:
            RuntimeError: If the batch is not that of all ranks.
        """
        ranks, own = _batch.get()[0], ranks_of(self.group)
        if ranks is None:
            raise RuntimeError(
                "a loss with process_group must be called through pml_ext.distributed.DistributedLossWrapper with "
                "efficient=False, which gives all ranks the whole batch"
            )
        if not set(own) <= set(ranks):
            raise RuntimeError(
                f"process_group of the loss must lie within that of DistributedLossWrapper, ranks {list(ranks)}, got "
                f"{list(own)}"
            )
        name = "what the shards of the classes have found"
        total, largest = (partial(_reduce, group=self.group, name=name, op=op) for op in ("sum", "max"))
        return Shard(self.first, self.num_classes, total, largest)

    def distribute(self, local: Tensor, whole: tuple[int, ...], dim: int = 0) -> DTensor:
        """Return this rank's part of a tensor as a tensor of all ranks, split along ``dim``."""
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, [SplitAlong(dim)], run_check=False, shape=torch.Size(whole), stride=stride
        )

    def own_part(self, x: Tensor, dim: int = 0) -> DTensor:
        """Return a tensor that each rank has whole as one of which each keeps its classes' part along ``dim``."""
        return self.distribute(x.narrow(dim, self.first, self.stop - self.first).clone(), tuple(x.shape), dim)

    def draw(self, embedding_size: int, init: Callable[[Tensor], Any]) -> nn.Parameter:
        """Return proxies, initialized with the widths of the whole and other numbers on each rank.

        Raises:
            ValueError: If ranks differ in their sizes.
        """
        shape = self.num_classes, embedding_size
        parameter = nn.Parameter(self.distribute(torch.empty(self.stop - self.first, embedding_size), shape))
        told = gather_numbers([draw_seed(), *shape], self.group)
        if any(row[1:] != told[0][1:] for row in told):
            raise ValueError(
                f"num_classes and embedding_size must be the same on all ranks, got {[row[1:] for row in told]}"
            )
        devices = [parameter.device] if parameter.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            seed_generators(told[0][0] * 1009 + self.rank, parameter.device)
            init(parameter)
        return parameter

    def sum_gradients(self, x: Tensor) -> Tensor:
        """Return a tensor that all ranks have, whose gradient is the sum of what the ranks' classes give."""
        summed: Tensor = _SumGradient.apply(x, self.group)
        return summed

    def sum_values(self, x: Tensor) -> Tensor:
        """Return the sum over ranks; each rank's part gets the gradient of the sum."""
        total: Tensor = _SumValue.apply(x, self.group)
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClassShards":
        return self  # groups are not copied


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed = all_reduce(grad, ctx.group, "the gradient of the embeddings")
        return first_derivative_only("A loss with split classes", (summed,), (grad,))[0], None


class _SumValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _reduce(x, group, "the loss of the shards of the classes")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
