"""What the documentation shows is there and runs: code, commands, names, links and pictures."""

import argparse
import ast
import difflib
import doctest
import importlib.util
import inspect
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections import Counter
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import pml_ext
from pml_ext import losses
from pml_ext.commands import train
from pml_ext.commands.parser import make_parser
from tests.contract.cases import CASES
from tests.datasets.test_in_shop import make_in_shop
from tests.needs import needs

pytestmark = pytest.mark.documents

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in PATHS
    if DOCS / "upstream" not in path.parents  # pages of another project
}

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"bash", "diff", "markdown", "python", "text"}
SNIPPET = " { .python }"  # of a page, not run: the code is a file that has tests of its own
SNIPPET_LINE = "--8<-- "
NOT_RUN = re.compile(r"<!-- not run:(?P<reason>.*?)-->")
OURS = re.compile(r"(pml_ext|pytorch_metric_learning)(\.\w+)+")


class Block(NamedTuple):
    """A fenced block of a page; ``printed`` is a text block that follows directly, ``not_run`` a comment before it."""

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    printed: str | None


def blocks(page):
    """Yield the blocks of a page."""
    text = PAGES[page]
    fenced = list(FENCE.finditer(text))
    for block, after in zip_longest(fenced, fenced[1:]):
        before = re.search(NOT_RUN.pattern + r"\s*\Z", text[: block.start()])
        printed = None
        if after is not None and after["language"] == "text" and not text[block.end() : after.start()].strip():
            printed = textwrap.dedent(after["code"])
        line = text.count("\n", 0, block.start("code"))
        code = textwrap.dedent(block["code"])
        yield Block(page, line, block["language"], code, before["reason"].strip() if before else None, printed)


PROPOSALS = {  # a block of Markdown is a page by itself, which is pasted somewhere else
    f"{block.page}, line {block.line}": block.code
    for page in PAGES
    for block in blocks(page)
    if block.language == "markdown" and not block.code.startswith(SNIPPET_LINE)
}
PAGES |= PROPOSALS
BLOCKS = [block for page in PAGES for block in blocks(page)]


