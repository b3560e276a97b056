import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import DoNothingReducer, MeanReducer, SumReducer

from pml_ext.losses import NTXentLoss

EMB = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([7, 7, 2, 2, 2, 0, 0, 7, 9])
REF_LABELS = torch.tensor([7, 2, 0, 0, 5, 2, 7])


def reference(x, y, temperature):
    """The equation with loops; shares no code with the package and uses no torch."""
    values = []
    for i in range(len(x)):
        s = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) / temperature for j in range(len(x))]
        neg = sum(math.exp(s[k]) for k in range(len(x)) if y[k] != y[i])
        values += [math.log(1 + neg / math.exp(s[j])) for j in range(len(x)) if y[j] == y[i] and j != i]
    return sum(values) / len(values)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_reference(temperature, chunk_size, dtype, tol, device):
    expected = reference(EMB.to(dtype).double().numpy(), LABELS.numpy(), temperature)
    loss_func = NTXentLoss(temperature, chunk_size=chunk_size)
    assert loss_func(EMB.to(device, dtype), LABELS).item() == pytest.approx(expected, rel=tol)


def test_hand_computed():
    """Cosines of 0.6 to the positive, 0 to the negative of the first, 0.8 of the second."""
    emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    first, second = math.log(1 + math.exp(0.0 - 0.6)), math.log(1 + math.exp(0.8 - 0.6))
    actual = NTXentLoss(temperature=1.0)(emb, torch.tensor([4, 4, 1]))
    assert actual.item() == pytest.approx((first + second) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "distance", [CosineSimilarity(), DotProductSimilarity(normalize_embeddings=False), LpDistance()]
)
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("reducer", [MeanReducer, SumReducer])
@pytest.mark.parametrize("chunk_size", [None, 2, 100])
def test_is_pml_loss(distance, miner, with_ref, reducer, chunk_size):
    emb = EMB.clone().requires_grad_()
    refs = {"ref_emb": REF.clone().requires_grad_(), "ref_labels": REF_LABELS} if with_ref else {}
    mined = None if miner is None else miner(emb, LABELS, **refs)
    leaves = [emb, *([refs["ref_emb"]] if with_ref else [])]
    kwargs = {"temperature": 0.5, "distance": distance, "reducer": reducer()}
    ours = NTXentLoss(chunk_size=chunk_size, **kwargs)(emb, LABELS, mined, **refs)
    theirs = losses.NTXentLoss(**kwargs)(emb, LABELS, mined, **refs)
    assert theirs > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_reducers_see_the_pairs_of_pml(chunk_size):
    """The same losses at the same indices in the same order."""
    ours, theirs = (
        loss_func(EMB, LABELS)["loss"]
        for loss_func in (
            NTXentLoss(chunk_size=chunk_size, reducer=DoNothingReducer()),
            losses.NTXentLoss(reducer=DoNothingReducer()),
        )
    )
    assert ours["reduction_type"] == theirs["reduction_type"] == "pos_pair"
    assert all(torch.equal(a, b) for a, b in zip(ours["indices"], theirs["indices"], strict=True))
    torch.testing.assert_close(ours["losses"], theirs["losses"])


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("labels", [torch.zeros(9, dtype=torch.long), torch.arange(9)], ids=["one class", "all alone"])
def test_without_positives_or_negatives_it_is_zero_as_pml(chunk_size, labels):
    emb = EMB.clone().requires_grad_()
    loss = NTXentLoss(chunk_size=chunk_size)(emb, labels)
    assert loss == losses.NTXentLoss()(EMB, labels) == 0
    (grad,) = torch.autograd.grad(loss, emb)
    assert not grad.any()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_large_losses_go_on_growing(chunk_size):
    """PML's exponential of -200 is 0 in float32, and its loss 87.3 without a gradient."""
    emb = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    loss = NTXentLoss(0.01, chunk_size=chunk_size)(emb, labels)
    assert loss.item() == pytest.approx((200 + math.log(2)) / 2, rel=1e-2)
    assert losses.NTXentLoss(0.01)(emb, labels) < 50
    assert loss.isfinite()


def test_gradcheck():
    inputs = EMB.clone().requires_grad_(), REF.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, r: NTXentLoss(0.5, 3)(x, LABELS, None, r, REF_LABELS), inputs)
    assert torch.autograd.gradgradcheck(lambda x: NTXentLoss(0.5)(x, LABELS), inputs[0])


def test_a_temperature_that_is_learned():
    temperature = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    loss_func = NTXentLoss(chunk_size=2)
    loss_func.temperature = temperature
    (grad,) = torch.autograd.grad(loss_func(EMB, LABELS), temperature)
    values = [NTXentLoss(0.5 + d)(EMB, LABELS).item() for d in (1e-6, -1e-6)]
    assert grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf")])
def test_bad_arguments(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0 and finite, got"):
        NTXentLoss(temperature)


def test_bad_pairs():
    with pytest.raises(ValueError, match="labels or indices_tuple must be given, got None for both"):
        NTXentLoss()(EMB)
