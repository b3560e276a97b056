"""Find the images most similar to an image.

Run: python examples/search.py --run runs/photos --query photos/cat/1.jpg --k 10 --out found.png
after examples/embed.py. A query that is itself in the index is shown like any other image: first, with similarity 1.
Images that are equally similar come in the order of the index. Those that cannot be read any more are named, and have
an empty place in the picture.
"""

import json
import sys
from pathlib import Path

import command_line  # first: it keeps a warning away
import numpy as np
from embed import content_of

from pml_ext import recipes
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_reader import BrokenImageError
from pml_ext.evaluation.metrics import as_embeddings
from pml_ext.neighbors.search import search as search_gallery


def main(run, query, k=10, index=None, out=None, device=None):
    """Return (similarity, path) of the neighbours, the nearest first."""
    command_line.print_any_name()
    if k < 1:
        raise ValueError(f"--k must be >= 1, got {k}")
    out = Path(run) / "search.png" if out is None else Path(out)
    if out.is_dir():
        raise IsADirectoryError(f"--out must be a file, got the folder {out}")
    out = out if out.suffix else out.with_name(f"{out.name}.png")  # as matplotlib has it
    loaded, folder = recipes.load_run(run, device), Path(run) / "index" if index is None else Path(index)
    embeddings, paths, origin = read_index(folder)
    if origin["weights"] != loaded.checksum:
        raise ValueError(f"--index must be made with the network of --run (examples/embed.py), got {folder} of another")
    dataset = ImageFiles([query], [0], loaded.recipe.transforms.test, reader=loaded.reader)
    embedding, _ = recipes.embed(loaded.recipe.trunk, dataset, autocast=loaded.autocast)
    if embeddings.shape[1] != embedding.shape[1]:
        widths = f"{embedding.shape[1]} columns, as the network of --run, got {embeddings.shape[1]}"
        raise ValueError(f"{folder / 'embeddings.npy'} must have {widths}")
    results = [(similarity, paths[row]) for similarity, row in nearest(embeddings, embedding, k)]
    print("rank  similarity  path")
    for rank, (similarity, path) in enumerate(results, 1):
        print(f"{rank:>4}  {similarity:>10.4f}  {path}")
    files = [(similarity, Path(origin["folder"]) / path) for similarity, path in results]
    unread = draw(query, files, out, loaded.reader)
    if unread:
        counted = f"{len(unread)} of {len(results)} images that cannot be read"
        print(f"warning: the picture lacks {counted}: {command_line.some_of(unread)}", file=sys.stderr)
    print(f"picture: {out}")
    return results


def read_index(folder):
    """Return embeddings, paths, and what index.json holds."""
    files = [folder / name for name in ("embeddings.npy", "paths.txt", "index.json")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"--index must be made by examples/embed.py, got {folder} without {missing[0]}")
    try:
        origin = json.loads(files[2].read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {files[2]}: it is no JSON: {error}") from error
    for name in ("folder", "weights"):
        value = origin.get(name) if isinstance(origin, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{files[2]} must have a text {name!r}, got {value!r}: run examples/embed.py again")
    try:
        embeddings = np.load(files[0], allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # EOFError, ValueError, tokenize.TokenError, ...
        raise ValueError(f"cannot read {files[0]}: it is no array of NumPy, or a part of one: {error}") from error
    lines = files[1].read_bytes()
    content = content_of(embeddings, lines)
    embeddings = as_embeddings(files[0], embeddings).float()
    paths = lines.decode("utf-8", "surrogateescape").split("\n")[:-1]
    if len(paths) != len(embeddings):
        raise ValueError(f"{files[1]} must have {len(embeddings)} lines, one for each row, got {len(paths)}")
    if origin.get("content", content) != content:  # former versions did not keep it
        raise ValueError(
            f"{files[0]} and {files[1].name} must be as they were written, got others: run examples/embed.py again"
        )
    return embeddings, paths, origin


def nearest(embeddings, query, k):
    """Return the k largest similarities to a query, (1, D), and their rows; equal ones in the order of rows."""
    ((_, rows),) = search_gallery(query, embeddings, min(k, len(embeddings)))
    return list(zip((embeddings[rows[0]] * query).sum(1).tolist(), rows[0].tolist(), strict=True))


def draw(query, results, path, reader):
    """Draw the query and its neighbours, in rows of at most 11; return the neighbours that cannot be read."""
    from matplotlib.figure import Figure

    titles = ["query", *(f"{rank}: {similarity:.3f}" for rank, (similarity, _) in enumerate(results, 1))]
    columns = min(len(titles), 11)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.45 * rows), dpi=120, layout="constrained")
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
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    return unread


if __name__ == "__main__":
    wording = {"a run's folder must": "--run must", "trunk must": "the network of --run must"}
    command = command_line.Command(wording, description=__doc__)
    command.add_argument("--run", required=True, help="folder of the run")
    command.add_argument("--query", required=True, help="an image")
    command.add_argument("--k", type=int, default=10, help="how many neighbours")
    command.add_argument("--index", help="folder of the index; default: index in that of the run")
    command.add_argument("--out", help="the picture; default: search.png in the folder of the run")
    command.add_argument("--device", help="default: cuda if there is one")
    command.run(main)
