"""What images are called: the names that a caller gives, or the files that they come from."""

import os
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor

from pml_ext.datasets.content import file_names


def image_names(name: str, names: Any, images: Any, length: int) -> Sequence[str] | None:
    """Return a name for each image, or None where nobody has given one.

    Args:
        name: Name of the argument, for messages.
        names: ``length`` strings or paths. None: those of ``images``.
        images: The images, as ``retrieval_report`` takes them. Paths, and data sets that have paths, give names: what
            comes after the folder that all of them share.
        length: How many there must be.

    Raises:
        TypeError: If ``names`` is not a sequence, or one of them neither a string nor a path.
        ValueError: If there are more or fewer.
    """
    if names is None:
        return _names_of(images)
    if isinstance(names, str | bytes | Mapping | Set) or not hasattr(names, "__len__"):
        raise TypeError(f"{name} must be a sequence of strings or paths, got {type(names).__name__}")
    if len(names) != length:
        raise ValueError(f"{name} must have one entry for each of {length} embeddings, got {len(names)}")
    given = list(names)
    for i, value in enumerate(given):
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} must be strings or paths, got {value!r} at position {i}")
    return [str(value) for value in given]


def last_part(name: str) -> str:
    """Return what stands under a picture: of a path, the name of the file."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _names_of(images: Any) -> Sequence[str] | None:
    if images is None or isinstance(images, Tensor):
        return None
    if hasattr(images, "paths") or hasattr(images, "samples") or hasattr(images, "dataset"):
        return file_names(images)
    if not isinstance(images, Sequence | np.ndarray) and not hasattr(images, "iloc"):  # a Series of pandas
        return None
    paths = [os.fspath(item) for item in images if isinstance(item, str | os.PathLike)]
    return file_names(_Paths(paths)) if len(paths) == len(images) else None


class _Paths(list[str]):
    """Paths as a data set has them."""

    @property
    def paths(self) -> list[str]:
        return self
