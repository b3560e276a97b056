"""Keep freed memory at hand."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees.

    Otherwise it returns large blocks to the system at once, and each training step on a CPU fetches its memory anew,
    page by page, which takes a good part of the step. Does nothing without glibc, or if a variable ``MALLOC_...`` is
    set.

    Returns:
        Whether glibc will do so.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(_MMAP_MAX, 0))
