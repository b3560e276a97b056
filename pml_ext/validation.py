"""One check of a loss's inputs, at the border, for every loss of the package."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.types import Indices

_RENUMBER = (
    "number the classes from 0 without gaps, all training labels at once: "
    "labels = torch.unique(all_labels, return_inverse=True)[1]; in PML's trainers "
    "set_min_label_to_zero=True, dataset_labels=all_labels"
)
_MULTILABEL = (
    "several classes of one sample are not for losses with proxies; losses that compare samples take them as pairs, "
    "indices_tuple=pml_ext.pairs.pairs_from_multilabel(labels, rule), with labels=None"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # float8 has no arithmetic
_INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
_enabled = True
_already_valid: ContextVar[bool] = ContextVar("pml_ext_already_valid", default=False)


def set_validation(enabled: bool) -> None:
    """Turn the checks of all losses on (the default) or off.

    Without them, bad input gives whatever PyTorch makes of it: an error from the inside, or a wrong number. They are
    skipped under ``torch.compile``, whose graphs they would break.

    Args:
        enabled: Whether losses check what they are given.

    Raises:
        TypeError: If ``enabled`` is not a bool.
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool, got {enabled!r}")
    _enabled = enabled


def validation_enabled() -> bool:
    """Whether checks are on at all: not when compiled or turned off."""
    return not torch.compiler.is_compiling() and _enabled


def validation_wanted() -> bool:
    """Whether this call should be checked: neither when that is off, nor inside a loss that has checked."""
    return validation_enabled() and not _already_valid.get()


def inside_a_loss() -> bool:
    """Whether this call comes from a loss that has checked its inputs."""
    return not torch.compiler.is_compiling() and _already_valid.get()


@contextmanager
def already_valid() -> Iterator[None]:
    """Tell the losses called inside that their inputs have been checked."""
    if torch.compiler.is_compiling():  # nothing is checked there, and a context variable would break the graph
        yield
        return
    token = _already_valid.set(True)
    try:
        yield
    finally:
        _already_valid.reset(token)


