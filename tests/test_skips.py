"""A test is skipped for a known reason only: the machine, an old version, or a package that an extra brings."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import STRICT, refuse_skip
from tests.needs import declared_extras, needs

NO_EXTRA = "needs onnx: pip install 'pml-ext[test-all]'"
FILES = [path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__)]
BROUGHT_BY = {"nbformat": "nbclient"}  # the package that the extra names


@pytest.mark.parametrize(
    ("reason", "strict", "outcome"),
    [
        ("no CUDA", True, "skipped"),
        ("no C++ compiler", True, "skipped"),
        (NO_EXTRA, True, "failed"),
        ("could not import 'onnx': No module named 'onnx'", True, "failed"),
        ("no time", True, "failed"),
        (NO_EXTRA, False, "skipped"),
    ],
)
def test_skips_are_refused_where_all_extras_must_be_there(reason, strict, outcome, monkeypatch):
    monkeypatch.setenv(STRICT, "1" if strict else "")
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, f"Skipped: {reason}"))
    assert refuse_skip(report).outcome == outcome
    assert outcome == "skipped" or reason in report.longrepr


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(pytest.skip.Exception) as skipped:
        needs("no_such_package.part")
    assert str(skipped.value) == "needs no_such_package: pip install 'pml-ext[test-all]'"
    with pytest.raises(ModuleNotFoundError):
        needs("no_such_package", "no-such-extra")
    assert needs("pytest") is pytest


def test_a_package_that_lacks_another_is_not_missing(tmp_path, monkeypatch):
    (tmp_path / "lacking_package.py").write_text("import lacking")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'lacking'"):
        needs("lacking_package")


def brings(extra):
    """Return the packages of an extra and of those that it names."""
    inside = re.findall(r"pml-ext\[([\w,-]+)\]", declared_extras()[extra])
    own = re.findall(r'"([\w-]+)(?:\[[\w,-]+\])?[><="]', declared_extras()[extra])
    return {*own, *(name for listed in inside for one in listed.split(",") for name in brings(one))}


def test_extras_bring_what_tests_say_they_need():
    calls = [call for path in FILES for call in re.findall(r'needs\("([\w.]+)"(?:, "([\w-]+)")?\)', path.read_text())]
    assert len(calls) >= 6
    for module, extra in calls:
        root = module.partition(".")[0]
        assert BROUGHT_BY.get(root, root.replace("_", "-")) in brings(extra or "test-all"), (module, extra)
    assert not {"onnx", "playwright", "lightning-fabric", "sentence-transformers"} & brings("test")


def test_no_other_way_to_skip_for_a_package():
    assert not [path.name for path in FILES if "importorskip" in path.read_text()]
