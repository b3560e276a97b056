"""One check of a loss's inputs, at the border, for every loss of the package."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from pml_ext.types import Indices

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


def validation_wanted() -> bool:
    """Whether this call should be checked: not when compiled, turned off, or inside a loss that has checked."""
    return not torch.compiler.is_compiling() and _enabled and not _already_valid.get()


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
    one synchronisation; the details follow only where it is set.

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
    _check_embeddings("embeddings", embeddings, embedding_size)
    _check_labels("labels", labels, len(embeddings))
    floats, integers = [embeddings], [] if labels is None else [("labels", labels, num_classes)]
    num_refs = len(embeddings)
    if ref_emb is None:
        if ref_labels is not None:
            raise ValueError("ref_labels must come with ref_emb, got ref_labels alone")
    elif ref_emb is not embeddings:
        _check_embeddings("ref_emb", ref_emb, embeddings.shape[1])
        _check_labels("ref_labels", ref_labels, len(ref_emb))
        floats.append(ref_emb)
        num_refs = len(ref_emb)
        if ref_labels is not None:
            integers.append(("ref_labels", ref_labels, num_classes))
        elif labels is not None and indices_tuple is None:
            raise ValueError("ref_labels must come with ref_emb where labels are used, got None")
    if indices_tuple is not None:
        integers += _check_indices_tuple(indices_tuple, len(embeddings), num_refs)
    integers = [(name, x, limit) for name, x, limit in integers if x.numel()]
    if _flag(embeddings.device, floats, integers):
        for name, x in zip(("embeddings", "ref_emb"), floats, strict=False):
            _check_finite(name, x)
        for name, x, limit in integers:
            _check_range(name, x, limit)


def _check_embeddings(name: str, x: Tensor, width: int | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {x.dtype}")
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        size = "" if width is None else f" = ({x.shape[0] if x.ndim else 1}, {width})"
        raise ValueError(f"{name} must have shape (batch_size, embedding_size){size}, got {tuple(x.shape)}")


def _check_integers(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {x.dtype}")


def _check_labels(name: str, labels: Tensor | None, length: int) -> None:
    if labels is not None:
        _check_integers(name, labels)
        if labels.shape != (length,):
            raise ValueError(f"{name} must have shape (batch_size,) = ({length},), got {tuple(labels.shape)}")


def _check_indices_tuple(
    indices_tuple: Indices, num_anchors: int, num_refs: int
) -> list[tuple[str, Tensor, int | None]]:
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        got = f"{len(indices_tuple)} elements" if isinstance(indices_tuple, tuple | list) else type(indices_tuple)
        raise ValueError(f"indices_tuple must be a tuple of 3 or 4 tensors, got {got}")
    limits = (num_anchors, num_refs, num_refs) if len(indices_tuple) == 3 else (num_anchors, num_refs) * 2
    checks: list[tuple[str, Tensor, int | None]] = []
    for i, (x, limit) in enumerate(zip(indices_tuple, limits, strict=True)):
        name = f"indices_tuple[{i}]"
        if isinstance(x, Tensor) and not x.numel():
            continue  # torch.tensor([]) is a float tensor, and a usual way to say "none"
        _check_integers(name, x)
        if x.ndim != 1:
            raise ValueError(f"{name} must be 1-D, got shape {tuple(x.shape)}")
        checks.append((name, x, limit))
    lengths = [len(x) for x in indices_tuple]
    if lengths[0] != lengths[1] or lengths[-2] != lengths[-1]:
        raise ValueError(f"indices_tuple must pair tensors of one length, got lengths {lengths}")
    return checks


def _flag(device: torch.device, floats: list[Tensor], integers: list[tuple[str, Tensor, int | None]]) -> bool:
    """Whether something may be wrong: a sum that is not finite (overflow too: the caller looks), or a range."""
    with torch.no_grad():
        sums = [x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in floats]
        bad = ~torch.isfinite(sums[0] if len(sums) == 1 else sums[0] + sums[1])
        for _, x, limit in integers:
            low, high = x.to(device, torch.int64).aminmax()
            bad = bad | (low < 0)
            if limit is not None:
                bad = bad | (high >= limit)
    return bool(bad)


def _check_finite(name: str, x: Tensor) -> None:
    wrong = torch.isfinite(x).logical_not().nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(f"{name} must be finite, got {x[row, column].item()} in row {row}, column {column}")


def _check_range(name: str, x: Tensor, limit: int | None) -> None:
    x = x.long()
    wrong = ((x < 0) if limit is None else (x < 0) | (x >= limit)).nonzero()
    if len(wrong):
        position = int(wrong[0])
        value = int(x[position])
        bound = "num_classes" if name.endswith("labels") else "the number of rows"
        rule = ">= 0" if value < 0 else f"< {bound} = {limit}"
        raise ValueError(f"{name} must be {rule}, got {value} at position {position}")
