import math

import numpy as np
import pytest
import torch

from pml_ext.losses.log_sum_exp import Term, sum_log1p_sum_exp

MAT = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DROP = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
DROP[1] = True  # nothing is kept in this row
COLUMN = torch.tensor([[2], [0], [5], [2]])
SHIFT = torch.randn(4, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def reference(mat, drop, scale, shift, weight, axis):
    """The equation with loops, without torch."""
    shift = np.broadcast_to(shift, mat.shape)
    mat, drop, shift = (x if axis == 1 else x.T for x in (mat, drop, shift))
    return [
        weight * math.log(1 + sum(math.exp(scale * m + b) for m, d, b in zip(*row, strict=True) if not d))
        for row in zip(mat, drop, shift, strict=True)
    ]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_matches_reference(grad, dim, device):
    terms = [Term(DROP, 3.0, 0.5, 0.25), Term(COLUMN, -2.0, SHIFT)]
    drop = np.zeros((4, 6), dtype=bool)
    drop[np.arange(4), COLUMN[:, 0]] = True
    expected = np.add(
        reference(MAT.numpy(), DROP.numpy(), 3.0, 0.5, 0.25, dim),
        reference(MAT.numpy(), drop, -2.0, SHIFT.numpy(), 1, dim),
    )
    terms = [t._replace(drop=t.drop.to(device)) for t in terms]
    terms[1] = terms[1]._replace(shift=SHIFT.to(device))
    actual = sum_log1p_sum_exp(MAT.clone().to(device).requires_grad_(grad), terms, dim)
    assert actual.requires_grad == grad
    np.testing.assert_allclose(actual.detach().cpu().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck_twice(dim):
    terms = [Term(DROP, 3.0, 0.5, 0.25), Term(COLUMN, -2.0, SHIFT)]
    assert torch.autograd.gradcheck(lambda m: sum_log1p_sum_exp(m, terms, dim), MAT.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda m: sum_log1p_sum_exp(m, terms, dim), MAT.clone().requires_grad_())


def test_nothing_kept_is_zero_with_zero_gradient():
    mat = MAT.clone().requires_grad_()
    value = sum_log1p_sum_exp(mat, [Term(DROP, 3.0, 0.5)], 1)
    value.sum().backward()
    assert value[1] == 0
    assert not mat.grad[1].any()
    assert mat.grad[0].any()
    assert torch.equal(mat.grad == 0, DROP)
