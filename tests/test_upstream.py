"""DivergenceLoss as a contribution to pytorch-metric-learning: the files of docs/upstream, as they would lie there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_metric_learning import reducers

from pml_ext.losses import DivergenceLoss
from tests.needs import needs

pytestmark = pytest.mark.processes

UPSTREAM = Path(__file__).parents[1] / "docs" / "upstream"
NAME = "pytorch_metric_learning.losses.divergence_loss"
SOURCE = UPSTREAM / "src" / f"{NAME.replace('.', '/')}.py"
RUN_TESTS = f"""\
import importlib.util, sys, unittest
from pytorch_metric_learning import losses
spec = importlib.util.spec_from_file_location({NAME!r}, sys.argv.pop())
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
losses.DivergenceLoss = module.DivergenceLoss  # what losses/__init__.py would export
unittest.main("tests.losses.test_divergence_loss", argv=["unittest"])
"""
# The rules of PML's .flake8.
FLAKE8 = ("--isolated", "--extend-ignore=E266,E203,E402,E501,E741,E265", "--per-file-ignores=__init__.py:F401")


@pytest.fixture(scope="module")
def upstream():
    """The class of the contribution, imported as if its file lay beside PML's losses."""
    spec = importlib.util.spec_from_file_location(NAME, SOURCE)
    module = importlib.util.module_from_spec(spec)  # not put into sys.modules: PML stays as it is
    spec.loader.exec_module(module)
    return module.DivergenceLoss


def run_unittest(source):
    env = os.environ | {"TEST_DEVICE": "cpu", "TEST_DTYPES": "float16,float32,float64", "PYTHONPATH": ""}
    command = [sys.executable, "-B", "-c", RUN_TESTS, str(source)]
    return subprocess.run(command, cwd=UPSTREAM, env=env, capture_output=True, text=True, check=False)


def test_its_tests_pass():
    run = run_unittest(SOURCE)
    assert run.returncode == 0, run.stderr
    assert "Ran 8 tests" in run.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("diagonal=1)", "diagonal=0)"),
        ("- 2 + 2 * cosines", "- 2 + cosines"),
        ("torch.where(norms > 0, inverse, torch.zeros_like(norms))", "inverse"),
        ("c_f.indices_tuple_not_supported(indices_tuple)", "pass"),
        ("max(num_compared, 1)", "num_compared"),
    ],
)
def test_its_tests_notice_a_mistake(right, wrong, tmp_path):
    text = SOURCE.read_text()
    assert right in text
    broken = tmp_path / "divergence_loss.py"
    broken.write_text(text.replace(right, wrong))
    assert "FAILED" in run_unittest(broken).stderr


@pytest.mark.parametrize("reducer", [None, reducers.SumReducer(), reducers.ThresholdReducer(low=0.5)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_ours(upstream, reducer, dtype, tol):
    generator = torch.Generator().manual_seed(0)
    values, grads = [], []
    start = torch.randn(16, 12, generator=generator, dtype=dtype)
    start[0, :3] = 0
    for make in (upstream, DivergenceLoss):
        emb = start.clone().requires_grad_()
        loss_func = make(4, 1.5, reducer=reducer, collect_stats=True)
        loss = loss_func(emb, torch.arange(16))
        values += [torch.stack([loss.detach(), torch.tensor(loss_func.learner_similarity, dtype=dtype)])]
        grads += torch.autograd.grad(loss, emb)
    assert values[0].all()
    assert grads[0].any()
    torch.testing.assert_close(values[0], values[1], rtol=max(tol, 1e-6), atol=max(tol, 1e-6))
    torch.testing.assert_close(grads[0], grads[1], rtol=tol, atol=tol)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("black", ("--check", "--quiet")),
        ("isort", ("--profile", "black", "--project", "pytorch_metric_learning", "--check-only")),
        ("flake8", FLAKE8),
    ],
)
def test_style_is_that_of_pml(tool, arguments):
    needs(tool, "dev")
    checked = subprocess.run(
        [sys.executable, "-m", tool, *arguments, "src", "tests"],
        cwd=UPSTREAM,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
