"""Words and phrases that pages, docstrings and messages do without; American spelling."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IZE = "normal|initial|recogn|synchron|general|optim|minim|maxim|organ|summa[r]|visual|serial|random"
INSTEAD = {  # a pattern of what is avoided, and what to write
    r"neighbour": "neighbor",
    r"\b(un)?colour": "color",
    r"\bgrey\b": "gray",
    rf"({IZE})is(e|ed|es|ing|ation)\b": "-ize",
    r"\b(re)?labelled\b": "labeled",
    r"\bcentre[ds]?\b": "center",
    r"\blearnt\b": "learned",
    r"\bbehaviour": "behavior",
    r"\blicence\b": "license",
    r"\b(inside|outside) of the\b": "inside the",
    r"\b(is|are) no (integers?|numbers?|strings?|tensors?|modules?)\b": "is not an integer",
    r"\bhas not\b(?! \w+ed\b| (been|seen|read|got))": "does not have",
    r"\bbelongs? into\b": "belongs in",
    r"\bnear embeddings\b": "embeds close together",
    r"\bexceeds? the spread\b": "gain beyond seed variation",
    r"\bwhat .{1,20} is worth\b": "results",
    r"^\s*\w+: Likewise\b": "write it out",
    r"^\s*\w+: Of (the|a)\b": "name the thing itself",
}
NOT_READ = {  # the measured rows and their pages have names of their own
    "docs/retrieval.md",
    "docs/which_loss.md",
    "tests/test_prose.py",
}
PATHS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "pml_ext").rglob("*.py"),
    *(ROOT / "examples").glob("*.py"),
]
PAGES = sorted(path for path in PATHS if path.relative_to(ROOT).as_posix() not in NOT_READ)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose(path):
    text = path.read_text(encoding="utf-8")
    found = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()!r}, write: {instead}"
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(pattern, text, re.IGNORECASE | re.MULTILINE)
    ]
    assert found == []
