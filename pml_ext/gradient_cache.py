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
    r"""Compute the gradients of a whole batch with the memory of a chunk, in place of ``loss.backward()``.

    The loss sees the embeddings of the whole batch, so this is not gradient accumulation over small batches, which
    have fewer pairs. Two passes over the chunks:

    1. The network embeds each chunk, without a graph. The loss of all embeddings $L$ gives $\partial L / \partial x_i$,
       and the gradients of its own parameters.
    2. The network embeds each chunk again, and passes the chunk's part of $\partial L / \partial x_i$ back.

    The second pass begins with the random states (PyTorch's, NumPy's and Python's) and the buffers that the first one
    began with: dropout has the same masks, and running statistics move once for each chunk, not twice. Afterward the
    random states are those after the loss, as if there had been one pass. A batch of one chunk takes one pass, as
    usual.

    Both passes must have the same images, bit for bit, and the same embeddings up to rounding; anything else is an
    error. After an error in the second pass the random states are those after the loss, gradients are incomplete or
    wrong, and buffers have moved with the chunks that were done.

    Batch norms that normalize with the statistics of what they are given see those of a chunk: the gradients are exact
    for that network, which is not the one that sees the whole batch. With ``freeze_batch_norm``, batch norms in
    evaluation mode, layer or group norms there is no difference.

    Args:
        trunk: The network, one chunk to ``(n, D)``. With an embedder apart: ``nn.Sequential(trunk, embedder)``. A
            ``DistributedDataParallel`` sends its gradients with the last chunk. Only what its embeddings depend on gets
            gradients.
        loss_func: Called with the embeddings, ``(B, D)``, the labels and, if there is a miner, the indices. Any loss
            of PML or of this package, also in our ``DistributedLossWrapper``; or a function.
        images: The batch: a tensor, or a tuple or mapping of tensors, all with B rows. Or parts of it: a list, or
            another iterable that can be iterated over twice, of tensors, tuples or mappings, none of which needs to fit
            into the network. A part that is a list, as a ``DataLoader`` makes them, counts as a tuple, and with one
            tensor as that tensor. Chunks are moved to the device of the trunk's first parameter.
        labels: ``(B,)``, as the loss takes them.
        chunk_size: Largest number of images that the network gets at a time, >= 1.
        miner: Called with embeddings and labels.
        autocast: dtype of the network's forward, ``torch.bfloat16`` or ``torch.float16``; the embeddings are then
            raised to float32. None: as it is outside.
        scaler: Scales the loss; its ``step`` and ``update`` are called outside, as the optimizer's.

    Returns:
        The loss, detached and not scaled. Gradients are added to those that are there; no optimizer steps.

    Raises:
        TypeError: If ``trunk`` is not a module, ``images`` can be iterated over only once or hold something other than
            tensors, or the trunk or the loss returns something else.
        ValueError: If ``chunk_size`` is not an integer >= 1, ``autocast`` is another dtype, ``images``, ``labels`` and
            what the trunk returns have different lengths, the loss does not depend on the embeddings, or a
            ``DistributedDataParallel`` has ``static_graph``.
        RuntimeError: If the second pass has other images or gives other embeddings than the first: the images change
            between passes, or the network uses its own random generator. The gradients are then wrong.

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
        2021. The paper keeps one random state for each chunk, and does not treat buffers.
    """
    check_count("chunk_size", chunk_size)
    if not isinstance(trunk, nn.Module):
        raise TypeError(f"trunk must be a torch.nn.Module, whose buffers can be seen, got a {type(trunk).__name__}")
    if not isinstance(labels, Tensor) or not labels.ndim:
        raise TypeError(f"labels must be a tensor (B,), got {labels!r}")
    if isinstance(images, Iterator) or not isinstance(images, Iterable):
        got = type(images).__name__
        raise TypeError(f"images must be tensors, or parts that can be iterated over twice, got a {got}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
    if isinstance(images, list) or _is_batch(images):  # before any buffer moves
        _check_length(labels, sum(map(_rows, _parts(images))))

    def backward_of_loss(embeddings: Tensor) -> Tensor:
        _check_length(labels, len(embeddings))
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
    if _is_batch(images) and _rows(images) <= chunk_size and not parallel:  # all ranks do the same, whatever they have
        return backward_of_loss(_embed(trunk, _to(trunk, images), autocast))

    start, learns = _State(trunk), any(p.requires_grad for p in trunk.parameters())
    parts: list[Tensor] = []
    checksums: list[list[Tensor]] = []
    with torch.no_grad():
        for chunk in _chunks(images, chunk_size):
            there = _to(trunk, chunk)
            with nullcontext() if parts else start.behind_broadcast(parallel):
                parts.append(_embed(trunk, there, autocast))
            checksums.append(_checksums(there))
            learns = learns or any(x.requires_grad for x in _tensors_in(chunk))
    embeddings, lengths = torch.cat(parts or [torch.empty(0)]), [len(part) for part in parts]
    del parts  # one copy is enough
    loss = backward_of_loss(embeddings.requires_grad_(learns))
    if not learns:
        return loss
    if embeddings.grad is None:
        raise ValueError("loss_func must depend on the embeddings, got a loss without gradients for them")

    torch.clear_autocast_cache()  # older versions of PyTorch would use again weights that were cast without a graph
    behind_loss = _random_states(start.cuda)
    start.restore()
    other_images: list[Tensor] = []
    other_embeddings: list[Tensor] = []
    center = _finite(embeddings.detach()).mean(0)
    first, grads = torch.split(embeddings.detach(), lengths), torch.split(embeddings.grad, lengths)
    try:
        for i, chunk in enumerate(_chunks(images, chunk_size)):
            if i == len(lengths) or _rows(chunk) != lengths[i]:
                raise RuntimeError(
                    f"images must be the same in both passes, got {_rows(chunk)} in chunk {i} of the second"
                )
            there = _to(trunk, chunk)
            with ExitStack() as stack:
                for ddp in parallel if i < len(lengths) - 1 else ():
                    stack.enter_context(ddp.no_sync())
                part = _embed(trunk, there, autocast)
                other_images.append(_any_differ(_checksums(there), checksums[i]))
                other_embeddings.append(_differ(part.detach(), first[i], center, _rounding(trunk, part, autocast)))
                if part.requires_grad:
                    torch.autograd.backward(part, grads[i])
    finally:
        _set_random_states(behind_loss)
    if len(other_images) < len(lengths):
        raise RuntimeError(f"images must be the same in both passes, got {len(other_images)} chunks of {len(lengths)}")
    if wrong := torch.stack(other_images).nonzero().flatten().tolist():
        raise RuntimeError(
            f"images must be the same in both passes, got others in chunk {wrong[0]} of {len(lengths)}: do they change "
            "each time they are loaded? The gradients are wrong"
        )
    if wrong := torch.stack(other_embeddings).nonzero().flatten().tolist():
        raise RuntimeError(
            f"trunk must give the same embeddings in both passes, got others for chunk {wrong[0]} of {len(lengths)}: "
            "does the network use its own random generator? The gradients are wrong"
        )
    return loss


def _check_length(labels: Tensor, rows: int) -> None:
    if rows != len(labels) or not rows:
        raise ValueError(f"labels must have a row for each image, got {len(labels)} for {rows}")


class _State:
    """The random states and the buffers that a pass begins with."""

    def __init__(self, trunk: nn.Module) -> None:
        self.cuda = sorted({p.device.index for p in trunk.parameters() if p.is_cuda})
        self.random = _random_states(self.cuda)
        self.buffers = _buffers(trunk)

    @contextmanager
    def behind_broadcast(self, parallel: list[DistributedDataParallel]) -> Iterator[None]:
        """Note the buffers that DDP gives to all ranks ahead of the first forward: the pass begins with those."""
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
            buffer = module.get_buffer(name)
            if buffer.shape == value.shape:
                buffer.copy_(value)
            else:  # it has grown
                setattr(module, name, value)


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


def _parts(images: Any) -> Iterator[Any]:
    """Yield the parts of a batch; lists, which loaders make of tuples, as tuples."""
    for part in [images] if _is_batch(images) else images:
        if isinstance(part, list):
            yield part[0] if len(part) == 1 else tuple(part)
        else:
            yield part


def _chunks(images: Any, chunk_size: int) -> Iterator[Any]:
    for part in _parts(images):
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


def _checksums(chunk: Any) -> list[Tensor]:
    """Return a number for each row of each tensor, which changes with its bits and, being weighted, with their places.

    Taken after the forward, so that a network may begin with a ReLU in place, which does nothing the second time.
    """
    sums = []
    for x in _tensors_in(chunk):
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.element_size(), torch.int64)
        bits = x.detach().contiguous().view(kind)
        bits = bits.reshape(len(x), bits.numel() // len(x))
        places = torch.arange(1, bits.shape[1] + 1, device=x.device)
        sums.append((bits * places).sum(1))  # int64, which wraps around
    return sums


def _any_differ(checksums: list[Tensor], others: list[Tensor]) -> Tensor:
    """Return whether checksums differ, as a tensor: nothing waits for the device."""
    if len(checksums) != len(others):
        return torch.ones((), dtype=torch.bool, device=others[0].device)
    return torch.stack([(x != y).any() for x, y in zip(checksums, others, strict=True)]).any()


def _rounding(trunk: nn.Module, embeddings: Tensor, autocast: torch.dtype | None) -> float:
    """Return what the network rounds by, relative to its numbers."""
    dtypes = {embeddings.dtype, *(p.dtype for p in trunk.parameters() if p.is_floating_point()), autocast}
    kind = embeddings.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)
    return max(rounding, 0.0 if kind == "cpu" or rounding < 1e-9 else _TF32)


def _differ(embeddings: Tensor, others: Tensor, center: Tensor, rounding: float) -> Tensor:
    """Return whether embeddings differ by more than rounding, as a tensor: nothing waits for the device.

    Near: the root of ``rounding`` times how far the embeddings lie from their ``center``, which alone tells samples
    apart, and a few roundings of the embeddings themselves. Numbers that are not finite in both count as equal: a
    gradient scaler will skip that step.
    """
    finite = _finite(others)
    tolerance = rounding**0.5 * (finite - center).abs().amax() + 4 * rounding * finite.abs().amax()
    near = (embeddings - others).abs() <= tolerance
    return (~near & (embeddings.isfinite() | others.isfinite())).any()


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)
