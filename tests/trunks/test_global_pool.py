import numpy as np
import pytest
import torch

from pml_ext.trunks import GlobalPool2d

FEATURES = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_loops(image, pool_type, p):
    """One channel at a time, without torch."""
    result = []
    for channel in image:
        values = [v for row in channel for v in row]
        mean = sum(values) / len(values)
        gem = (sum(max(v, 1e-6) ** p for v in values) / len(values)) ** (1 / p)
        result.append({"avg": mean, "max": max(values), "avg+max": mean + max(values), "gem": gem}[pool_type])
    return result


@pytest.mark.parametrize("pool_type", ["avg", "max", "avg+max", "gem"])
@pytest.mark.parametrize("p", [1.0, 3.0])
def test_matches_reference(pool_type, p, device):
    expected = [by_loops(image, pool_type, p) for image in FEATURES.numpy()]
    pool = GlobalPool2d(pool_type, p=p).to(device)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        actual = pool(FEATURES.to(device, dtype))
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.detach().double().cpu().numpy(), expected, rtol=tol, atol=tol)


def test_gem_learns_its_exponent():
    pool = GlobalPool2d("gem", p=2.0)
    features = FEATURES.float().requires_grad_()
    pool(features).sum().backward()
    assert [name for name, _ in pool.named_parameters()] == ["p"]
    assert pool.p.grad.abs() > 1e-3
    assert features.grad.isfinite().all()
    assert not list(GlobalPool2d("avg+max").parameters())


def test_gem_gradcheck():
    pool = GlobalPool2d("gem").double()
    assert torch.autograd.gradcheck(lambda features, p: pool(features), (FEATURES.clone().requires_grad_(), pool.p))


def test_gem_in_half_precision():
    """200 ** 3 is beyond float16."""
    features = torch.full((1, 2, 3, 3), 200.0, dtype=torch.float16)
    pool = GlobalPool2d("gem")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool(features)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled, torch.full((1, 2), 200.0, dtype=torch.float16), rtol=1e-3, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"pool_type must be one of avg, max, avg\+max, gem, got 'avgmax'"):
        GlobalPool2d("avgmax")
    with pytest.raises(ValueError, match="p must be > 0 and finite, got 0"):
        GlobalPool2d("gem", p=0)
    for shape in ((2, 3), (2, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"shape \(B, C, H, W\) with H, W >= 1, got"):
            GlobalPool2d()(torch.zeros(shape))
