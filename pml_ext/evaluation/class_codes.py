"""Labels of any kind as numbers of classes."""

from collections.abc import Mapping, Sequence, Set
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -1
"""The code of samples that are ignored."""

_KINDS = "integers, strings or bools"
_FLOATS = ": as floats, large integers that lie close together are equal"


class ClassCodes(NamedTuple):
    """Which samples are of the same class: code i is ``classes[i]``, and ``IGNORED`` is none."""

    classes: list[Any]  # integers, strings, bytes or bools of Python, each once
    queries: Tensor  # (N,), int64
    gallery: Tensor  # (M,), int64


def class_codes(
    labels: Any,
    num_queries: int,
    gallery_labels: Any = None,
    num_gallery: int | None = None,
    ignore_label: Any = None,
    names: tuple[str, str] = ("labels", "gallery_labels"),
) -> ClassCodes:
    """Number the classes of queries and gallery, so that equal labels and only these get equal numbers.

    Args:
        labels: ``(N,)``, integers of any width, strings, bytes or bools: a tensor, an array, a pandas Series or a
            sequence.
        num_queries: N.
        gallery_labels: ``(M,)``, of the same kinds as ``labels``. None: the gallery is the queries.
        num_gallery: M.
        ignore_label: The label of samples that belong to no class. None: there are none.
        names: Names of both arguments, for messages.

    Raises:
        TypeError: If a label is of another kind.
        ValueError: If the shape is wrong.

    Examples:
        >>> class_codes(["b", "a", "b"], 3).queries.tolist()
        [1, 0, 1]
    """
    values, codes = _coded(names[0], labels, num_queries)
    if gallery_labels is None:
        gallery_values, gallery_codes = values, codes
    else:
        gallery_values, gallery_codes = _coded(names[1], gallery_labels, num_gallery or 0)
    ignored = None if ignore_label is None else _plain("ignore_label", ignore_label)
    classes = _sorted({value: None for value in (*values, *gallery_values) if ignored is None or value != ignored})
    number = {value: i for i, value in enumerate(classes)}
    of_queries, of_gallery = (
        torch.tensor([number.get(value, IGNORED) for value in some], dtype=torch.long)[own]
        for some, own in ((values, codes), (gallery_values, gallery_codes))
    )
    return ClassCodes(classes, of_queries, of_gallery)


def _coded(name: str, labels: Any, length: int) -> tuple[list[Any], Tensor]:
    """Return the different values, as Python has them, and which of them each label is."""
    if isinstance(labels, str | bytes | Mapping | Set) or not hasattr(labels, "__len__"):
        raise TypeError(f"{name} must be a tensor, an array or a sequence, one for each row, got {labels!r}")
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"{name} must be {_KINDS}, got {labels.dtype}{_FLOATS}")
        labels = labels.detach().cpu().numpy()
    elif hasattr(labels, "to_numpy"):  # pandas
        labels = labels.to_numpy()
    elif isinstance(labels, np.ma.MaskedArray):
        labels = labels.tolist()  # with None for what is masked
    if isinstance(labels, np.ndarray):
        if labels.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},), one for each row, got {labels.shape}")
        if labels.dtype.kind in "iubUS":
            values, inverse = np.unique(labels, return_inverse=True)
            return values.tolist(), torch.from_numpy(inverse.astype(np.int64))
        if labels.dtype.kind not in ("O", "T"):
            raise TypeError(f"{name} must be {_KINDS}, got {labels.dtype}{_FLOATS if labels.dtype.kind == 'f' else ''}")
        labels = labels.tolist()
    if len(labels) != length:
        raise ValueError(f"{name} must have one entry for each of {length} rows, got {len(labels)}")
    number: dict[Any, int] = {}
    codes = [number.setdefault(_plain(name, label, i), len(number)) for i, label in enumerate(labels)]
    return list(number), torch.tensor(codes, dtype=torch.long)


def _plain(name: str, label: Any, position: int | None = None) -> Any:
    """Return a label as Python's own number or string."""
    if isinstance(label, np.generic | np.ndarray | Tensor) and label.ndim == 0:
        label = label.item()
    if not isinstance(label, str | bytes | Integral):
        kinds, where = ("one integer, string or bool", "") if position is None else (_KINDS, f" at position {position}")
        raise TypeError(f"{name} must be {kinds}, got {label!r}{where}")
    return label


def _sorted(values: Sequence[Any] | dict[Any, None]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:  # strings beside numbers
        return sorted(values, key=lambda value: (type(value).__name__, value))
