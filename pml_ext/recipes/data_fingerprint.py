"""Which images a training has, in a few letters."""

import hashlib
import os
import zlib
from typing import Any

import numpy as np
import torch

from pml_ext.datasets.class_subset import ClassSubset


def fingerprint(dataset: Any, labels: Any) -> str:
    """Return what tells whether a data set is another: of its own, or of its files' names, or pixels, and labels.

    Args:
        dataset: What it has counts: a method ``fingerprint``; names of files; ``images``, an array.
        labels: ``(N,)``, integers.
    """
    own = getattr(dataset, "fingerprint", None)
    return str(own()) if callable(own) else fingerprint_of_names(dataset, labels)


def fingerprint_of_names(dataset: Any, labels: Any) -> str:
    """Return what tells whether names or labels are others, where files may have broken since and changed their size.

    Args:
        dataset: Its names of files count, or ``images``, an array.
        labels: ``(N,)``, integers.
    """
    digest = hashlib.sha256(np.asarray(labels, dtype=np.int64).tobytes())
    names = image_names(dataset)
    digest.update(str(_checksum(dataset) if names is None else names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def image_names(dataset: Any) -> list[str] | None:
    """Return the names of a data set's files, below the folder that all have in common; None if it has no files."""
    if isinstance(dataset, ClassSubset):
        names = image_names(dataset.dataset)
        return None if names is None else [names[i] for i in dataset.indices.tolist()]
    paths = getattr(dataset, "paths", None)
    if paths is None or not len(paths):
        return None
    paths = [os.fspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [path[len(folder) :].lstrip(os.sep) for path in paths]


def _checksum(dataset: Any) -> Any:
    if isinstance(dataset, ClassSubset):
        return _checksum(dataset.dataset), dataset.indices.tolist()
    images = getattr(dataset, "images", None)
    if not isinstance(images, torch.Tensor | np.ndarray):
        return None
    return zlib.crc32(np.ascontiguousarray(images).data.cast("B"))
