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
    for mark in (size_of, partial(digest_of, length=1 << 16), digest_of):
        by_mark = defaultdict[tuple[int, object], list[int]](list)
        for number, group in enumerate(groups):
            for i in group:
                by_mark[number, mark(paths[i])].append(i)
        groups = [group for (_, found), group in by_mark.items() if found and len(group) > 1]
    return {i: group[0] for group in groups for i in group[1:]}


def size_of(path: str | Path) -> int:
    """Return the size of a file; 0 if it cannot be read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def digest_of(path: str | Path, length: int = -1) -> bytes:
    """Return the SHA-256 of a file, or of its first bytes; nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(length)).digest()
    except OSError:
        return b""
