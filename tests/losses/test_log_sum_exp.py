import math

import numpy as np
import pytest
import torch

from pml_ext.losses.log_sum_exp import Term, class_log1p_sum_exp, sum_log1p_sum_exp

MAT = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DROP = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
DROP[1] = True  # nothing is kept in this row
TERMS = [Term(DROP, 3.0, 0.5, 0.25), Term(~DROP, -2.0, -0.3)]
LABELS = torch.tensor([2, 0, 2, 5])
SHIFT = torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def reference(mat, terms):
    """Loops, without torch."""
    return [
        sum(
            w * math.log(1 + sum(math.exp(a * m + b) for m, d in zip(row, drop[i], strict=True) if not d))
            for drop, a, b, w in terms
        )
        for i, row in enumerate(mat)
    ]


def class_reference(mat, labels, scale, shift, sample_shift):
    """Loops, without torch."""
    pos, neg = [], []
    for c in range(mat.shape[1]):
        own = [math.exp(scale * mat[i, c] + shift + sample_shift[i]) for i in range(len(mat)) if labels[i] == c]
        others = [math.exp(-scale * mat[i, c] + shift + sample_shift[i]) for i in range(len(mat)) if labels[i] != c]
        pos.append(math.log(1 + sum(own)))
        neg.append(math.log(1 + sum(others)))
    return pos, neg


@pytest.mark.parametrize("grad", [True, False])
def test_sum_matches_reference(grad, device):
    expected = reference(MAT.numpy(), [(t.drop.numpy(), *t[1:]) for t in TERMS])
    terms = [t._replace(drop=t.drop.to(device)) for t in TERMS]
    actual = sum_log1p_sum_exp(MAT.clone().to(device).requires_grad_(grad), terms)
    assert actual.requires_grad == grad
    np.testing.assert_allclose(actual.detach().cpu().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sample_shift", [None, SHIFT])
def test_class_sums_match_reference(grad, sample_shift, device):
    expected = class_reference(
        MAT.numpy(), LABELS.numpy(), 1.5, 0.2, np.zeros(4) if sample_shift is None else SHIFT.numpy()
    )
    mat = MAT.clone().to(device).requires_grad_(grad)
    shift = None if sample_shift is None else sample_shift.to(device)
    actual = class_log1p_sum_exp(mat, LABELS.to(device), 1.5, 0.2, shift)
    for a, e in zip(actual, expected, strict=True):
        assert a.requires_grad == grad
        np.testing.assert_allclose(a.detach().cpu().numpy(), e, rtol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda m: sum_log1p_sum_exp(m, TERMS),
        lambda m: class_log1p_sum_exp(m, LABELS, 1.5, 0.2, SHIFT),
        lambda m: class_log1p_sum_exp(m, LABELS, 1.5, 0.2, None)[0],
        lambda m: class_log1p_sum_exp(m, LABELS, 1.5, 0.2, None)[1],
    ],
)
def test_gradcheck_twice(function):
    assert torch.autograd.gradcheck(function, MAT.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(function, MAT.clone().requires_grad_())


def test_nothing_kept_is_zero_with_zero_gradient():
    mat = MAT.clone().requires_grad_()
    value = sum_log1p_sum_exp(mat, TERMS[:1])
    value.sum().backward()
    assert value[1] == 0
    assert torch.equal(mat.grad == 0, DROP)
    pos, _ = class_log1p_sum_exp(mat, LABELS, 1.5, 0.2, None)
    assert (pos > 0).tolist() == [True, False, True, False, False, True]


def test_backward_twice_through_one_graph():
    mat = MAT.clone().requires_grad_()
    value = sum_log1p_sum_exp(mat, TERMS).sum() + torch.stack(class_log1p_sum_exp(mat, LABELS, 1.5, 0.2, SHIFT)).sum()
    first, second = (torch.autograd.grad(value, mat, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
