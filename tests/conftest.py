"""Fixtures for all tests."""

import random

import numpy as np
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
    """Draw the same each time; PML's samplers draw from NumPy."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