def is_batch_itself(
    embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> bool:
    """Whether references are the batch itself, in which nothing is compared with itself.

    Inside of this package that is told by ``ref_emb=None``, which no hook or wrapper can change. From outside it may
    come as PML 2 tells it, by one object for both. ``without_refs_to_itself`` looks at that before hooks of a module
    hand over copies. What PyTorch itself makes of one tensor given twice (views of a backward hook, leaves of a
    checkpoint) is recognized too: the same memory with the same history.
    """
    if ref_emb is None or ref_emb is embeddings:
        return ref_emb is None or ref_labels is None or is_same(ref_labels, labels)
    if torch.compiler.is_compiling() or not (isinstance(embeddings, Tensor) and isinstance(ref_emb, Tensor)):
        return False
    if not (embeddings.requires_grad and ref_emb.requires_grad and ref_emb.grad_fn is embeddings.grad_fn):
        return False  # such as embeddings.detach(): references without a gradient
    return is_same(ref_emb, embeddings) and (ref_labels is None or is_same(ref_labels, labels))


def without_refs_to_itself(
    embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the references, an empty tuple where they are the batch itself: for ``__call__``, ahead of all hooks."""
    if ref_emb is None and ref_labels is not None:
        return ref_emb, ref_labels  # which is refused
    return () if is_batch_itself(embeddings, labels, ref_emb, ref_labels) else (ref_emb, ref_labels)


def is_same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two are one object, or views of the same memory in the same order."""
    if x is y or torch.compiler.is_compiling():
        return x is y
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or (x.dtype, x.device) != (y.dtype, y.device):
        return False
    return x.numel() > 0 and x.is_set_to(y)


def check_settings(positive: Mapping[str, Any], finite: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Check the numbers that a loss is set up with: each a number or, to be learned, a tensor of one.

    Args:
        positive: Names and values that must be > 0 and finite.
        finite: Names and values that must be finite.

    Raises:
        TypeError: If one is not a number; the message names it.
        ValueError: If one is out of range; the message names it.
    """
    for name, value in positive.items():
        check_number(name, value)
        value = value.item() if isinstance(value, Tensor) else value
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    for name, value in finite.items():
        check_number(name, value)
        value = value.item() if isinstance(value, Tensor) else value
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def check_number(name: str, value: Any) -> None:
    """Check that a setting is a number, or a tensor of one number, which may be a parameter.

    Raises:
        TypeError: If it is not; the message names it.
    """
    if isinstance(value, Tensor):
        good = value.numel() == 1 and value.dtype in (*_FLOATS, *_INTEGERS) and not value.is_meta
    else:
        good = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not good:
        raise TypeError(f"{name} must be a number or a tensor of one number, got {shown(value)}")


def shown(value: Any) -> str:
    """Return a value for a message: of modules, which print many lines, and of classes what they are."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, torch.nn.Module):
        kind = type(value).__name__
        return f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}"
    return repr(value)


def check_module(name: str, value: Any, example: str) -> None:
    """Check that an argument is a module, and not the class of one or its name.

    Args:
        name: Name of the argument.
        value: What is given; None passes.
        example: What could be given.

    Raises:
        TypeError: If it is not a module.
    """
    if value is not None and not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be an object such as {example}, got {shown(value)}")


def check_miner(miner: Any) -> None:
    """Check that a miner can be called with embeddings and labels, which a class cannot.

    Raises:
        TypeError: If not.
    """
    if isinstance(miner, type):
        raise TypeError(f"miner must be an object, got the class {miner.__name__}: {miner.__name__}()")
    if miner is not None and not callable(miner):
        raise TypeError(f"miner must be callable, got {type(miner).__name__}")


def is_learned(*settings: Any) -> bool:
    """Whether one of the settings is a tensor that gets a gradient: what computes with floats would lose it."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in settings)


def scalar(setting: Any) -> Any:
    """Return a setting for arithmetic: a tensor of one number without dimensions, so that it promotes no dtype."""
    return setting.reshape(()) if isinstance(setting, Tensor) else setting


def as_number(name: str, setting: Any) -> Any:
    """Return a setting for what computes with numbers alone.

    Raises:
        TypeError: If it is not a number, or a tensor that requires a gradient, which would get none.
    """
    check_number(name, setting)
    if is_learned(setting):
        raise TypeError(f"{name} must be a number here, got a tensor that requires a gradient, which it would not get")
    return setting.item() if isinstance(setting, Tensor) else setting


def check_count(name: str, value: Any) -> None:
    """Check that a setting is a whole number.

    Raises:
        ValueError: If it is not an integer >= 1; the message names it.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {shown(value)}")


def check_batch(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple: Indices | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    num_classes: int | None = None,
    embedding_size: int | None = None,
) -> None:
    """Check what a loss is given.

    What needs the data (finite embeddings, labels and indices in range) is computed as one flag on the device, with
    one synchronization; the details follow only where it is set.

    Args:
        embeddings: ``(B, D)``, floating point.
        labels: ``(B,)``, integers, or None.
        indices_tuple: What a miner returned, or None.
        ref_emb: ``(R, D)`` or None.
        ref_labels: ``(R,)`` or None.
        num_classes: Labels must be smaller. None: any label >= 0.
        embedding_size: The width that ``embeddings`` must have. None: any.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or a value breaks a rule; the message names argument, rule and value.
    """
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.is_floating_point() and _are_labels(embeddings):
        got = f"integers of shape {tuple(embeddings.shape)} first: loss_func(embeddings, labels)"
        raise TypeError(f"embeddings must come before labels, got {got}")
    check_embeddings("embeddings", embeddings, embedding_size)
    _check_labels("labels", labels, len(embeddings))
    floats, integers = [embeddings], [] if labels is None or not len(labels) else [("labels", labels, num_classes)]
    num_refs = len(embeddings)
    if ref_emb is None and ref_labels is not None:
        raise ValueError("ref_labels must come with ref_emb, got ref_labels alone")
    if ref_emb is not None and not is_batch_itself(embeddings, labels, ref_emb, ref_labels):
        check_embeddings("ref_emb", ref_emb, embeddings.shape[1])
        if ref_emb.device != embeddings.device:
            raise ValueError(
                f"ref_emb must be on the device of embeddings, {embeddings.device}, got {ref_emb.device}: "
                "ref_emb.to(embeddings.device)"
            )
        _check_labels("ref_labels", ref_labels, len(ref_emb))
        floats.append(ref_emb)
        num_refs = len(ref_emb)
        if ref_labels is not None and len(ref_labels):
            integers.append(("ref_labels", ref_labels, num_classes))
        elif ref_labels is None and labels is not None and indices_tuple is None:
            raise ValueError("ref_labels must come with ref_emb where labels are used, got None")
    if indices_tuple is not None:
        integers += _check_indices_form(indices_tuple, len(embeddings), num_refs)
    for name, x in (*zip(("embeddings", "ref_emb"), floats, strict=False), *((name, x) for name, x, _ in integers)):
        check_values(name, x)
    if _flag(embeddings.device, floats, integers):
        for name, x in zip(("embeddings", "ref_emb"), floats, strict=False):
            _check_finite(name, x)
        for name, x, limit in integers:
            _check_range(name, x, limit)


def check_indices_tuple(indices_tuple: Indices, num_anchors: int, num_refs: int) -> None:
    """Check what a miner has returned: form, dtypes, and indices below the numbers of rows.

    Args:
        indices_tuple: 3 or 4 tensors.
        num_anchors: Rows that anchors may index.
        num_refs: Rows that positives and negatives may index.

    Raises:
        TypeError: If a tensor is none, or has no integer dtype.
        ValueError: If the form or an index breaks a rule.
    """
    for name, x, limit in _check_indices_form(indices_tuple, num_anchors, num_refs):
        check_values(name, x)
        _check_range(name, x, limit)


def check_edge_index(edge_index: Tensor, num_nodes: int) -> None:
    """Check that edges are ``(2, E)`` integers in 0 to ``num_nodes`` - 1.

    Raises:
        TypeError: If they are not integers.
        ValueError: If shape or range are wrong.
    """
    check_integers("edge_index", edge_index)
    if edge_index.ndim != 2 or len(edge_index) != 2:
        raise ValueError(f"edge_index must have shape (2, E), got {tuple(edge_index.shape)}")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        extremes = f"{int(edge_index.min())} to {int(edge_index.max())}"
        raise ValueError(f"edge_index must lie in 0 to {num_nodes - 1}, got {extremes}")


def check_mini_batches(batch: Tensor, num_nodes: int) -> None:
    """Check that there is one sorted integer >= 0 for each node.

    Raises:
        TypeError: If they are not integers.
        ValueError: If shape, range or order are wrong.
    """
    check_integers("batch", batch)
    if batch.shape != (num_nodes,):
        raise ValueError(f"batch must have shape (B,) = ({num_nodes},), got {tuple(batch.shape)}")
    if num_nodes and (int(batch[0]) < 0 or bool((batch[1:] < batch[:-1]).any())):
        raise ValueError("batch must be sorted and >= 0, got numbers that are not")


def check_enqueue_mask(enqueue_mask: Tensor, length: int) -> None:
    """Check that a mask says of each row of a batch whether it enters a memory.

    Raises:
        TypeError: If it is not a bool tensor.
        ValueError: If the shape is wrong.
    """
    rule = f"a bool tensor of shape ({length},)"
    if not isinstance(enqueue_mask, Tensor) or enqueue_mask.dtype != torch.bool:
        raise TypeError(f"enqueue_mask must be {rule}, got {getattr(enqueue_mask, 'dtype', enqueue_mask)}")
    if enqueue_mask.shape != (length,):
        raise ValueError(f"enqueue_mask must be {rule}, got shape {tuple(enqueue_mask.shape)}")


def _are_labels(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.ndim == 1 and not x.is_floating_point()


def check_embeddings(name: str, x: Tensor, width: int | None = None) -> None:
    """Check that embeddings are floating point, of two dimensions and of a width.

    Raises:
        TypeError: If they are not a floating point tensor.
        ValueError: If the shape is wrong.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {x.dtype}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be of float16, bfloat16, float32 or float64, got {x.dtype}: {name}.float()")
    _check_dense(name, x)
    if x.ndim != 2 or not x.shape[1] or (width is not None and x.shape[1] != width):
        size = "" if width is None else f" = ({x.shape[0] if x.ndim else 1}, {width})"
        advice = ": pool or flatten feature maps first" if x.ndim > 2 else ""
        raise ValueError(f"{name} must have shape (batch_size, embedding_size){size}, got {tuple(x.shape)}{advice}")


def check_values(name: str, x: Tensor) -> None:
    """Check that a tensor has numbers in it.

    Raises:
        ValueError: If it is on the meta device.
    """
    if x.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device, which has a shape alone")


def _check_dense(name: str, x: Tensor) -> None:
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def as_tensor(name: str, x: Any) -> Tensor:
    """Return numbers as a tensor; of an array with any strides and byte order, which PyTorch does not take.

    Raises:
        TypeError: If it is not a dense tensor, array or sequence of numbers, or an array with masked values.
        ValueError: If it is a tensor on the meta device.
    """
    got = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
    if np.ma.is_masked(x):  # what lies under the mask would be taken for numbers
        raise TypeError(f"{name} must have no masked values, got some: {name}.filled(...)")
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
        x = x if x.flags.writeable else x.copy()  # a tensor would not be protected
    try:
        tensor = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {got}") from error
    check_values(name, tensor)
    _check_dense(name, tensor)
    if tensor.is_quantized:
        raise TypeError(f"{name} must be a tensor or an array of numbers, got {tensor.dtype}: {name}.dequantize()")
    return tensor


def check_integers(name: str, x: Tensor) -> None:
    """Check that something is a tensor of integers.

    Raises:
        TypeError: If it is not; the message says how to get one from an array or a list.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}{_as_integers(name, x)}")
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} must have an integer dtype, got {x.dtype}")
    _check_dense(name, x)


def _as_integers(name: str, x: Any) -> str:
    """Return how to make a tensor of an array or a list; of names of classes, one of their numbers."""
    if not isinstance(x, np.ndarray | list | tuple):
        return ""
    names = x.ravel().tolist() if isinstance(x, np.ndarray) else x
    if all(isinstance(one, Integral) for one in names):
        return f": torch.as_tensor({name})"
    numbered = "torch.as_tensor(np.unique(all_labels, return_inverse=True)[1])"
    return f": number the classes, all training labels at once: {numbered}" if isinstance(names[0], str) else ""


def check_lengths(embeddings: Tensor, labels: Tensor | None, name: str = "labels") -> None:
    """Check that there is one label for each embedding.

    Raises:
        ValueError: If not.
    """
    if labels is not None and labels.shape != embeddings.shape[:1]:
        rule = f"(batch_size,) = ({len(embeddings)},)"
        raise ValueError(f"{name} must have shape {rule}, one for each embedding, got {tuple(labels.shape)}")


def _check_labels(name: str, labels: Tensor | None, length: int) -> None:
    if labels is None:
        return
    rows_of_classes = isinstance(labels, Tensor) and labels.ndim == 2 and len(labels) == length
    rows_of_classes = rows_of_classes and labels.layout == torch.strided
    if not rows_of_classes:
        check_integers(name, labels)
    if labels.shape != (length,):
        advice = ""
        if rows_of_classes:
            one_each = bool((labels != 0).sum(1).eq(1).all())
            advice = f": of one-hot {name}, {name}.argmax(1)" if one_each else f": {_MULTILABEL}"
            advice = f": {name}.squeeze(1)" if labels.shape[1] == 1 else advice
        raise ValueError(f"{name} must have shape (batch_size,) = ({length},), got {tuple(labels.shape)}{advice}")


def _check_indices_form(
    indices_tuple: Indices, num_anchors: int, num_refs: int
) -> list[tuple[str, Tensor, int | None]]:
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        got = f"{len(indices_tuple)} elements" if isinstance(indices_tuple, tuple | list) else shown(indices_tuple)
        if callable(indices_tuple) and not isinstance(indices_tuple, type):
            got += ": what a miner finds, indices_tuple = miner(embeddings, labels)"
        raise ValueError(f"indices_tuple must be a tuple of 3 or 4 tensors, got {got}")
    limits = (num_anchors, num_refs, num_refs) if len(indices_tuple) == 3 else (num_anchors, num_refs) * 2
    checks: list[tuple[str, Tensor, int | None]] = []
    for i, (x, limit) in enumerate(zip(indices_tuple, limits, strict=True)):
        name = f"indices_tuple[{i}]"
        if isinstance(x, Tensor) and not x.numel():
            continue  # torch.tensor([]) is a float tensor, and a usual way to say "none"
        check_integers(name, x)
        if x.ndim != 1:
            raise ValueError(f"{name} must be 1-D, got shape {tuple(x.shape)}")
        checks.append((name, x, limit))
    lengths = [len(x) for x in indices_tuple]
    if lengths[0] != lengths[1] or lengths[-2] != lengths[-1]:
        raise ValueError(f"indices_tuple must pair tensors of one length, got lengths {lengths}")
    return checks


def _flag(device: torch.device, floats: list[Tensor], integers: list[tuple[str, Tensor, int | None]]) -> bool:
    """Whether something may be wrong: a norm that is not finite (of all rows: the caller looks closer), or a range."""
    with torch.no_grad():
        norms = [_norm(x) for x in floats]
        norm = _plain(norms[0] if len(norms) == 1 else norms[0] + norms[1])
        bad = not math.isfinite(norm) if isinstance(norm, float) else ~torch.isfinite(norm)
        bad_elsewhere = False
        for _, x, limit in integers:
            low, high = (_plain(extreme) for extreme in x.long().aminmax())
            wrong = low < 0 if limit is None else (low < 0) | (high >= limit)
            if x.device == device:
                bad = bad | wrong
            else:  # labels on the CPU, as PML's trainers deliver them: looking at them does not wait for the device
                bad_elsewhere = bad_elsewhere or bool(wrong)
    return bad_elsewhere or bool(bad)


def _plain(x: Tensor) -> Any:
    """Return a number where no device has to be waited for: what follows is faster than with tensors."""
    return x.item() if x.is_cpu else x


def _norm(x: Tensor, **kwargs: Any) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32), **kwargs)


def _check_finite(name: str, x: Tensor) -> None:
    wrong = torch.isfinite(x).logical_not().nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(f"{name} must be finite, got {x[row, column].item()} in row {row}, column {column}")
    wrong = torch.isfinite(_norm(x, dim=1)).logical_not().nonzero()
    if len(wrong):
        raise ValueError(f"{name} must have finite norms, got an overflow of {x.dtype} in row {int(wrong[0])}")


def _check_range(name: str, x: Tensor, limit: int | None) -> None:
    x = x.long()
    wrong = ((x < 0) if limit is None else (x < 0) | (x >= limit)).nonzero()
    if len(wrong):
        position = int(wrong[0])
        value = int(x[position])
        of_classes = name.endswith("labels")
        bound = "num_classes" if of_classes else "the number of rows"
        rule = ">= 0" if value < 0 else f"< {bound} = {limit}"
        advice = f" (this batch: {int(x.min())} to {int(x.max())})" if of_classes else ""
        if of_classes and limit is not None:  # without proxies, classes may have any numbers >= 0
            advice += f": {_RENUMBER}"
        raise ValueError(f"{name} must be {rule}, got {value} at position {position}{advice}")
