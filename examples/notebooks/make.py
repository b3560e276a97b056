"""Make the notebooks, outputs included, from the scripts beside this file.

Run: python examples/notebooks/make.py (all), or with names: python examples/notebooks/make.py 01_swap_one_loss
It needs jupytext, nbclient and ipykernel. What differs between machines or runs (times, random cell ids, versions) is
left out, so that a second run gives a small diff.
"""

import argparse
import base64
import io
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}
TIMEOUT = 600  # seconds for one cell


def sources():
    """Return the scripts that are notebooks, name to path: those that begin with a number."""
    return {path.stem: path for path in sorted(FOLDER.glob("[0-9]*_*.py"))}


def convert(path):
    """Return a script as a notebook without outputs."""
    notebook = jupytext.read(path, fmt="py:light")
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.clear()
        cell.source = cell.source.strip()
    return notebook


def execute(notebook):
    """Run a notebook in the folder above examples, so that the package need not be installed."""
    place = {"metadata": {"path": str(FOLDER.parents[1])}}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name=METADATA["kernelspec"]["name"],
        resources=place,
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the client has added the version of Python


def shrink_pictures(notebook):
    """Store pictures with 256 colours, less than half of the size, and without the name of what drew them."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
                buffer = io.BytesIO()
                few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
                few.save(buffer, "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def errors_written(notebook):
    """Return what the cells wrote to stderr: warnings and progress bars, which readers should not have to skip."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def main(names=None):
    """Make the notebooks of these names, or all; return their paths."""
    known = sources()
    made = []
    with tqdm(names or known, unit="notebook") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            notebook = convert(known[name])
            started = time.perf_counter()
            execute(notebook)
            seconds = time.perf_counter() - started
            shrink_pictures(notebook)
            made.append(known[name].with_suffix(".ipynb"))
            nbformat.write(notebook, made[-1])
            bar.write(f"{made[-1].name}: {seconds:.0f} s, {made[-1].stat().st_size / 1000:.0f} kB")
            if text := errors_written(notebook):
                bar.write(f"{made[-1].name}: written to stderr:\n{text}")
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sources())}; all if none is given")
    chosen = parser.parse_args().names
    if unknown := [name for name in chosen if name not in sources()]:
        parser.error(f"names must be of {', '.join(sources())}, got {', '.join(unknown)}")  # status 2
    main(chosen)
