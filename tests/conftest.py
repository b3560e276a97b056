"""Fixtures for all tests."""

import pytest
import torch

import pml_ext


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def without_validation():
    pml_ext.set_validation(False)
    yield
    pml_ext.set_validation(True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
