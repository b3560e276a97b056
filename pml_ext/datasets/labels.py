"""Labels and names of classes, checked for all data sets."""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.validation import check_values

_LARGEST = 2**63 - 1


def as_labels(name: str, labels: Any, length: int) -> Tensor:
    """Return labels as a tensor.

    Args:
        name: For the messages.
        labels: ``(N,)``, integers: a tensor, an array or a sequence.
        length: N.

    Returns:
        ``(N,)``, int64.

    Raises:
        TypeError: If they are not integers.
        ValueError: If the shape is wrong, a value does not fit int64, or the tensor is on the meta device.
    """
    if isinstance(labels, Tensor):
        check_values(name, labels)
    values = labels.detach().cpu() if isinstance(labels, Tensor) else np.asarray(labels)
    if isinstance(values, Tensor) and values.dtype == torch.uint64:  # of which torch has no maximum
        values = values.numpy()
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "iu":
            raise TypeError(f"{name} must have an integer dtype, got {values.dtype}")
        if values.dtype == np.uint64 and values.size and values.max() > _LARGEST:  # it would turn negative
            raise ValueError(
                f"{name} must be at most 2^63 - 1, got {values.max()}; numpy.unique(labels, return_inverse=True)[1] "
                "has labels that count from 0"
            )
        values = torch.from_numpy(values.astype(np.int64))
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {values.dtype}")
    if values.shape != (length,):
        raise ValueError(f"{name} must have one entry for each of {length} images, got shape {tuple(values.shape)}")
    return values.long()


def label_values(labels: Tensor) -> list[int]:
    """Return the values that occur, sorted."""
    return sorted(set(labels.tolist()))


def as_class_names(class_names: Sequence[str] | None, labels: Tensor) -> list[str] | None:
    """Return the names of classes as a list: that of label i at index i.

    Args:
        class_names: One for each label value, or None.
        labels: ``(N,)``, those that need a name.

    Raises:
        TypeError: If they are not strings.
        ValueError: If a label has no name.
    """
    if class_names is None:
        return None
    wrong = [class_names] if isinstance(class_names, str) else [x for x in class_names if not isinstance(x, str)]
    if wrong:
        raise TypeError(f"class_names must be a sequence of strings, got {wrong[0]!r}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(class_names):
        raise ValueError(
            f"class_names must have a name for each label, got {len(class_names)} names and labels {low} to {high}"
        )
    return [str(name) for name in class_names]


def nearly_same(names: Iterable[str], others: Iterable[str]) -> tuple[str, str] | None:
    """Return the first name, and the other, that differ in case, spaces or the code of accented letters alone.

    Examples:
        >>> nearly_same(["cat", "Gray wolf"], ["dog", "gray  wolf", "cat"])
        ('Gray wolf', 'gray  wolf')
    """
    by_form = {_form(name): name for name in others}
    pairs = ((name, by_form.get(_form(name), name)) for name in names)
    return next(((name, other) for name, other in pairs if name != other), None)


def no_gallery_of(name: str, gallery: Iterable[str]) -> str:
    """Return the error of a class that has queries, but no gallery images."""
    alike = nearly_same([name], gallery)
    hint = "" if alike is None else f" (there is {alike[1]!a}, of nearly the same name as {name!a})"
    return f"query classes must have gallery images, got none of {name!r}{hint}"


def _form(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
