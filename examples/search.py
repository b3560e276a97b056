"""Find the images most similar to an image.

Run: python examples/search.py --run runs/photos --query photos/cat/1.jpg --k 10 --out found.png
after examples/embed.py. A query that is itself in the index is shown like any other image: first, with similarity 1.
"""

import json
from pathlib import Path

import command_line  # first: it keeps a warning away

from pml_ext import recipes
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_reader import read_image


def main(run, query, k=10, index=None, out=None, device=None):
    """Return (similarity, path) of the neighbours, the nearest first."""
    if k < 1:
        raise ValueError(f"--k must be >= 1, got {k}")
    loaded, folder = recipes.load_run(run, device), Path(run) / "index" if index is None else Path(index)
    faiss_index, paths, origin = read_index(folder)
    if origin["weights"] != loaded.checksum:
        raise ValueError(f"--index must be made with the network of --run (examples/embed.py), got {folder} of another")
    dataset = ImageFiles([query], [0], transform=loaded.recipe.transforms.test)
    embedding, _ = recipes.embed(loaded.recipe.trunk, dataset, autocast=loaded.autocast)
    similarities, rows = faiss_index.search(embedding.numpy(), min(k, len(paths)))
    results = [(float(value), paths[row]) for value, row in zip(similarities[0], rows[0], strict=True)]
    print("rank  similarity  path")
    for rank, (similarity, path) in enumerate(results, 1):
        print(f"{rank:>4}  {similarity:>10.4f}  {path}")
    out = Path(run) / "search.png" if out is None else Path(out)
    draw(query, [(similarity, Path(origin["folder"]) / path) for similarity, path in results], out)
    print(f"picture: {out}")
    return results


def read_index(folder):
    """Return FAISS index, paths, and what index.json holds."""
    import faiss

    missing = [name for name in ("index.faiss", "paths.txt", "index.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"--index must be made by examples/embed.py, got {folder} without {missing[0]}")
    try:
        index = faiss.read_index(str(folder / "index.faiss"))
    except RuntimeError as error:
        raise ValueError(f"cannot read {folder / 'index.faiss'}: it is no index of FAISS") from error
    paths = (folder / "paths.txt").read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]
    if len(paths) != index.ntotal:
        raise ValueError(f"{folder / 'paths.txt'} must have {index.ntotal} lines, one for each row, got {len(paths)}")
    return index, paths, json.loads((folder / "index.json").read_text())


def draw(query, results, path):
    """Draw the query and its neighbours, in rows of at most 11."""
    from matplotlib.figure import Figure

    titles = ["query", *(f"{rank}: {similarity:.3f}" for rank, (similarity, _) in enumerate(results, 1))]
    columns = min(len(titles), 11)
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.2 * columns, 1.45 * rows), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, title, file in zip(axes, titles, [query, *(file for _, file in results)], strict=False):
        axis.imshow(read_image(file))
        axis.set_title(title, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    command = command_line.Command({"a run's folder must": "--run must"}, description=__doc__)
    command.add_argument("--run", required=True, help="folder of the run")
    command.add_argument("--query", required=True, help="an image")
    command.add_argument("--k", type=int, default=10, help="how many neighbours")
    command.add_argument("--index", help="folder of the index; default: index in that of the run")
    command.add_argument("--out", help="the picture; default: search.png in the folder of the run")
    command.add_argument("--device", help="default: cuda if there is one")
    command.run(main)
