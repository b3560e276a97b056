"""Embed all images of a folder with a trained network, and index them.

Run: python examples/embed.py --run runs/photos --images photos/
after examples/train.py. The folder may have any layout: photos/gallery is the one to embed where queries search a
gallery. --out gets embeddings.npy (float32, unit length), paths.txt (a line for each row, relative to the folder),
index.faiss (inner product, which is the cosine) and index.json; older ones are replaced. Then: examples/search.py.
"""

import json
import sys
from pathlib import Path

import command_line  # first: it keeps a warning away
import numpy as np
import torch

from pml_ext import recipes
from pml_ext.datasets.folder_walk import find_images
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.readable import Readable


def main(run, images, out=None, skip_broken=False, batch_size=256, workers=0, device=None):
    """Return the embeddings and the paths."""
    loaded, images = recipes.load_run(run, device), Path(images)
    if not images.is_dir():
        raise FileNotFoundError(f"--images must be a folder, got {images}")
    files = find_images(images)
    if not files:
        raise ValueError(f"--images must be a folder with images in it or below, got {images} without")
    made = loaded.recipe
    channels, size = made.settings.in_channels, made.settings.image_size
    dataset = ImageFiles(files, [0] * len(files), transform=made.transforms.test)
    embeddings, labels = recipes.embed(
        made.trunk,
        Readable(dataset, torch.zeros(channels, size, size)) if skip_broken else dataset,
        batch_size,
        loaded.autocast,
        workers,
        progress=True,
    )
    broken = [file for file, label in zip(files, labels.tolist(), strict=True) if label < 0]
    if len(broken) == len(files):
        raise ValueError(f"--images must have an image that can be read, got {len(files)} that cannot")
    if broken:
        skipped = f"{len(broken)} of {len(files)} images that cannot be read: {command_line.some_of(broken)}"
        print(f"warning: skipped {skipped}", file=sys.stderr)
    embeddings = embeddings[labels >= 0].numpy()
    paths = [Path(f).relative_to(images).as_posix() for f, label in zip(files, labels, strict=True) if label >= 0]
    out = Path(run) / "index" if out is None else Path(out)
    write_index(out, embeddings, paths, {"folder": str(images.resolve()), "weights": loaded.checksum})
    print(f"{len(paths)} images, {embeddings.shape[1]} numbers each: {out}")
    return embeddings, paths


def write_index(out, embeddings, paths, origin):
    """Write what search.py needs."""
    import faiss

    if any("\n" in path for path in paths):
        raise ValueError(f"--images must have no line break in a name, got {next(p for p in paths if chr(10) in p)!r}")
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "embeddings.npy", embeddings)
    (out / "paths.txt").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8", errors="surrogateescape")
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)
    faiss.write_index(index, str(out / "index.faiss"))
    (out / "index.json").write_text(json.dumps(origin | {"images": len(paths)}, indent=2) + "\n")


if __name__ == "__main__":
    command = command_line.Command({"a run's folder must": "--run must"}, description=__doc__)
    command.add_argument("--run", required=True, help="folder of the run")
    command.add_argument("--images", required=True, help="folder with images, in it or below")
    command.add_argument("--out", help="folder of the index; default: index in that of the run")
    command.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--batch-size", type=int, default=256)
    command.add_argument("--workers", type=int, default=0, help="processes that load images")
    command.add_argument("--device", help="default: cuda if there is one")
    command.run(main)