def without_code(text):
    """Return the text of a page, fenced blocks and inline code taken out."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


def test_no_block_escapes():
    """Each is read as a block, and its language is one that a test here, or the page itself, knows."""
    for page, text in PAGES.items():
        assert not re.findall(r"^[\s>]*(?:`{3}|~{3}).*", FENCE.sub("", text), re.MULTILINE), page
    for block in BLOCKS:
        if block.language == SNIPPET:
            assert block.page == "docs/contributing_back.md"
            (name,) = re.fullmatch(r'--8<-- "(docs/upstream/\S+)"\n', block.code).groups()
            assert (ROOT / name).is_file()
        else:
            assert block.language in LANGUAGES, f"{block.page}, line {block.line}"


# (a) Python


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """What the pages take for granted: folders of images, a data set, a run of ``pml-ext train``."""
    folder = tmp_path_factory.mktemp("sandbox")
    rng = np.random.default_rng(0)

    def draw(root, names):
        for name in names.split():
            (root / name).mkdir(parents=True)
            look = rng.integers(0, 200, (7, 7, 3)).repeat(4, 0).repeat(4, 1)
            for i in range(1, 7):
                pixels = (look + rng.integers(0, 56, look.shape)).astype(np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i}.jpg")

    draw(folder / "photos", "ant bear cat deer dog duck fish fox frog goat hare lynx mouse owl pig wolf")
    draw(folder / "data" / "flowers" / "train", "daisy rose")
    draw(folder / "data" / "flowers" / "test", "lily tulip")
    make_in_shop(folder / "data" / "in_shop")
    small = {"width": 4, "batch_size": 16}
    pictures = dict.fromkeys(("draw_curves", "draw_gallery", "write_run_report"), mock.DEFAULT)
    with mock.patch.multiple(train, **pictures):  # they take longer than the training, and no page looks at them
        train.main(folder / "photos", folder / "runs" / "photos", "mhgl", epochs=1, settings=small, device="cpu")
    return folder


@pytest.fixture
def checks_on():
    """A page may turn the input checks off."""
    yield
    pml_ext.set_validation(True)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_blocks_run(page, sandbox, tmp_path, monkeypatch, capsys, checks_on):
    """The blocks of a page, one after the other; they print what the text block behind them says (...: anything)."""
    monkeypatch.chdir(shutil.copytree(sandbox, tmp_path / "here"))
    scope = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python" or block.not_run is not None:
            continue
        capsys.readouterr()
        try:
            exec(compile("\n" * block.line + block.code, page, "exec"), scope)
        except ModuleNotFoundError as error:
            needs(error.name)  # skips where an extra brings it
            raise
        printed = capsys.readouterr().out
        if block.printed is not None:
            same = doctest.OutputChecker().check_output(block.printed, printed, doctest.ELLIPSIS)
            assert same, f"{page}, line {block.line}, prints:\n{printed}"


def test_what_is_not_run_has_a_reason():
    reasons = [(block.page, block.not_run) for block in BLOCKS if block.not_run is not None]
    assert all(len(reason.split()) >= 2 for _, reason in reasons), reasons
    comments = sum(len(re.findall("<!-- *not run", text)) for text in PAGES.values())
    assert comments == len(reasons) == sum(b.not_run is not None and b.language == "python" for b in BLOCKS)
    assert len(reasons) <= 6, reasons  # a GPU, several machines, a download


def resolve(dotted):
    """Return what a dotted name stands for; pkgutil.resolve_name prefers a module to a function of its name."""
    root, *names = dotted.split(".")
    value = import_module(root)
    for name in names:
        if not hasattr(value, name):
            import_module(f"{value.__name__}.{name}")
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "diff"], ids=lambda b: f"{b.page}:{b.line}")
def test_diffs_name_what_exists(block):
    added, removed = ([line[1:] for line in block.code.splitlines() if line.startswith(sign)] for sign in ("+", "-"))
    assert added
    assert len(added) + len(removed) == len(block.code.splitlines())
    for code in ("\n".join(added), "\n".join(removed)):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    getattr(import_module(node.module), name.name)
            elif isinstance(node, ast.Attribute) and OURS.fullmatch(ast.unparse(node)):
                resolve(ast.unparse(node))
            elif isinstance(node, ast.Call) and OURS.fullmatch(ast.unparse(node.func)):
                called = inspect.signature(resolve(ast.unparse(node.func)))
                called.bind(*node.args, **{keyword.arg: keyword for keyword in node.keywords})


# (b) commands


def commands():
    """Return the commands of bash blocks and of inline code, each as (page, words)."""
    lines = [
        (b.page, line) for b in BLOCKS if b.language == "bash" for line in b.code.replace("\\\n", " ").splitlines()
    ]
    for page, text in PAGES.items():
        inline = re.findall(r"`((?:python|torchrun|pip|pml-ext) [^`]+)`", FENCE.sub("", text))
        lines += [(page, line.replace("\n", " ")) for line in inline]
    split = [(page, shlex.split(part, comments=True)) for page, line in lines for part in line.split("&&")]
    return [(page, words) for page, words in split if words]


def script_of(words):
    """Return path and arguments of the script that a command runs, or module and arguments, or None."""
    if words[0] == "python" and "-m" in words:
        place = words.index("-m") + 1
        return words[place], words[place + 1 :]
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return None if words[0] not in ("python", "torchrun") or place is None else (words[place], words[place + 1 :])


SCRIPTS = sorted({(name, *rest) for _, words in commands() for name, rest in filter(None, [script_of(words)])})


class ParsedError(BaseException):
    """The script's parser has taken the arguments; no ``except Exception`` of a script may stop it."""


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_commands_are_accepted(words, monkeypatch, capsys):
    """Each script exists, and its own parser takes the arguments that the page gives it."""
    name, *arguments = words
    if name.endswith(".py"):
        path = ROOT / name
    else:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"no module {name}"
        path = Path(spec.origin)
    assert path.is_file()
    source = path.read_text(encoding="utf-8")
    if path.parent not in (ROOT / "examples", ROOT / "benchmarks"):  # what may work long before it parses
        assert all(f'"{word}"' in source for word in arguments if word.startswith("-")) or ROOT not in path.parents
        return
    if "add_argument" not in source:
        assert not arguments
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        self.allow_abbrev = False
        parse(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ParsedError:
        return
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    pytest.fail(f"{name} has no parser")


PML_EXT = sorted({tuple(words[1:]) for _, words in commands() if words[0] == "pml-ext"})


@pytest.mark.parametrize("words", PML_EXT, ids=" ".join)
def test_commands_of_the_package_are_accepted(words, capsys):
    """A command that is only named has its name checked."""
    command = make_parser(words[0])
    command.allow_abbrev = False
    if len(words) > 1:
        try:
            command.parse_args(words[1:])
        except SystemExit:
            pytest.fail(capsys.readouterr().err)


def declared_extras():
    """Return the extras of pyproject.toml (Python 3.10 has no tomllib)."""
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^([\w-]+) = \[", section.split("\n[")[0], re.MULTILINE))


def test_pip_extras_exist():
    named = [word for _, words in commands() if words[0] == "pip" for word in words]
    extras = {extra for word in named for listed in re.findall(r"\[(.*)\]", word) for extra in listed.split(",")}
    assert {"examples", "test", "dev"} <= extras
    assert extras <= declared_extras()


def test_the_install_page_lists_all_extras():
    listed = re.findall(r"^\| `pml-ext\[([\w-]+)\]` \|", PAGES["docs/install.md"], re.MULTILINE)
    assert sorted(listed) == sorted(declared_extras())


# (c) the public interface


def public_names():
    """Return the full names of all that users may rely on."""
    names = {"pml_ext.set_validation"}
    for info in pkgutil.iter_modules(pml_ext.__path__):
        module = import_module(f"pml_ext.{info.name}")
        offered = getattr(module, "__all__", ())
        assert offered or info.name not in pml_ext.__all__, f"{info.name} has no __all__"
        names |= {f"{module.__name__}.{name}" for name in offered}
    return names


def test_every_public_name_has_one_entry():
    entries = Counter(entry for text in PAGES.values() for entry in re.findall(r"^::: (\S+)", text, re.MULTILINE))
    assert set(entries) == public_names()
    assert set(entries.values()) == {1}, entries.most_common(3)


def test_the_api_page_lists_every_public_name_once():
    lines = [line for line in PAGES["docs/api.md"].splitlines() if line.startswith(("-", "*"))]
    entries = [re.fullmatch(r"- \[`(\w+)`\]\([\w/.]*#([\w.]+)\): \S.*\.", line) for line in lines]
    assert all(entries), lines[entries.index(None)]
    assert all(target.endswith(f".{shown}") for shown, target in (entry.groups() for entry in entries))
    assert Counter(entry[2] for entry in entries) == Counter(public_names())


@pytest.fixture(scope="module")
def write_api():
    """The script docs/write_api.py as a module."""
    spec = importlib.util.spec_from_file_location("write_api", DOCS / "write_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["api.md", "losses.md"])
def test_what_is_generated_is_up_to_date(name, write_api):
    differs = difflib.unified_diff(PAGES[f"docs/{name}"].splitlines(), write_api.RENDERERS[name]().splitlines(), n=0)
    assert not list(differs), "run: python docs/write_api.py"


def test_a_name_without_page_is_described_on_the_api_page(write_api, monkeypatch):
    assert "\n::: pml_ext.losses.HybridLoss\n" not in write_api.render_api()
    pages = write_api.described_on()
    del pages["pml_ext.losses.HybridLoss"]
    monkeypatch.setattr(write_api, "described_on", lambda: pages)
    assert "- [`HybridLoss`](#pml_ext.losses.HybridLoss): " in write_api.render_api()
    assert "\n::: pml_ext.losses.HybridLoss\n" in write_api.render_api()
    assert "| [`HybridLoss`](api.md#pml_ext.losses.HybridLoss) |" in write_api.render_losses()


def test_a_public_name_needs_a_docstring(write_api, monkeypatch):
    monkeypatch.setattr(losses.HybridLoss, "__doc__", None)
    with pytest.raises(ValueError, match=r"pml_ext\.losses\.HybridLoss must have a docstring, got none"):
        write_api.render_losses()


def test_the_table_of_losses_says_which_have_parameters():
    rows = re.findall(r"^\| \[`(\w+)`\].* \| ([\w ]+) \|$", PAGES["docs/losses.md"], re.MULTILINE)
    assert [name for name, _ in rows] == losses.__all__
    said = dict(rows)
    for name, case in CASES.items():
        if said.get(name) in ("yes", "no"):
            assert (said[name] == "yes") == any(p.requires_grad for p in case.make().parameters()), name
    assert {"yes", "no", "as its loss"} == set(said.values())


# (d) proposals to PML


def rows_of(text):
    """Return the rows of the tables in a text that hold a figure, spaces between cells aside."""
    lines = [re.sub(r" *\| *", "|", line) for line in text.splitlines() if line.startswith("|")]
    return {line for line in lines if re.search(r"\d", line)}


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_proposals_are_complete(proposal):
    """Each has all parts, one block that runs and prints, and measurements that other pages show."""
    text = PROPOSALS[proposal]
    titles = re.findall(r"^(#+) (.*)", FENCE.sub("", text), re.MULTILINE)
    assert [level for level, _ in titles] == ["#", "##", "##", "##", "##", "##"]
    assert [title for _, title in titles[1:]] == ["Problem", "Interface", "Formula", "Measurements", "Size"]
    assert [block.printed is not None for block in blocks(proposal) if block.language == "python"] == [True]
    elsewhere = set().union(*(rows_of(PAGES[page]) for page in PAGES if "contributing_back" not in page))
    assert rows_of(text) <= elsewhere
    assert rows_of(text) or "\nNone: " in text


def test_every_numbered_section_is_a_proposal():
    numbers = re.findall(r"^## (\d+)\. ", FENCE.sub("", PAGES["docs/contributing_back.md"]), re.MULTILINE)
    assert [int(number) for number in numbers] == list(range(1, len(PROPOSALS) + 1)) != []


# (e) links and pictures


def links(page):
    """Return the files that a page links to, pictures included."""
    text = without_code(PAGES[page])
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text) + re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)
    return {((ROOT / page).parent / target).resolve() for target in targets if "://" not in target}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    assert sorted(str(path) for path in links(page) if not path.exists()) == []


def test_every_picture_is_described_in_words():
    described = [alt for text in PAGES.values() for alt in re.findall(r"!\[([^\]]*)\]", without_code(text))]
    assert len(described) > 5
    assert all(len(alt.split()) >= 3 for alt in described), described


def test_every_picture_is_shown():
    pictures = {path for path in DOCS.rglob("*") if path.suffix in (".png", ".jpg", ".svg", ".gif", ".webp")}
    assert len(pictures) > 5
    assert pictures <= {path for page in PAGES for path in links(page)}


# (f) what people look for


MESSAGES = re.findall(
    r"^\| (?:the same, |)(`.+?`)(?: and (`.+?`))?[^|`]*\|", PAGES["docs/troubleshooting.md"], re.MULTILINE
)


@pytest.fixture(scope="module")
def strings():
    """All that strings of the package say, each on a line."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in Path(pml_ext.__path__[0]).rglob("*.py"))
    values = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(value for value in values if isinstance(value, str))


@pytest.mark.parametrize("message", [text.strip("`") for pair in MESSAGES for text in pair if text])
def test_troubleshooting_quotes_messages_that_are_raised(message, strings):
    if message != "AssertionError":  # PML's
        parts = [part.strip(" ,") for part in message.split("...")]
        printed = "\n".join(block.printed or "" for block in blocks("docs/troubleshooting.md"))
        assert any(parts)
        assert all(part in strings for part in parts) or all(part in printed for part in parts)


WORDS = {
    "tensorboard": "logging",
    "weights & biases": "logging",
    "wandb": "logging",
    "dinov2": "pretrained",
    "clip": "pretrained",
    "vit": "pretrained",
    "lora": "pretrained",
    "freeze": "pretrained",
    "onnx": "deploy",
    "export": "deploy",
    "faiss": "deploy",
    "serve": "deploy",
    "csv": "datasets",
    "exif": "datasets",
    "query and gallery|queries and a gallery": "datasets",
    "own photographs": "own_photographs",
    "hyperparameter": "training_loops",
    "early stopping": "training_loops",
    "lightning": "training_loops",
    "accelerate": "training_loops",
    "resume": "recipes",
    "out of memory": "troubleshooting",
    "nan": "troubleshooting",
    "collapse": "troubleshooting",
    "stands still": "troubleshooting",
    "multi-label": "multi_label",
    "gpus": "distributed",
    "large batches": "large_batches",
    "million classes": "streaming",
    "million embeddings": "evaluation",
    "which loss": "which_loss",
}


@pytest.mark.parametrize(("words", "page"), WORDS.items(), ids=WORDS)
def test_a_search_finds_the_page_by_its_headings(words, page):
    """The site's search weighs headings most, and people type these words."""
    headings = re.findall("^#+ (.*)", FENCE.sub("", PAGES[f"docs/{page}.md"]), re.MULTILINE)
    assert any(re.search(rf"\b({words})", heading, re.IGNORECASE) for heading in headings), headings


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and page not in PROPOSALS}
    assert sorted(listed) == sorted(pages)
