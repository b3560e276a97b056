"""Fixtures and rules for all tests."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; what they start inherits it
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import random
import re

import numpy as np
import pytest
import torch
from hypothesis import settings

import pml_ext

KINDS = ("browser", "compiles", "documents", "processes", "trains")
SKIPS = {  # the reasons that a test may be skipped for
    "an extra": r"needs \S+: pip install 'pml-ext\[[\w-]+\]'",
    "the machine": "no CUDA|no fork|no C\\+\\+ compiler|no chromium|reads /proc|counts threads as Linux shows them",
    "old versions": "its exporter fails with a recent protobuf|the fake tensors of this torch need a CUDA driver: .*",
}
STRICT = "PML_EXT_STRICT_SKIPS"  # set: a skip for a missing extra, or for a reason that is not above, is a failure


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items):
    for item in items:
        if any(item.get_closest_marker(kind) for kind in KINDS):
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:  # or one would go on with a slow test when nothing is left for the other
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def refuse_skip(report):
    """Turn a skip into a failure where all extras must be there."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(STRICT):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.fullmatch(SKIPS[kind], reason, re.DOTALL) for kind in ("the machine", "old versions")):
            report.outcome = "failed"
            report.longrepr = f"skipped, and {STRICT} is set: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return refuse_skip((yield))


settings.register_profile("same each time", deadline=None, derandomize=True, database=None)
settings.load_profile("same each time")


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def without_validation():
    pml_ext.set_validation(False)
    yield
    pml_ext.set_validation(True)


@pytest.fixture(autouse=True)
def threads():
    """Give back the number of threads that a test or what it runs has set: those behind it would share the cores."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    """Draw the same each time; PML's samplers draw from NumPy."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace for each device
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
