"""docs/compatibility.md, made by running the battery; run: python -m tests.contract.page --write."""

import argparse
import re
from pathlib import Path

import pytorch_metric_learning
import torch

from tests.contract.battery import PROPERTIES, outcome
from tests.contract.cases import CASES, WRAPPED

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
ROWS = CASES | WRAPPED
COMMAND = "python -m tests.contract.page --write"
VERSIONS = f"torch {'.'.join(torch.__version__.split('.')[:2])} and PML {pytorch_metric_learning.__version__}"
HEAD = """\
# Compatibility

Which loss works with which part of pytorch-metric-learning (PML) and PyTorch? Each cell is the result of a check that
runs the combination. The list below a table says what its checks do. Numbers point to the reasons at the end; text
`in this font` is the message of an error that is raised. "Our" classes are those of this package.

This page was written with {versions} by `{command}`.
`tests/contract/test_battery.py` compares each cell with its check. The distributed wrappers run here in one process.
`tests/distributed` and `tests/contract/test_distributed.py` run them in several, also with `efficient=True`.
"""


def tables():
    """Return the columns of each table."""
    columns = {}
    for name, declared in PROPERTIES.items():
        if declared.table is not None:
            columns.setdefault(declared.table, []).append(name)
    return columns


def render(cells, versions=VERSIONS):
    """Return the page of a reason, or None for "yes", for each row and column."""
    parts, reasons = [HEAD.format(versions=versions, command=COMMAND)], {}
    for title, columns in tables().items():
        lines = [["", *(name if " " in name else f"`{name}`" for name in columns)], ["---"] * (len(columns) + 1)]
        for row in ROWS:
            numbers = [cells[row, name] and reasons.setdefault(cells[row, name], len(reasons) + 1) for name in columns]
            lines.append([row, *("yes" if number is None else f"no ({number})" for number in numbers)])
        parts.append(f"## {title}\n")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        explained = {}
        for name in columns:
            explained.setdefault(" ".join(PROPERTIES[name].explanation.split()), []).append(name)
        parts.append("\n".join(f"- {', '.join(names)}: {text}" for text, names in explained.items()) + "\n")
    parts.append("## Reasons\n")
    parts.append("\n".join(f"{number}. {reason}" for reason, number in reasons.items()) + "\n")
    return "\n".join(parts)


def parse(page):
    """Return the reasons, or None for "yes", that a page has for each row and column, and its versions."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", page, re.MULTILINE))
    cells, names = {}, []
    for line in re.findall(r"^\| (.*) \|$", page, re.MULTILINE):
        row, *entries = line.split(" | ")
        if not row.strip():
            names = [name.strip("`") for name in entries]
        elif row != "---":
            told = [None if entry == "yes" else reasons[entry[len("no (") : -1]] for entry in entries]
            cells.update({(row, name): reason for name, reason in zip(names, told, strict=True)})
    return cells, re.search(r"written with (.+) by ", page)[1]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    columns = [name for names in tables().values() for name in names]
    page = render({(row, name): outcome(name, case) for row, case in ROWS.items() for name in columns})
    if parser.parse_args(args).write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
