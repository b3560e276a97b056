"""Many paths in little memory."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np


class PathArray(Sequence[str]):
    """Paths in one array of bytes.

    A list of strings costs each worker process of a ``DataLoader`` its own copy, since Python counts references in the
    strings themselves. Pages of an array are shared.

    Args:
        paths: Strings or paths.

    Examples:
        >>> paths = PathArray(["photos/cat/1.jpg", "photos/cat/2.jpg", "photos/owl/1.jpg"])
        >>> paths[-1], paths[:2]
        ('photos/owl/1.jpg', ['photos/cat/1.jpg', 'photos/cat/2.jpg'])
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._common: bytes = os.path.commonprefix(encoded) or b""  # noqa: RUF071 (any first characters)
        self._ends = np.cumsum([0] + [len(path) - len(self._common) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(path[len(self._common) :] for path in encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: Any) -> Any:
        """Return a path, or a list of paths."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # with Python's errors
        return os.fsdecode(self._common + self._bytes[self._ends[i] : self._ends[i + 1]].tobytes())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathArray | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {len(self)} paths"
