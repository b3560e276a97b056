"""What tells the samples of a data set from others."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def content_of(dataset: Any, indices: Sequence[int]) -> Iterator[bytes]:
    """Yield a few bytes for each sample that change where the sample does.

    Of files (``paths``, or torchvision's ``samples``) these are the path below the folder that all files of the data
    set have in common, and the size, -1 if there is no file any more; files are not read. Of arrays (``images`` or
    ``data``) they are the values. Of other data sets nothing is known but the index.
    """
    paths, arrays = _paths(dataset), _arrays(dataset)
    if paths is not None:
        folder = os.path.dirname(os.path.commonprefix([min(paths), max(paths)]))  # noqa: RUF071 (cut to folders)
        for i in indices:
            path = os.fspath(paths[i])
            size = os.path.getsize(path) if os.path.exists(path) else -1
            yield os.fsencode(path[len(folder) :].lstrip(os.sep)) + b"\0%d" % size
    elif arrays is not None:
        for i in indices:
            row = np.ascontiguousarray(arrays[i])
            yield f"{row.dtype.str} {row.shape} ".encode() + row.tobytes()
    else:
        for i in indices:
            yield b"%d" % i


def _paths(dataset: Any) -> Any:
    paths: Any = getattr(dataset, "paths", None)
    if paths is None and isinstance(getattr(dataset, "samples", None), list):
        paths = [sample[0] for sample in dataset.samples]
    return paths if paths is not None and len(paths) == len(dataset) else None


def _arrays(dataset: Any) -> Any:
    for name in ("images", "data"):
        arrays = getattr(dataset, name, None)
        if isinstance(arrays, Tensor | np.ndarray) and len(arrays) == len(dataset):
            return arrays.detach().cpu().numpy() if isinstance(arrays, Tensor) else arrays
    return None
