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
from typing import Any, NamedTuple

from pml_ext.recipes.checkpoint import LEFT_BEHIND
from pml_ext.strict_json import strict_json

if os.name == "posix":
    import fcntl

_SIGN_OF_LIFE = 30.0  # seconds between two
_SILENCE = 300.0  # seconds without one, after which an owner that cannot be looked up counts as dead


class _Hold(NamedTuple):
    token: str
    ended: threading.Event
    times: int


_held: dict[tuple[Path, int, int], _Hold] = {}  # folder, process and thread


class RunLock:
    """Hold a folder for one process, as a context manager; the same thread may hold it again.

    The file ``lock.json`` names its owner, who touches it twice a minute. If the owner was a process of this system
    which is gone, or elsewhere (another host, another container) and silent for five minutes, the folder is taken over,
    and what was left half-written in it is deleted.

    Args:
        folder: Made if it is not there.
        name: Name of the folder, for messages.

    Raises:
        ValueError: If another process, or thread, holds it.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = "a run's folder") -> None:
        self.path = Path(folder).resolve() / "lock.json"
        self.name = name

    def __enter__(self) -> None:
        key = self._key()
        if key not in _held:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            hold = _Hold(uuid.uuid4().hex, threading.Event(), 0)
            with _one_at_a_time(self.path.parent):
                self._acquire(hold.token)
            threading.Thread(target=self._live, args=(hold,), daemon=True).start()
            for path in self.path.parent.glob("*.new"):
                if LEFT_BEHIND.search(path.name):
                    path.unlink(missing_ok=True)
            _held[key] = hold
        _held[key] = _held[key]._replace(times=_held[key].times + 1)

    def __exit__(self, *_: object) -> None:
        key = self._key()
        hold = _held[key] = _held[key]._replace(times=_held[key].times - 1)
        if not hold.times:
            del _held[key]
            hold.ended.set()
            if self._is_held_by(hold):
                self.path.unlink(missing_ok=True)

    def confirm(self) -> None:
        """Check that the folder is still held: somebody may have deleted the lock, or taken it over from a sleeper.

        Raises:
            ValueError: If it is not.
        """
        if not self._is_held_by(_held[self._key()]):
            raise ValueError(
                f"{self.name} must stay this process's, got {self.path.parent}, which another process has taken"
            )

    def _key(self) -> tuple[Path, int, int]:
        return self.path.parent, os.getpid(), threading.get_ident()

    def _is_held_by(self, hold: _Hold) -> bool:
        try:
            return _owner(self.path.read_text(encoding="utf-8")).get("token") == hold.token
        except OSError:
            return False

    def _live(self, hold: _Hold) -> None:
        while not hold.ended.wait(_SIGN_OF_LIFE):
            with suppress(OSError):
                if self._is_held_by(hold):
                    os.utime(self.path)

    def _acquire(self, token: str) -> None:
        own = self.path.with_name(f"lock.json.{token}.own")  # no name that the holder clears away
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "began": _began(os.getpid())}
        own.write_text(strict_json(owner | {"system": _system(), "token": token}), encoding="utf-8")
        try:
            while not _link(own, self.path):
                self._remove_stale(own)
        finally:
            own.unlink(missing_ok=True)

    def _remove_stale(self, own: Path) -> None:
        """Take the lock of a dead owner away, or say who holds it."""
        try:
            text = self.path.read_text(encoding="utf-8")
            os.utime(own)
            silent = own.stat().st_mtime - self.path.stat().st_mtime  # by one clock, that of the file system
        except FileNotFoundError:  # given back just now
            return
        owner = _owner(text)
        if not _is_gone(owner, silent):
            who = f"process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}"
            raise ValueError(
                f"{self.name} must be free, got {self.path.parent}, which another process writes to ({who}, last "
                f"active {max(silent, 0):.0f} s ago); if it was killed, delete {self.path} or wait: a lock of another "
                f"host expires after {_SILENCE:.0f} s"
            )
        self.path.unlink(missing_ok=True)  # none takes it meanwhile: see _one_at_a_time


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one thread or process at a time take a folder, or two could take a stale lock away, one of them the other's.

    Where the system has no locks of folders (Windows, file systems without ``flock``), two that meet a stale lock
    within a moment may both go on; the first of them learns of it by ``confirm``.
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


def _is_gone(owner: dict[str, Any], silent: float) -> bool:
    process = owner.get("process")
    here = owner.get("host") == socket.gethostname() and owner.get("system") == _system()
    if not here or not isinstance(process, int) or os.name != "posix":  # os.kill would end it elsewhere
        return silent > _SILENCE
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OverflowError:
        return True
    except PermissionError:
        pass
    return _began(process) != owner.get("began")  # another process with its number


def _system() -> str | None:
    """Return what Linux calls this start of the system, and this container's processes; None elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return None


def _began(process: int) -> str | None:
    """Return when a process began, in ticks since the system did, as Linux tells it; "" for one that has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *_ = fields = re.sub(r".*\) ", "", text, flags=re.DOTALL).split()
    return "" if state in "ZX" else fields[19]
