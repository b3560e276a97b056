"""One training at a time in a folder."""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pml_ext.recipes.checkpoint import LEFT_BEHIND
from pml_ext.strict_json import strict_json

if os.name == "posix":
    import fcntl

_held: dict[tuple[Path, int, int], int] = {}  # folder, process and thread: how often


class RunLock:
    """Hold a folder for one training, as a context manager; the same thread may hold it again.

    The file ``lock.json`` names its owner. That of a process of this host which is gone is taken over, and what it has
    left half-written is deleted. Of other hosts nothing is known: there the file has to be deleted by hand.

    Args:
        folder: Made if it is not there.

    Raises:
        ValueError: If another process, or thread, holds it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder).resolve() / "lock.json"

    def __enter__(self) -> None:
        key = self._key()
        if key not in _held:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(self.path.parent):
                self._acquire()
            for path in self.path.parent.glob("*.new"):
                if LEFT_BEHIND.search(path.name):
                    path.unlink(missing_ok=True)
        _held[key] = _held.get(key, 0) + 1

    def __exit__(self, *_: object) -> None:
        key = self._key()
        _held[key] -= 1
        if not _held[key]:
            del _held[key]
            self.path.unlink(missing_ok=True)

    def _key(self) -> tuple[Path, int, int]:
        return self.path.parent, os.getpid(), threading.get_ident()

    def _acquire(self) -> None:
        own = self.path.with_name(f"lock.json.{uuid.uuid4().hex}.own")  # no name that the holder clears away
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "began": _began(os.getpid())}
        own.write_text(strict_json(owner), encoding="utf-8")
        try:
            while not _link(own, self.path):
                self._remove_stale()
        finally:
            own.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Take the lock of a dead owner away, or say who holds it."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:  # given back just now
            return
        owner = _owner(text)
        if not _is_gone(owner):
            who = f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"
            raise ValueError(
                f"a run's folder must be free, got {self.path.parent}, where another training runs ({who}); if it does "
                f"not, delete {self.path}"
            )
        self.path.unlink(missing_ok=True)  # none takes it meanwhile: see _one_at_a_time


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one thread or process at a time take a folder, or two could take a stale lock away, one of them the other's.

    Where the system has no locks of folders, stale ones are not recognised (Windows), or two that meet within a
    moment may both go on (file systems without ``flock``).
    """
    if os.name != "posix":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _link(source: Path, target: Path) -> bool:
    """Put a file, whole, where no other is; return whether that was so."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        text = source.read_text(encoding="utf-8")  # first: else a failure would leave an empty lock
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True


def _owner(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        return {}


def _is_gone(owner: dict[str, Any]) -> bool:
    process = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    if os.name != "posix":
        return False  # os.kill would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OverflowError:
        return True
    except PermissionError:
        pass
    return _began(process) != owner.get("began")  # another process with its number


def _began(process: int) -> str | None:
    """Return when a process began, in ticks since the system did, as Linux tells it; "" for one that has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *_ = fields = re.sub(r".*\) ", "", text, flags=re.DOTALL).split()
    return "" if state in "ZX" else fields[19]
