"""README.md, the first page of the site and the package index say the same, in figures that other pages show."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

import pml_ext

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SECTIONS = re.findall(r"<!-- --8<-- \[start:(\w+)\] -->\n(.*?)<!-- --8<-- \[end:\1\] -->", README, re.DOTALL)
GAINS = re.findall(r"^(?:\| (?!measured|---)|Better ).*(?:\n(?!\n|\|).*)*", dict(SECTIONS)["front"], re.MULTILINE)


def definitions(text):
    """Return name -> target of the links that a page defines at its end."""
    return dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.MULTILINE))


def used(text):
    return set(re.findall(r"\]\[(\w+)\]", text))


def test_one_description():
    (description,) = re.findall(r'^description = "(.*)"$', PYPROJECT, re.MULTILINE)
    (site,) = re.findall(r"^site_description: (.*)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    sentence = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", dict(SECTIONS)["front"].partition(" (PML).")[0])
    assert description == site == " ".join(sentence.split())
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["title"]
    assert cited.lower() == f"pml-ext: {description}".lower()


def test_the_site_shows_the_version():
    assert f"\ncopyright: pml-ext {pml_ext.__version__}, " in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_the_home_page_shows_the_sections_of_the_readme():
    assert re.findall(r'^--8<-- "README\.md:(\w+)"$', HOME, re.MULTILINE) == [name for name, _ in SECTIONS]
    shown = set().union(*(used(text) for _, text in SECTIONS))
    assert set(definitions(HOME)) == shown
    assert set(definitions(README)) == used(README) >= shown
    for name, target in definitions(HOME).items():
        assert definitions(README)[name] == f"docs/{target}"


def test_sections_link_by_name_alone():
    """A path from the README's folder would lead nowhere on the site."""
    for name, text in SECTIONS:
        assert not re.findall(r"\]\((?!https://)", text), name


def test_the_package_index_shows_no_link_that_it_cannot_follow():
    text = runpy.run_path(str(ROOT / "setup.py"))["without_local_links"](README)
    assert "## What you get" in text and "pip install pml-ext" in text and "## Citation" in text
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", text))
    assert not re.search(r"\]\[|^\[\w+\]:|!\[|<!--", text, re.MULTILINE)
    assert '"readme"' in re.search(r"^dynamic = .*", PYPROJECT, re.MULTILINE)[0]
    assert not re.search("^readme =", PYPROJECT, re.MULTILINE)


def test_the_gains_are_found():
    assert len(GAINS) == 7


@pytest.mark.parametrize("text", GAINS, ids=lambda text: text.split("(")[0].strip("| "))
def test_figures_are_those_of_the_page_that_is_named(text):
    """Each number of a gain stands on one of its pages, sizes of batches with them."""
    figures = re.findall(r"(?<![\w-])\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-\d+)?(?![\w-])", re.sub(r"`[^`]*`", "", text))
    names = used(text)
    pages = "\n".join((ROOT / definitions(README)[name]).read_text(encoding="utf-8") for name in names)
    assert names and figures
    assert [figure for figure in figures if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|,\d)", pages)] == []
