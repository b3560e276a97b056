"""Files that are written whole or not at all, and checkpoints whose damage is noticed."""

import io
import os
import re
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SEAL = re.compile(rb"crc32 ([0-9a-f]{8})")
_SEAL_LENGTH = 14
LEFT_BEHIND = re.compile(r"\.(pt|json|jsonl)(\.\w+)?\.new")
"""Names of files that a killed process has left; nobody reads them."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of ``path`` if all goes well and goes away if not.

    Raises:
        OSError: If it cannot be written; the message names ``path``.
    """
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")  # no two processes write one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)  # a run killed here leaves the former one whole
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}; what was there is as it was") from error
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write what ``read_checkpoint`` reads: a file of ``torch.save`` with a checksum in the comment of its archive.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path) as new:
        with new.open("wb") as file:
            _save(state, file)
        seal = b"crc32 %08x" % _crc(new, new.stat().st_size)
        with new.open("r+b") as file:
            file.seek(-2, os.SEEK_END)  # the length of the comment, which is the end of an archive without
            file.write(struct.pack("<H", len(seal)) + seal)


def try_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and read it again, on trial.

    Raises:
        OSError: If it cannot be written.
        TypeError: If it cannot be saved, or be read with ``weights_only=True``; the message names the part.
    """
    path = folder / "trial.pt.new"
    try:
        write_checkpoint(path, state)
        torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of pickle
        raise TypeError(
            f"what is trained must be savable, tensors and plain values, got {_unsavable(state)}"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _unsavable(state: dict[str, Any]) -> str:
    for name, part in state.items():
        file = io.BytesIO()
        try:
            torch.save(part, file)
            file.seek(0)
            torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle
            reason = re.search(r"GLOBAL (\S+)", str(error))
            return f"{name} with {reason[1] if reason else str(error).splitlines()[0]}"
    return "something else"


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU; one of former versions, without a checksum of ours, too.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or no checkpoint of a ``Trainer``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"a checkpoint must exist to resume from, got none at {path}")
    try:
        _check_seal(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of files, archives, pickles
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot read {path}: {reason}: it is damaged or no checkpoint; put a copy or another checkpoint of the "
            "run (best.pt, last.pt) in its place, or train again in another folder"
        ) from error
    missing = {"trunk", "loss", "history"} - (set(state) if isinstance(state, dict) else set())
    if missing or (isinstance(state["history"], list) and not state["history"]):
        raise ValueError(f"cannot read {path}: a checkpoint must have {min(missing or {'history'})!r}, got none")
    for name in ("trunk", "loss"):
        if not isinstance(state[name], dict):
            raise ValueError(f"cannot read {path}: {name} must be a state dict, got a {type(state[name]).__name__}")
    history = state["history"]
    if not isinstance(history, list) or not all(isinstance(entry, dict) and "epoch" in entry for entry in history):
        raise ValueError(f"cannot read {path}: history must be a list of epochs, got {history!r}")
    return dict(state)


def _check_seal(path: Path) -> None:
    """Check the checksum of the whole file, or those that each archive has for its parts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _SEAL_LENGTH - 2, 0))
        length, seal = file.read(2), _SEAL.fullmatch(file.read())
    if seal and length == struct.pack("<H", _SEAL_LENGTH):
        whole = zlib.crc32(bytes(2), _crc(path, size - _SEAL_LENGTH - 2))
        if whole != int(seal[1], 16):
            raise ValueError("its checksum is wrong")
        return
    with zipfile.ZipFile(path) as archive:
        part = archive.testzip()
        if part is not None or archive.comment:
            raise ValueError(f"the checksum of {'its end' if part is None else part} is wrong")


def _crc(path: Path, size: int) -> int:
    checksum = 0
    with path.open("rb") as file:
        while size:
            block = file.read(min(size, 1 << 20))
            checksum, size = zlib.crc32(block, checksum), size - len(block)
    return checksum


class _Noticing:
    """A file that remembers why it could not be written: ``torch.save`` raises an error that does not say so."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(state: dict[str, Any], file: Any) -> None:
    noticing: Any = _Noticing(file)
    try:
        torch.save(state, noticing)
    except RuntimeError:
        if noticing.error is not None:
            raise noticing.error from None
        raise
