import math

import numpy as np
import pytest
import torch

from pml_ext.losses.log_sum_exp import log1p_sum_exp

MAT = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
KEEP = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
KEEP[1], KEEP[:, 2] = False, False  # nothing is kept there


def reference(mat, keep):
    """Loops over rows, without torch."""
    return [
        math.log(1 + sum(math.exp(x) for x, k in zip(row, kept, strict=True) if k))
        for row, kept in zip(mat, keep, strict=True)
    ]


@pytest.mark.parametrize("dim", [0, 1])
def test_matches_reference(dim, device):
    mat, keep = (MAT, KEEP) if dim == 1 else (MAT.T, KEEP.T)
    expected = reference(mat.numpy(), keep.numpy())
    np.testing.assert_allclose(log1p_sum_exp(MAT.to(device), KEEP.to(device), dim).cpu(), expected, rtol=1e-12)


def test_is_safe_from_overflow():
    value = log1p_sum_exp(torch.tensor([[1000.0, -1000.0], [-1000.0, -1000.0]]), torch.tensor([[True, True]] * 2), 1)
    assert value.tolist() == [1000, 0]


def test_gradcheck_twice():
    def function(x):
        return log1p_sum_exp(x, KEEP, 1)

    assert torch.autograd.gradcheck(function, MAT.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(function, MAT.clone().requires_grad_())


def test_nothing_kept_is_zero_with_zero_gradient():
    mat = MAT.clone().requires_grad_()
    value = log1p_sum_exp(mat, KEEP, 1)
    value.sum().backward()
    assert (value > 0).tolist() == [True, False, True, True]
    assert torch.equal(mat.grad != 0, KEEP)
