"""Finished runs: a file of JSON lines for each data set and kind, ``DATA-KIND.jsonl``, with a line for each run."""

import fcntl
import json
import sys
from pathlib import Path

from pml_ext.strict_json import strict_json


def path_of(out, data, kind):
    return Path(out) / f"{data}-{kind}.jsonl"


def paths_of(out, kind):
    """Return data set -> file, for all that have runs of this kind."""
    end = f"-{kind}.jsonl"
    return {path.name.removesuffix(end): path for path in sorted(Path(out).glob("*" + end))}


def read(path):
    """Return the runs of a file, in its order. A last line that is cut off is named on stderr and left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # nobody is in the middle of a line
        content = file.read()
    size = whole_lines(content)
    if size < len(content):
        print(f"{path}: the last line is cut off and counts as not run: {content[size:][:80]!r}", file=sys.stderr)
    runs = []
    for number, line in enumerate(content[:size].splitlines(), 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            raise SystemExit(f"{path}, line {number} must be a run as JSON, got {line[:80]!r}") from None
    return runs


def append(path, run):
    """Write a run behind all whole lines, in one go; several processes may do so at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        content = file.read()
        size = whole_lines(content)
        file.truncate(size)
        file.write(b"\n" * (content[:size] != b"" and content[:size][-1:] != b"\n") + strict_json(run).encode() + b"\n")


def whole_lines(content):
    """Return the number of bytes up to the end of the last run that is whole, with or without its line break."""
    size = content.rfind(b"\n") + 1
    try:
        json.loads(content[size:])  # a run begins with { and ends with }: what is cut off is no JSON
    except ValueError:
        return size
    return len(content)


def find(runs, **wanted):
    """Return the first run with these values, or None."""
    return next((run for run in runs if all(run.get(name) == value for name, value in wanted.items())), None)
