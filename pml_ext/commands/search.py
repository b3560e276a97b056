"""``pml-ext search``: find the images most similar to an image."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from pml_ext.commands.command_line import some_of, warn
from pml_ext.commands.first_checks import picture_path
from pml_ext.commands.index import read_index
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_reader import BrokenImageError, ImageReader
from pml_ext.neighbors.search import search as search_gallery
from pml_ext.recipes.evaluation import embed
from pml_ext.recipes.run_folder import load_run
from pml_ext.visualization.saving import save_figure


def main(
    run: str | Path,
    query: str | Path,
    k: int = 10,
    index: str | Path | None = None,
    out: str | Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Print, draw and return the images that are most similar; the arguments are those of the command.

    A query that is itself in the index is shown like any other image: first, with similarity 1. Images that are equally
    similar come in the order of the index. Those that cannot be read any more are named, and have an empty place in
    the picture.
    """
    out = picture_path(run, out)
    loaded, folder = load_run(run, device), Path(run) / "index" if index is None else Path(index)
    embeddings, paths, origin = read_index(folder)
    if origin["weights"] != loaded.checksum:
        raise ValueError(f'--index must be made with the network of RUN ("pml-ext embed"), got {folder} of another')
    dataset = ImageFiles([query], [0], loaded.recipe.transforms.test, reader=loaded.reader)
    embedding, _ = embed(loaded.recipe.trunk, dataset, autocast=loaded.autocast)
    if embeddings.shape[1] != embedding.shape[1]:
        widths = f"{embedding.shape[1]} columns, as the network of RUN, got {embeddings.shape[1]}"
        raise ValueError(f"{folder / 'embeddings.npy'} must have {widths}")
    results = [(similarity, paths[row]) for similarity, row in nearest(embeddings, embedding, k)]
    print("rank  similarity  path")
    for rank, (similarity, path) in enumerate(results, 1):
        print(f"{rank:>4}  {similarity:>10.4f}  {path}")
    found: dict[str, Any] = {"results": [{"similarity": similarity, "path": path} for similarity, path in results]}
    found["folder"] = origin["folder"]
    files = [(similarity, Path(origin["folder"]) / path) for similarity, path in results]
    made = (folder / "index.json").stat().st_mtime
    changed = [file for _, file in files if file.is_file() and file.stat().st_mtime > made]
    if changed:
        counted = f"{len(changed)} of {len(results)} images have changed since the index was made"
        warn(f'{counted}, run "pml-ext embed" again: {some_of(changed)}')
    if find_spec("matplotlib") is None:
        print("no picture is drawn: pip install 'pml-ext[visualization]'")
        return found | {"out": None}
    unread = draw(query, files, out, loaded.reader)
    if unread:
        counted = f"{len(unread)} of {len(results)} images that cannot be read"
        warn(f'the picture lacks {counted}, "pml-ext embed" makes a new index: {some_of(unread)}')
    print(f"picture: {out}")
    return found | {"out": str(out)}


def nearest(embeddings: Tensor, query: Tensor, k: int) -> list[tuple[float, int]]:
    """Return the k largest similarities to a query, (1, D), and their rows; equal ones in the order of rows."""
    ((_, rows),) = search_gallery(query, embeddings, min(k, len(embeddings)))
    return list(zip((embeddings[rows[0]] * query).sum(1).tolist(), rows[0].tolist(), strict=True))


def draw(query: str | Path, results: Sequence[tuple[float, Path]], path: Path, reader: ImageReader) -> list[Path]:
    """Draw the query and its neighbors, in rows of at most 11; return the neighbors that cannot be read."""
    from matplotlib.figure import Figure  # on use: it comes with an extra

    titles = [f"query\n{_end_of(query)}"]
    titles += [f"{rank}: {similarity:.3f}\n{_end_of(file)}" for rank, (similarity, file) in enumerate(results, 1)]
    columns = min(len(titles), 11)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.6 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(reader(query))
    unread = []
    for axis, (_, file) in zip(axes[1:], results, strict=False):
        try:
            axis.imshow(reader(file))
        except BrokenImageError:
            unread.append(file)
            axis.text(0.5, 0.5, "cannot be read", ha="center", va="center", fontsize=7)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=7)
    try:
        save_figure(figure, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    return unread


def _end_of(path: str | Path) -> str:
    """Return folder and name of a file, as far as they fit above a picture, without what matplotlib would interpret."""
    text = "/".join(Path(path).parts[-2:]).encode("utf-8", "replace").decode()  # surrogates become "?"
    return (text if len(text) <= 18 else f"...{text[-15:]}").replace("$", r"\$")
