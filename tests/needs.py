"""Packages that single tests need, and that come with an extra."""

import importlib
import re
from pathlib import Path

import pytest

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def declared_extras():
    """Return the extras of pyproject.toml with what each lists (Python 3.10 has no tomllib)."""
    section = PYPROJECT.read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    return dict(re.findall(r"^([\w-]+) = (\[.*?\])$", section, re.MULTILINE | re.DOTALL))


def needs(module, extra="test-all"):
    """Return a module; without it, skip the test and name the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_missing = f"{module}.".startswith(f"{error.name}.")  # and not something that it imports
        if extra not in declared_extras() or not is_missing:
            raise
        pytest.skip(f"needs {module.partition('.')[0]}: pip install 'pml-ext[{extra}]'")
