"""What .ci/try_newest_pml prints of a PML that lacks something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_metric_learning

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
LACKING = """\
__path__.append({!r})
__version__ = "9.9"
from . import losses
del losses.SelfSupervisedLoss
"""


def try_pml(*options, path=()):
    """Return exit status and output of the script, with folders that Python searches first."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)])}
    command = [sys.executable, str(ROOT / ".ci" / "try_newest_pml"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def test_the_supported_version_breaks_nothing():
    status, printed = try_pml("tests/losses/test_divergence_loss.py", "--collect-only")
    assert status == 0, printed
    assert "names: 0 of " in printed and "modules: 0 of " in printed
    assert printed.endswith("tests: exit status 0\n")


def test_failing_tests_are_named(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_wrong():\n    assert 1 == 2\n", encoding="utf-8")
    status, printed = try_pml(str(tmp_path / "test_it.py"))
    assert status == 1
    assert "test_it.py::test_wrong" in printed and printed.endswith("tests: exit status 1\n")


@pytest.fixture
def lacking(tmp_path):
    """Return a folder with a PML that has all but one loss."""
    package = tmp_path / "pytorch_metric_learning"
    package.mkdir()
    (real,) = pytorch_metric_learning.__path__
    (package / "__init__.py").write_text(LACKING.format(real), encoding="utf-8")
    return tmp_path


def test_a_missing_name_is_printed_with_its_users(lacking):
    status, printed = try_pml("--no-tests", path=[lacking])
    assert status == 1
    names, modules = printed.split("=== modules that cannot be imported\n")
    _, _, users = names.partition("pytorch_metric_learning.losses.SelfSupervisedLoss\n")
    assert "pml_ext/losses/self_supervised_loss.py" in users.splitlines()[1]
    assert "pytorch_metric_learning.losses.CrossBatchMemory" not in names
    assert "has no attribute 'SelfSupervisedLoss'\n    " in modules and "pml_ext.losses.self_supervised_loss" in modules
    assert "names: 1 of " in modules
