"""The index of ``pml-ext embed``: embeddings and paths in a folder, written whole or not at all."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pml_ext.evaluation.metrics import as_embeddings
from pml_ext.recipes.run_lock import RunLock
from pml_ext.strict_json import strict_json


class Index(NamedTuple):
    """What an index holds.

    Attributes:
        embeddings: ``(N, D)``, float32.
        paths: N paths of images, relative to ``origin["folder"]``.
        origin: What ``index.json`` holds.
    """

    embeddings: Tensor
    paths: list[str]
    origin: dict[str, Any]


def write_index(out: Path, embeddings: "np.ndarray[Any, Any]", paths: Sequence[str], origin: dict[str, Any]) -> None:
    """Write all of an index, or nothing.

    Args:
        out: The index's folder.
        embeddings: ``(N, D)``, float32.
        paths: N paths of images.
        origin: What else ``index.json`` is to hold: the folder, and the checksum of the network.

    Raises:
        OSError: If it cannot be written; what was there is as it was.
        ValueError: If another process writes it.
    """
    import faiss  # on use: it takes time, and a search does without

    library: Any = faiss
    index = library.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    lines = "".join(f"{path}\n" for path in paths).encode("utf-8", "surrogateescape")
    origin = origin | {"images": len(paths), "content": content_of(embeddings, lines)}
    about = strict_json(origin, indent=2) + "\n"
    writers: dict[str, Callable[[Any], Any]] = {
        # Of NumPy and FAISS, those that take a path do not say, or not always, that the disk is full.
        "embeddings.npy": lambda file: np.save(SimpleNamespace(write=file.write), embeddings),
        "index.faiss": lambda file: library.write_index(index, library.PyCallbackIOWriter(file.write)),
        "paths.txt": lambda file: file.write(lines),
        "index.json": lambda file: file.write(about.encode()),
    }
    try:
        with RunLock(out, "an index's folder"):
            for left in out.glob(".new-*"):  # by a process that was killed
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as new:
                for name, write in writers.items():
                    with open(Path(new) / name, "wb") as file:
                        write(file)
                (out / "index.json").unlink(missing_ok=True)  # without it, what is killed below is no index
                for name in writers:
                    os.replace(Path(new) / name, out / name)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}") from error


def read_index(folder: Path) -> Index:
    """Return what an index holds.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If one is not as it was written.
    """
    files = [folder / name for name in ("embeddings.npy", "paths.txt", "index.json")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f'--index must be made by "pml-ext embed", got {folder} without {missing[0]}')
    try:
        origin = json.loads(files[2].read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {files[2]}: it is no JSON: {error}") from error
    again = 'run "pml-ext embed" again'
    for name in ("folder", "weights"):
        value = origin.get(name) if isinstance(origin, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{files[2]} must have a text {name!r}, got {value!r}: {again}")
    try:
        array = np.load(files[0], allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # EOFError, ValueError, tokenize.TokenError, ...
        raise ValueError(f"cannot read {files[0]}: it is no array of NumPy, or a part of one: {error}") from error
    lines = files[1].read_bytes()
    content = content_of(array, lines)
    embeddings = as_embeddings(str(files[0]), array).float()
    paths = lines.decode("utf-8", "surrogateescape").split("\n")[:-1]
    if len(paths) != len(embeddings):
        raise ValueError(f"{files[1]} must have {len(embeddings)} lines, one for each row, got {len(paths)}")
    if origin.get("content", content) != content:  # former versions did not keep it
        raise ValueError(f"{files[0]} and {files[1].name} must be as they were written, got others: {again}")
    return Index(embeddings, paths, origin)


def content_of(embeddings: "np.ndarray[Any, Any]", lines: bytes) -> str:
    """Return what tells whether embeddings and paths are those that were written."""
    return f"{zlib.crc32(lines, zlib.crc32(np.ascontiguousarray(embeddings).data)):08x}"
