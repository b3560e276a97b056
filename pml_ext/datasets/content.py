"""What tells the samples of a data set from others."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pml_ext.datasets.file_copies import size_of
from pml_ext.datasets.image_reader import ImageReader


def fingerprint_of(dataset: Any, labels: Any, sizes: bool = True) -> str:
    """Return 64 hexadecimal digits that change with the samples of a data set or view, their order and their labels.

    Args:
        dataset: A data set or a view of one, in which case the data set behind it counts. Of files (``paths``, or
            torchvision's ``samples``) the path below the folder that all files have in common, and the size, -1 if
            there is no file any more; files are not read. Of arrays (``images`` or ``data``) the values. Of others only
            the index.
        labels: ``(N,)``, integers.
        sizes: Whether sizes of files count.
    """
    digest = hashlib.sha256()
    for label, part in zip(np.asarray(labels).tolist(), _contents(*_inside(dataset), sizes), strict=True):
        digest.update(b"%d %d " % (label, len(part)) + part)
    return digest.hexdigest()


def file_names(dataset: Any) -> list[str] | None:
    """Return the paths of a data set's or view's files below their common folder; None if it has no files."""
    inside, indices = _inside(dataset)
    paths = _paths(inside)
    return None if paths is None else list(_below_common_folder(paths, indices))


def files_by_mark(dataset: Any) -> dict[str, str]:
    """Return the files of a data set or view by marks of the names of file and folder, and of the size.

    A file keeps its mark where its class folder is moved or copied. Empty for a data set that has no files.
    """
    inside, indices = _inside(dataset)
    paths = _paths(inside)
    return {} if paths is None else {_mark(path): path for path in (os.fspath(paths[i]) for i in indices)}


def reader_of(dataset: Any) -> ImageReader | None:
    """Return what a data set or view reads its files with; None if it has no files, or reads them in another way."""
    reader = getattr(_inside(dataset)[0], "reader", None)
    return reader if isinstance(reader, ImageReader) else None


def _inside(dataset: Any) -> tuple[Any, Sequence[int]]:
    """Return what a view, or a view of views, looks at, and which samples of it."""
    indices = np.arange(len(dataset))
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        dataset, indices = dataset.dataset, np.asarray(dataset.indices)[indices]
    return dataset, indices.tolist()


def _contents(dataset: Any, indices: Sequence[int], sizes: bool) -> Iterator[bytes]:
    paths, arrays = _paths(dataset), _arrays(dataset)
    if paths is not None:
        for i, name in zip(indices, _below_common_folder(paths, indices), strict=True):
            size = os.path.getsize(paths[i]) if sizes and os.path.exists(paths[i]) else -1
            yield os.fsencode(name) + b"\0%d" % size
    elif arrays is not None:
        for i in indices:
            row = np.ascontiguousarray(arrays[i])
            yield f"{row.dtype.str} {row.shape} ".encode() + row.tobytes()
    else:
        for i in indices:
            yield b"%d" % i


def _mark(path: str) -> str:
    name = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
    return hashlib.blake2b(b"%d " % size_of(path) + os.fsencode(name), digest_size=8).hexdigest()


def _below_common_folder(paths: Sequence[Any], indices: Sequence[int]) -> Iterator[str]:
    first, last = (os.fspath(path) for path in (min(paths), max(paths)))
    folder = os.path.dirname(os.path.commonprefix([first, last]))  # noqa: RUF071 (cut to folders)
    for i in indices:
        yield os.fspath(paths[i])[len(folder) :].lstrip(os.sep)


def _paths(dataset: Any) -> Any:
    paths: Any = getattr(dataset, "paths", None)
    if paths is None and isinstance(getattr(dataset, "samples", None), list):
        paths = [sample[0] for sample in dataset.samples]
    return paths if paths is not None and len(paths) == len(dataset) > 0 else None


def _arrays(dataset: Any) -> Any:
    for name in ("images", "data"):
        arrays = getattr(dataset, name, None)
        if isinstance(arrays, Tensor | np.ndarray) and len(arrays) == len(dataset):
            return arrays.detach().cpu().numpy() if isinstance(arrays, Tensor) else arrays
    return None
