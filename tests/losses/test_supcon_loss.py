import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer

from pml_ext.losses import SupConLoss

EMB = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([7, 7, 2, 2, 2, 0, 0, 7, 9])
REF_LABELS = torch.tensor([7, 2, 0, 0, 5, 2, 7])


def reference(x, y, temperature):
    """The equation with loops; shares no code with the package and uses no torch."""
    values = []
    for i in range(len(x)):
        s = {
            j: x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) / temperature for j in range(len(x)) if j != i
        }
        pos = [s[j] for j in s if y[j] == y[i]]
        if pos:
            values.append(math.log(sum(map(math.exp, s.values()))) - sum(pos) / len(pos))
    return sum(values) / len(values)  # without the anchors of loss 0


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_reference(temperature, chunk_size, dtype, tol, device):
    expected = reference(EMB.to(dtype).double().numpy(), LABELS.numpy(), temperature)
    loss_func = SupConLoss(temperature, chunk_size=chunk_size)
    assert loss_func(EMB.to(device, dtype), LABELS).item() == pytest.approx(expected, rel=tol)


def test_hand_computed():
    """Cosines of 0.6 to the positive, 0 to the negative of the first, 0.8 of the second; the third has no positive."""
    emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    first, second = math.log(1 + math.exp(0.0 - 0.6)), math.log(1 + math.exp(0.8 - 0.6))
    actual = SupConLoss(temperature=1.0)(emb, torch.tensor([4, 4, 1]))
    assert actual.item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "distance", [CosineSimilarity(), DotProductSimilarity(normalize_embeddings=False), LpDistance()]
)
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("reducer", [AvgNonZeroReducer, MeanReducer])
@pytest.mark.parametrize("chunk_size", [None, 2, 100])
def test_is_pml_loss(distance, miner, with_ref, reducer, chunk_size):
    emb = EMB.clone().requires_grad_()
    refs = {"ref_emb": REF.clone().requires_grad_(), "ref_labels": REF_LABELS} if with_ref else {}
    mined = None if miner is None else miner(emb, LABELS, **refs)
    leaves = [emb, *([refs["ref_emb"]] if with_ref else [])]
    kwargs = {"temperature": 0.5, "distance": distance, "reducer": reducer()}
    ours = SupConLoss(chunk_size=chunk_size, **kwargs)(emb, LABELS, mined, **refs)
    theirs = losses.SupConLoss(**kwargs)(emb, LABELS, mined, **refs)
    assert theirs > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("labels", [torch.zeros(9, dtype=torch.long), torch.arange(9)], ids=["one class", "all alone"])
def test_without_positives_or_negatives_it_is_zero_as_pml(chunk_size, labels):
    emb = EMB.clone().requires_grad_()
    loss = SupConLoss(chunk_size=chunk_size)(emb, labels)
    assert loss == losses.SupConLoss()(EMB, labels) == 0
    (grad,) = torch.autograd.grad(loss, emb)
    assert not grad.any()


@pytest.mark.parametrize("temperature", [0.001, 0.005])
def test_low_temperatures_take_no_sum_out_of_range(temperature):
    """Exponents of a thousand: float32 holds no such exponential."""
    emb, reducer = EMB.float().requires_grad_(), MeanReducer()  # the default one asks whether rounding left a 0
    dense, tiles = (SupConLoss(temperature, size, reducer=reducer)(emb, LABELS) for size in (None, 2))
    assert dense > 10
    torch.testing.assert_close(tiles, dense)
    torch.testing.assert_close(*(torch.autograd.grad(loss, emb)[0] for loss in (tiles, dense)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("temperature", [0.02, 0.025, 0.05, 0.1])
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_two_views_at_low_temperatures(temperature, chunk_size):
    """Most losses are far below what rounding leaves of exponents of 50, and each counts in the mean."""
    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(64, 128, generator=generator).repeat_interleave(2, 0)
    emb = emb + 0.01 * torch.randn(128, 128, generator=generator)
    emb[:20] = torch.randn(20, 128, generator=generator)
    labels = torch.arange(128) // 2
    wide = emb.double().requires_grad_()
    unit = torch.nn.functional.normalize(wide)
    exponents = unit @ unit.T / temperature
    same = labels[:, None] == labels
    others = exponents.masked_fill(same, -torch.inf).logsumexp(1) - exponents[range(128), torch.arange(128) ^ 1]
    expected = torch.logaddexp(others, torch.zeros(1))
    assert (expected < 1e-6).sum() > 50 or temperature > 0.03
    emb.requires_grad_()
    actual = SupConLoss(temperature, chunk_size)(emb, labels)
    assert actual.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    (grad,), (by_wide,) = torch.autograd.grad(actual, emb), torch.autograd.grad(expected.mean(), wide)
    torch.testing.assert_close(grad.double(), by_wide, rtol=1e-4, atol=1e-6)


def test_gradcheck():
    inputs = EMB.clone().requires_grad_(), REF.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, r: SupConLoss(0.5, 3)(x, LABELS, None, r, REF_LABELS), inputs)
    assert torch.autograd.gradgradcheck(lambda x: SupConLoss(0.5)(x, LABELS), inputs[0])


def test_a_temperature_that_is_learned():
    temperature = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    loss_func = SupConLoss(chunk_size=2)
    loss_func.temperature = temperature
    (grad,) = torch.autograd.grad(loss_func(EMB, LABELS), temperature)
    values = [SupConLoss(0.5 + d)(EMB, LABELS).item() for d in (1e-6, -1e-6)]
    assert grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf")])
def test_bad_arguments(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got"):
        SupConLoss(temperature)


def test_bad_pairs():
    with pytest.raises(ValueError, match="labels or indices_tuple must be given, got None for both"):
        SupConLoss()(EMB)
    both = tuple(torch.tensor([i]) for i in (0, 1, 0, 1))
    with pytest.raises(ValueError, match=r"a pair as positive or as negative, got \(0, 1\) as both"):
        SupConLoss()(EMB, LABELS, both)
