import math

import numpy as np
import pytest
import torch

from pml_ext.losses.log_sum_exp import log1p_sum_exp, log1p_sum_exp_by_class

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


LABELS = torch.tensor([2, 0, 2, 5])


def test_by_class_matches_reference(device):
    exponents = MAT[:, 0]
    own = (LABELS[:, None] == torch.arange(6)).numpy()
    expected = reference(exponents.expand(6, 4).numpy(), own.T)
    actual = log1p_sum_exp_by_class(exponents.to(device), LABELS.to(device), 6)
    np.testing.assert_allclose(actual.cpu(), expected, rtol=1e-12)
    assert (actual > 0).tolist() == [True, False, True, False, False, True]
    assert log1p_sum_exp_by_class(torch.tensor([1000.0, -1000.0]), torch.tensor([0, 1]), 2).tolist() == [1000, 0]


@pytest.mark.parametrize("size", [1.0, -1000.0, 1000.0])
def test_second_derivatives_are_finite(size):
    """In float32 too, where exponents are so small or large that nothing of a sum is left."""
    exponents = (size * (1 + torch.rand(4, 6))).requires_grad_()
    for value in (
        log1p_sum_exp(exponents, KEEP, 1),
        log1p_sum_exp(exponents, KEEP, 0),
        log1p_sum_exp_by_class(exponents[:, 0], LABELS, 6),
    ):
        (grad,) = torch.autograd.grad(value.sum(), exponents, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), exponents)
        assert second.isfinite().all()
        assert grad.any() == (size > 0)


def test_by_class_gradcheck_twice():
    def function(x):
        return log1p_sum_exp_by_class(x, LABELS, 6)

    assert torch.autograd.gradcheck(function, MAT[:, 0].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(function, MAT[:, 0].clone().requires_grad_())
