"""Image files with the same content, which find each other first."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path


def copied_files(paths: Sequence[str | Path]) -> dict[int, int]:
    """Return the positions of files that are copies of an earlier one, byte for byte, with the position of that one.

    A file is read only if others have the same size, and whole only if these begin with the same 64 KiB. Files that are
    empty or cannot be read are copies of none.
    """
    groups = [list(range(len(paths)))]
    for mark in (_size, partial(_digest, length=1 << 16), partial(_digest, length=-1)):
        by_mark = defaultdict[tuple[int, object], list[int]](list)
        for number, group in enumerate(groups):
            for i in group:
                by_mark[number, mark(paths[i])].append(i)
        groups = [group for (_, found), group in by_mark.items() if found and len(group) > 1]
    return {i: group[0] for group in groups for i in group[1:]}


def _size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _digest(path: str | Path, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(length)).digest()
    except OSError:
        return b""
