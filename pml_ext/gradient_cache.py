"""Batches that do not fit into memory: the network runs chunk by chunk, the loss sees all embeddings."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pml_ext.types import Indices
from pml_ext.validation import check_count

__all__ = ["cached_backward"]

_TF32 = 2**-10  # the rounding of float32 products on GPUs, where that is allowed


def cached_backward(
    trunk: nn.Module,
    loss_func: Callable[..., Tensor],
    images: Any,
    labels: Tensor,
    chunk_size: int,
    miner: Callable[..., Indices] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    r"""Compute the gradients of a batch's loss with the memory of a chunk; takes the place of ``loss.backward()``.

    The loss sees the embeddings of the whole batch, so that this is no gradient accumulation over small batches, which
    have fewer pairs. Two walks over the chunks:

    1. The network embeds each chunk, without a graph. The loss of all embeddings $L$ gives $\partial L / \partial x_i$,
       and the gradients of its own parameters.
    2. The network embeds each chunk again, and passes the chunk's part of $\partial L / \partial x_i$ back.

    The second walk begins with the random states (PyTorch's, NumPy's and Python's) and the buffers that the first one
    began with: dropout has the same masks, and running statistics move once a chunk, not twice. Afterwards the random
    states are those behind the loss, as if there had been one walk. A batch of one chunk takes one walk, as usual.

    Batch norms that normalise with the statistics of what they are given see those of a chunk: the gradients are exact
    for that network, which is not the one that sees the whole batch. With ``freeze_batch_norm``, batch norms in
    evaluation mode, layer or group norms there is no difference.

    Args:
        trunk: The network, one chunk to ``(n, D)``. With an embedder apart: ``nn.Sequential(trunk, embedder)``. A
            ``DistributedDataParallel`` sends its gradients with the last chunk. Only what its embeddings depend on gets
            gradients.
        loss_func: Called with the embeddings, ``(B, D)``, the labels and, if there is a miner, the indices. Any loss
            of PML or of this package, also in our ``DistributedLossWrapper``; or a function.
        images: The batch: a tensor, or a tuple or mapping of tensors, all with B rows. Or parts of it: a list, or
            another iterable that can be walked twice, of tensors, tuples or mappings, none of which needs to fit into
            the network. Chunks are moved to the device of the trunk's first parameter.
        labels: ``(B,)``, as the loss wants them.
        chunk_size: Largest number of images that the network gets at a time, >= 1.
        miner: Called with embeddings and labels.
        autocast: dtype of the network's forward; the embeddings are then raised to float32. None: as it is outside.
        scaler: Scales the loss; its ``step`` and ``update`` are called outside, as the optimizer's.

    Returns:
        The loss, detached and not scaled. Gradients are added to those that are there; no optimizer steps.

    Raises:
        TypeError: If ``trunk`` is no module, ``images`` can be walked only once or hold something other than tensors,
            or the trunk or the loss returns something else.
        ValueError: If ``chunk_size`` is no integer >= 1, ``images``, ``labels`` and what the trunk returns have
            different lengths, the loss does not depend on the embeddings, or a ``DistributedDataParallel`` has
            ``static_graph``.
        RuntimeError: If the second walk gives other embeddings or has other chunks than the first: the images are
            others, or the network draws from a generator of its own. The gradients are wrong then.

    Examples:
        >>> from pml_ext.losses import MultiSimilarityLoss
        >>> _ = torch.manual_seed(0)
        >>> trunk, images, labels = nn.Linear(6, 4), torch.randn(8, 6), torch.arange(8) // 2
        >>> loss = cached_backward(trunk, MultiSimilarityLoss(), images, labels, chunk_size=3)
        >>> cached = trunk.weight.grad.clone()
        >>> trunk.zero_grad()
        >>> MultiSimilarityLoss()(trunk(images), labels).backward()
        >>> torch.allclose(cached, trunk.weight.grad)
        True

    Source:
        Gao, Zhang, Han, Callan: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
        2021. The paper keeps one random state a chunk, and does not treat buffers.
    """
    check_count("chunk_size", chunk_size)
    if not isinstance(trunk, nn.Module):
        raise TypeError(f"trunk must be a torch.nn.Module, whose buffers can be seen, got a {type(trunk).__name__}")
    if not isinstance(labels, Tensor) or not labels.ndim:
        raise TypeError(f"labels must be a tensor (B,), got {labels!r}")
    if isinstance(images, Iterator) or not isinstance(images, Iterable):
        raise TypeError(f"images must be tensors, or chunks that can be walked twice, got a {type(images).__name__}")

    def backward_of_loss(embeddings: Tensor) -> Tensor:
        if len(embeddings) != len(labels) or not len(labels):
            raise ValueError(f"labels must have a row for each image, got {len(labels)} for {len(embeddings)}")
        mined = () if miner is None else (miner(embeddings, labels),)
        loss = loss_func(embeddings, labels, *mined)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TypeError(f"loss_func must return a tensor of one number, got {got}")
        torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
        return loss.detach()

    parallel = [m for m in trunk.modules() if isinstance(m, DistributedDataParallel)]
    if any(ddp.static_graph for ddp in parallel):  # whose first iteration cannot wait for the last chunk
        raise ValueError("trunk must be DistributedDataParallel without static_graph, got static_graph=True")
    if _is_batch(images) and _rows(images) <= chunk_size and not parallel:  # all ranks walk alike, whatever they have
        return backward_of_loss(_embed(trunk, _to(trunk, images), autocast))

    start, learns = _State(trunk), any(p.requires_grad for p in trunk.parameters())
    parts: list[Tensor] = []
    with torch.no_grad():
        for chunk in _chunks(images, chunk_size):
            with nullcontext() if parts else start.behind_broadcast(parallel):
                parts.append(_embed(trunk, _to(trunk, chunk), autocast))
            learns = learns or any(x.requires_grad for x in _tensors_in(chunk))
    embeddings, lengths = torch.cat(parts or [torch.empty(0)]), [len(part) for part in parts]
    del parts  # one copy is enough
    loss = backward_of_loss(embeddings.requires_grad_(learns))
    if not learns:
        return loss
    if embeddings.grad is None:
        raise ValueError("loss_func must depend on the embeddings, got a loss that has no gradient by them")

    torch.clear_autocast_cache()  # older versions of PyTorch would use again weights that were cast without a graph
    behind_loss = _random_states(start.cuda)
    start.restore()
    changed: list[Tensor] = []
    first, grads = torch.split(embeddings.detach(), lengths), torch.split(embeddings.grad, lengths)
    for i, chunk in enumerate(_chunks(images, chunk_size)):
        if i == len(lengths) or _rows(chunk) != lengths[i]:
            raise RuntimeError(f"images must be the same in both walks, got {_rows(chunk)} in chunk {i} of the second")
        with ExitStack() as stack:
            for ddp in parallel if i < len(lengths) - 1 else ():
                stack.enter_context(ddp.no_sync())
            part = _embed(trunk, _to(trunk, chunk), autocast)
            changed.append(_differ(part.detach(), first[i], _tolerance(trunk, part, autocast)))
            if part.requires_grad:
                torch.autograd.backward(part, grads[i])
    _set_random_states(behind_loss)
    if len(changed) < len(lengths):
        raise RuntimeError(f"images must be the same in both walks, got {len(changed)} chunks of {len(lengths)}")
    if wrong := torch.stack(changed).nonzero().flatten().tolist():
        raise RuntimeError(
            f"trunk and images must give the same embeddings in both walks, got others for chunk {wrong[0]} of "
            f"{len(lengths)}: is there a random generator of one's own, or another image each time? The gradients are "
            "wrong"
        )
    return loss


class _State:
    """The random states and the buffers that a walk begins with."""

    def __init__(self, trunk: nn.Module) -> None:
        self.cuda = sorted({p.device.index for p in trunk.parameters() if p.is_cuda})
        self.random = _random_states(self.cuda)
        self.buffers = _buffers(trunk)

    @contextmanager
    def behind_broadcast(self, parallel: list[DistributedDataParallel]) -> Iterator[None]:
        """Note the buffers that DDP gives to all ranks ahead of the first forward: the walk begins with those."""
        with ExitStack() as hooks:
            for ddp in parallel:
                note = ddp.module.register_forward_pre_hook(lambda module, _: self.buffers.update(_buffers(module)))
                hooks.callback(note.remove)
            yield

    @torch.no_grad()
    def restore(self) -> None:
        """Set all to what it was."""
        _set_random_states(self.random)
        for (module, name), value in self.buffers.items():
            module.get_buffer(name).copy_(value)


def _buffers(module: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    return {(m, name): x.clone() for m in module.modules() for name, x in m.named_buffers(recurse=False)}


def _random_states(cuda: list[int]) -> dict[str, Any]:
    on_devices = {index: torch.cuda.get_rng_state(index) for index in cuda}
    numpy = np.random.get_state()  # noqa: NPY002 (what transforms draw from)
    return {"torch": torch.get_rng_state(), "cuda": on_devices, "numpy": numpy, "python": random.getstate()}


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for index, state in states["cuda"].items():
        torch.cuda.set_rng_state(state, index)
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])


def _is_batch(images: Any) -> bool:
    """Whether these are the tensors of one batch or chunk, and no chunks."""
    return isinstance(images, Tensor | tuple | Mapping)


def _tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch or chunk.

    Raises:
        TypeError: If it has others, or none.
        ValueError: If their lengths differ.
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, tuple) else [batch]
    others = [x for x in parts if not isinstance(x, Tensor) or not x.ndim]
    if others or not parts:
        got = f"a {type(others[0]).__name__}" if others else "none"
        raise TypeError(f"images must be tensors (n, ...), or tuples or mappings of them, got {got}")
    if len({len(x) for x in parts}) > 1:
        raise ValueError(f"images must have one length in all tensors of a batch, got {[len(x) for x in parts]}")
    return parts


def _rows(batch: Any) -> int:
    return len(_tensors_in(batch)[0])


def _chunks(images: Any, chunk_size: int) -> Iterator[Any]:
    for part in [images] if _is_batch(images) else images:
        for start in range(0, _rows(part), chunk_size):
            yield _each(part, itemgetter(slice(start, start + chunk_size)))


def _to(trunk: nn.Module, chunk: Any) -> Any:
    """Return a chunk on the device of the network."""
    device = next((p.device for p in trunk.parameters()), None)
    return chunk if device is None else _each(chunk, lambda x: x.to(device, non_blocking=True))


def _each(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Mapping):
        return {name: change(x) for name, x in batch.items()}
    return tuple(map(change, batch)) if isinstance(batch, tuple) else change(batch)


def _embed(trunk: nn.Module, chunk: Any, autocast: torch.dtype | None) -> Tensor:
    device = _tensors_in(chunk)[0].device
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        embeddings = trunk(chunk)
    if not isinstance(embeddings, Tensor) or not embeddings.ndim:
        raise TypeError(f"trunk must return one tensor (n, D), got a {type(embeddings).__name__}")
    if len(embeddings) != _rows(chunk):
        raise ValueError(f"trunk must return a row for each image, got {len(embeddings)} for {_rows(chunk)}")
    return embeddings if autocast is None else embeddings.float()


def _tolerance(trunk: nn.Module, embeddings: Tensor, autocast: torch.dtype | None) -> float:
    """Return how far embeddings may lie apart, relative to the largest: the root of what the network rounds by."""
    dtypes = {embeddings.dtype, *(p.dtype for p in trunk.parameters() if p.is_floating_point()), autocast}
    kind = embeddings.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)
    return float(max(rounding, 0.0 if kind == "cpu" or rounding < 1e-9 else _TF32) ** 0.5)


def _differ(embeddings: Tensor, others: Tensor, tolerance: float) -> Tensor:
    """Return whether embeddings differ by more than rounding, as a tensor: nothing waits for the device.

    Numbers that are not finite in both count as equal: a gradient scaler will skip that step.
    """
    largest = others.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    near = (embeddings - others).abs() <= tolerance * largest
    return (~near & (embeddings.isfinite() | others.isfinite())).any()
