"""What .ci/try_newest_pml prints of a PML that lacks something."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_metric_learning

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "try_newest_pml"
LACKING = """\
__path__.append({!r})
__version__ = "9.9"
from . import losses
del losses.SelfSupervisedLoss
"""


@pytest.mark.parametrize("status", [0, 1])
def test_the_supported_version_breaks_nothing(status, tmp_path, monkeypatch, capfd):
    """In this process, which has imported most of what the script imports; failing tests are named."""
    path = tmp_path / "test_it.py"
    path.write_text(f"def test_it():\n    assert {status} == 0\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with warnings.catch_warnings():
        assert runpy.run_path(str(SCRIPT))["main"]([str(path)]) == status
    printed = capfd.readouterr().out
    assert "names: 0 of " in printed and "modules: 0 of " in printed
    assert ("test_it.py::test_it" in printed) == bool(status)
    assert printed.endswith(f"tests: exit status {status}\n")


def test_what_a_pml_lacks_is_printed_with_its_users(tmp_path):
    """One that has all but one loss."""
    package = tmp_path / "pytorch_metric_learning"
    package.mkdir()
    (real,) = pytorch_metric_learning.__path__
    (package / "__init__.py").write_text(LACKING.format(real), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, str(SCRIPT), "--no-tests"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    names, modules = done.stdout.split("=== modules that cannot be imported\n")
    _, _, users = names.partition("pytorch_metric_learning.losses.SelfSupervisedLoss\n")
    assert "pml_ext/pml_internals.py" in users.splitlines()[1]
    assert "pytorch_metric_learning.losses.CrossBatchMemory" not in names
    assert "has no attribute 'SelfSupervisedLoss'\n    " in modules and "pml_ext.losses.self_supervised_loss" in modules
    assert "names: 1 of " in modules
