"""How many threads of gloo a process has, as Linux shows them."""

import time
from contextlib import suppress
from pathlib import Path


def count():
    """Return the number of threads; one that has been joined may be listed a moment longer."""
    time.sleep(0.5)
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text())
    return sum("gloo" in name for name in names)
