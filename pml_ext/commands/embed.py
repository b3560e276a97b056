"""``pml-ext embed``: embed all images of a folder with a trained network, and index them."""

from pathlib import Path
from typing import Any

from pml_ext.commands.index import write_index
from pml_ext.commands.opened_data import refuse_broken
from pml_ext.datasets.folder_walk import find_images
from pml_ext.datasets.image_files import ImageFiles, broken_images
from pml_ext.recipes.evaluation import embed, embed_readable
from pml_ext.recipes.run_folder import load_run


def main(
    run: str | Path,
    images: str | Path,
    out: str | Path | None = None,
    skip_broken: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Write the index of a folder of images, in any layout; the arguments are those of the command.

    ``out`` gets ``embeddings.npy`` (float32, unit length), ``paths.txt`` (a line for each row, relative to the
    folder), ``index.faiss`` (inner product, which is the cosine; for other programs) and ``index.json``.
    """
    loaded, images = load_run(run, device), Path(images)
    out = Path(run) / "index" if out is None else Path(out)
    files = find_images(images)
    if not files:
        raise ValueError(f"IMAGES must be a folder with images in it or below, got {images} without")
    broken_name = next((file for file in files if {"\n", "\r"} & set(file)), None)
    if broken_name is not None:  # paths.txt has a line for each
        raise ValueError(f"IMAGES must have no line break in a name, got {broken_name!r}")
    if not skip_broken:
        reasons = broken_images(files, progress=True, reader=loaded.reader)
        if reasons:
            refuse_broken([files[i] for i in reasons], len(files), next(iter(reasons.values())), skip_broken)
    made = loaded.recipe
    dataset = ImageFiles(files, [0] * len(files), made.transforms.test, reader=loaded.reader)
    read = [True] * len(files)
    if skip_broken:
        embeddings, _, readable = embed_readable(
            made.trunk, dataset, batch_size, loaded.autocast, workers, progress=True
        )
        read = readable.tolist()
    else:
        embeddings, _ = embed(made.trunk, dataset, batch_size, loaded.autocast, workers, progress=True)
    skipped = [file for file, whole in zip(files, read, strict=True) if not whole]
    if skipped:
        refuse_broken(skipped, len(files), "", skip_broken)
    paths = [Path(file).relative_to(images).as_posix() for file, whole in zip(files, read, strict=True) if whole]
    write_index(out, embeddings.numpy(), paths, {"folder": str(images.resolve()), "weights": loaded.checksum})
    print(f"{len(paths):,} images, {embeddings.shape[1]} dimensions each: {out}")
    return {"images": len(paths), "embedding_size": embeddings.shape[1], "skipped": skipped, "out": str(out)}
