"""Notebooks are what their scripts make, and were run as a whole. Nothing is executed here."""

import re
from pathlib import Path

import pytest

from tests.needs import needs

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted({path.stem for path in FOLDER.glob("[0-9]*") if path.suffix in (".py", ".ipynb")})
OF_A_MACHINE = re.compile(r"(?<![\w.])/(tmp|home|root|opt|usr|var|work|mnt|private|Users)/|[A-Za-z]:\\\\?Users")
PLOTS = re.compile(r"^(draw\w*|titled|retrieval_gallery|plot_curves|attention_overlay|mask_grid|batch_attention)\(")
LARGEST = 300_000  # bytes
LONGEST = 30  # lines that a cell must not reach: one idea a cell
WIDEST = 100  # characters of a printed line: beyond that, pages of HTML cut it off


def cells_of_notebook(name):
    nbformat = needs("nbformat", "notebooks")
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells


def code_of(name):
    return [cell for cell in cells_of_notebook(name) if cell.cell_type == "code"]


def texts(cell):
    """Yield the source of a cell and all text that it printed; pictures are no text."""
    yield cell.source
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        yield "".join(output.get("traceback", ()))
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/png"))


def test_there_are_notebooks():
    assert len(NAMES) == 8
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, len(NAMES) + 1)]


@pytest.mark.parametrize("name", NAMES)
def test_script_and_notebook_are_both_there(name):
    assert (FOLDER / f"{name}.py").is_file()
    assert (FOLDER / f"{name}.ipynb").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_what_the_script_makes(name):
    jupytext = needs("jupytext", "notebooks")
    made = [
        (cell.cell_type, cell.source.strip()) for cell in jupytext.read(FOLDER / f"{name}.py", fmt="py:light").cells
    ]
    kept = [(cell.cell_type, cell.source.strip()) for cell in cells_of_notebook(name)]
    assert kept == made, "python examples/notebooks/make.py makes it anew"


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short(name):
    long = [cell.source for cell in code_of(name) if len(cell.source.splitlines()) >= LONGEST]
    assert not long, long[0]


@pytest.mark.parametrize("name", NAMES)
def test_all_cells_were_run_in_order(name):
    cells = code_of(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        outputs = cell.outputs
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs), outputs


@pytest.mark.parametrize("name", NAMES)
def test_plots_are_kept(name):
    plotting = [cell for cell in code_of(name) if PLOTS.match(last_statement(cell.source))]
    assert plotting
    for cell in plotting:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


def last_statement(source):
    """Return the last line that begins a statement at the margin."""
    lines = [line for line in source.splitlines() if line and line[0] not in " \t)]}#"]
    return lines[-1] if lines else ""


@pytest.mark.parametrize("name", NAMES)
def test_printed_lines_fit_a_page(name):
    printed = [output.get("text", "") for cell in code_of(name) for output in cell.outputs]
    assert any(printed)
    assert [line for text in printed for line in text.splitlines() if len(line) > WIDEST] == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_machine(name):
    machine_words = [text for cell in cells_of_notebook(name) for text in texts(cell) if OF_A_MACHINE.search(text)]
    assert not machine_words
    assert not OF_A_MACHINE.search((FOLDER / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


def test_beginnings_and_ends():
    """A title and what one will have first; one install cell in all, but for extras; what to try next at the end."""
    install = code_of(NAMES[0])[0].source
    assert 'find_spec("pml_ext")' in install
    assert "pml-ext[examples]" in install
    for number, name in enumerate(NAMES, 1):
        cells = cells_of_notebook(name)
        assert cells[0].cell_type == "markdown"
        assert cells[0].source.startswith(f"# {number}. ")
        assert re.search(r"^At the end you will ", cells[0].source, re.MULTILINE)
        assert code_of(name)[0].source.replace(",pretrained]", "]") == install
        assert cells[-1].cell_type == "markdown"
        assert "## What to try next" in cells[-1].source


@pytest.mark.parametrize("name", NAMES)
def test_what_the_text_points_to_is_there(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    files = re.findall(r"`((?:docs|examples|benchmarks)/[\w/]+\.(?:md|py))`", text)
    assert any(file.startswith("docs/") for file in files)
    assert not [file for file in files if not (FOLDER.parents[1] / file).is_file()]
    siblings = re.findall(r"`(\d\d_\w+)`", text)
    assert siblings
    assert set(siblings) <= set(NAMES)


def test_machine_paths_are_found():
    for text in ("/tmp/x/y.png", "see /home/me/a", "'/opt/x/bin'", "C:\\Users\\me"):
        assert OF_A_MACHINE.search(text)
    for text in ("/ that of the first epoch", "docs/home/page.md", "notebooks.tmp/x", "a/opt/b", "image/png"):
        assert not OF_A_MACHINE.search(text)
