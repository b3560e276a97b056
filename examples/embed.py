"""Embed all images of a folder with a trained network, and index them.

Run: python examples/embed.py --run runs/photos --images photos/
after examples/train.py. The folder may have any layout: photos/gallery is the one to embed where queries search a
gallery. --out gets embeddings.npy (float32, unit length), paths.txt (a line for each row, relative to the folder),
index.faiss (inner product, which is the cosine; for other programs) and index.json; older ones are replaced, once all
of it is there. Then: examples/search.py.
"""

import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import command_line  # first: it keeps a warning away
import numpy as np

from pml_ext import recipes
from pml_ext.datasets.folder_walk import find_images
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.recipes.evaluation import embed_readable
from pml_ext.recipes.run_lock import RunLock
from pml_ext.strict_json import strict_json


def main(run, images, out=None, skip_broken=False, batch_size=256, workers=0, device=None):
    """Return the embeddings and the paths."""
    command_line.print_any_name()
    loaded, images = recipes.load_run(run, device), Path(images)
    out = Path(run) / "index" if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out must be a folder, got the file {out}")
    if not images.is_dir():
        raise FileNotFoundError(f"--images must be a folder, got {images}")
    files = find_images(images)
    if not files:
        raise ValueError(f"--images must be a folder with images in it or below, got {images} without")
    broken_name = next((file for file in files if "\n" in file), None)
    if broken_name is not None:  # paths.txt has a line for each
        raise ValueError(f"--images must have no line break in a name, got {broken_name!r}")
    made = loaded.recipe
    dataset = ImageFiles(files, [0] * len(files), made.transforms.test, reader=loaded.reader)
    embed = embed_readable if skip_broken else recipes.embed
    embeddings, _, *readable = embed(made.trunk, dataset, batch_size, loaded.autocast, workers, progress=True)
    read = readable[0].tolist() if readable else [True] * len(files)
    broken = [file for file, whole in zip(files, read, strict=True) if not whole]
    if broken:
        skipped = f"{len(broken)} of {len(files)} images that cannot be read: {command_line.some_of(broken)}"
        print(f"warning: skipped {skipped}", file=sys.stderr)
    embeddings = embeddings.numpy()
    paths = [Path(file).relative_to(images).as_posix() for file, whole in zip(files, read, strict=True) if whole]
    write_index(out, embeddings, paths, {"folder": str(images.resolve()), "weights": loaded.checksum})
    print(f"{len(paths)} images, {embeddings.shape[1]} numbers each: {out}")
    return embeddings, paths


def content_of(embeddings, lines):
    """Return what tells whether embeddings and paths are those that were written."""
    return f"{zlib.crc32(lines, zlib.crc32(np.ascontiguousarray(embeddings))):08x}"


def write_index(out, embeddings, paths, origin):
    """Write what search.py needs: all of it, or nothing."""
    import faiss

    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    lines = "".join(f"{path}\n" for path in paths).encode("utf-8", "surrogateescape")
    origin = origin | {"images": len(paths), "content": content_of(embeddings, lines)}
    about = strict_json(origin, indent=2) + "\n"
    writers = {  # of NumPy and FAISS, those that take a path do not say, or not always, that the disk is full
        "embeddings.npy": lambda file: np.save(SimpleNamespace(write=file.write), embeddings),
        "index.faiss": lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)),
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


if __name__ == "__main__":
    wording = {"a run's folder must": "--run must", "trunk must": "the network of --run must"}
    wording |= {"dataset must": "--images must", "an index's folder must": "--out must"}
    command = command_line.Command(wording, description=__doc__)
    command.add_argument("--run", required=True, help="folder of the run")
    command.add_argument("--images", required=True, help="folder with images, in it or below")
    command.add_argument("--out", help="folder of the index; default: index in that of the run")
    command.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--batch-size", type=int, default=256)
    command.add_argument("--workers", type=int, default=0, help="processes that load images")
    command.add_argument("--device", help="default: cuda if there is one")
    command.run(main)
