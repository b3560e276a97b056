"""DivergenceLoss as a contribution to pytorch-metric-learning: the files of docs/upstream, as they would lie there."""

import importlib.util
import os
import re
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
MISTAKES = {  # what is right, and what its tests must notice
    "diagonal=1)": "diagonal=0)",
    "- 2 + 2 * cosines": "- 2 + cosines",
    "torch.where(norms > 0, inverse, torch.zeros_like(norms))": "inverse",
    "c_f.indices_tuple_not_supported(indices_tuple)": "pass",
    "max(num_compared, 1)": "num_compared",
}
RUN_TESTS = f"""\
import importlib.util, os, sys, unittest
from pytorch_metric_learning import losses
for path in sys.argv[1:]:
    child = os.fork()  # importing PML for each would take seconds
    if child:
        os.waitpid(child, 0)
        continue
    os.dup2(os.open(path + ".txt", os.O_WRONLY | os.O_CREAT), 2)
    spec = importlib.util.spec_from_file_location({NAME!r}, path)
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


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What unittest prints of the contribution as it is, under None, and with each mistake."""
    folder, text, paths = tmp_path_factory.mktemp("upstream"), SOURCE.read_text(encoding="utf-8"), {}
    for number, (right, wrong) in enumerate([(None, None), *MISTAKES.items()]):
        assert right is None or right in text
        paths[right] = folder / f"{number}.py"
        paths[right].write_text(text if right is None else text.replace(right, wrong), encoding="utf-8")
    env = os.environ | {"TEST_DEVICE": "cpu", "TEST_DTYPES": "float16,float32,float64", "PYTHONPATH": ""}
    command = [sys.executable, "-B", "-c", RUN_TESTS, *map(str, paths.values())]
    done = subprocess.run(command, cwd=UPSTREAM, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {right: Path(f"{path}.txt").read_text(encoding="utf-8") for right, path in paths.items()}


@pytest.mark.xdist_group("upstream")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_its_tests_pass(reports):
    assert re.search(r"Ran 8 tests in .*\n\nOK\n$", reports[None]), reports[None]


@pytest.mark.xdist_group("upstream")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("right", MISTAKES)
def test_its_tests_notice_a_mistake(right, reports):
    assert re.search(r"Ran 8 tests in .*\n\nFAILED \(", reports[right]), reports[right]


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
