import math
import os
import shutil

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
from pytorch_metric_learning.reducers import ClassWeightedReducer, DoNothingReducer

from pml_ext.losses import MultiSimilarityLoss
from tests.graphs import graphs_of_batches

EMB = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([7, 7, 2, 2, 2, 0, 0, 7, 9])
REF_LABELS = torch.tensor([7, 2, 0, 0, 5, 9, 7])


def reference(x, y, alpha, beta, base, negative_base, rx=None, ry=None):
    """The equation with loops; shares no code with the package and uses no torch."""
    within = rx is None
    rx, ry = (x, y) if within else (rx, ry)
    total = 0.0
    for i in range(len(x)):
        pos = neg = 0.0
        for j in range(len(rx)):
            s = x[i] @ rx[j] / np.linalg.norm(x[i]) / np.linalg.norm(rx[j])
            if y[i] != ry[j]:
                neg += math.exp(beta * (s - negative_base))
            elif not (within and i == j):
                pos += math.exp(-alpha * (s - base))
        total += math.log(1 + pos) / alpha + math.log(1 + neg) / beta
    return total / len(x)


@pytest.mark.parametrize(("alpha", "beta", "base"), [(2, 50, 0.5), (2, 50, 1.0), (5.0, 3.0, -0.2)])
@pytest.mark.parametrize("sign", ["minus", "printed"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_matches_reference(alpha, beta, base, sign, dtype, tol, device):
    emb = EMB.to(dtype)
    negative_base = base if sign == "minus" else -base
    expected = reference(emb.double().numpy(), LABELS.numpy(), alpha, beta, base, negative_base)
    loss_func = MultiSimilarityLoss(alpha, beta, base, negative_sign=sign)
    assert loss_func(emb.to(device), LABELS).item() == pytest.approx(expected, rel=tol)  # labels stay on the CPU


def test_matches_reference_with_ref(device):
    expected = reference(EMB.numpy(), LABELS.numpy(), 2, 50, 0.5, 0.5, REF.numpy(), REF_LABELS.numpy())
    actual = MultiSimilarityLoss()(EMB.to(device), LABELS, ref_emb=REF.to(device), ref_labels=REF_LABELS)
    assert actual.item() == pytest.approx(expected, rel=1e-9)


def test_hand_computed():
    """Two unit vectors of one class at cosine 0.6, one of another class at cosine 0 and 0.8 to them."""
    emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    pos = math.log(1 + math.exp(-(0.6 - 0.5)))
    neg = [math.log(1 + math.exp(10 * (s - 0.5))) / 10 for s in (0.0, 0.8)]
    third = math.log(1 + math.exp(10 * -0.5) + math.exp(10 * 0.3)) / 10
    expected = (pos + neg[0] + pos + neg[1] + third) / 3
    actual = MultiSimilarityLoss(alpha=1, beta=10)(emb, torch.tensor([4, 4, 1]))
    assert actual.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distance", [CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance])
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
@pytest.mark.parametrize("with_ref", [False, True])
def test_is_pml_loss(distance, miner, with_ref, device):
    """Value and gradients are PML's, for similarities and distances, 3- and 4-tuples, batch and reference."""
    emb = EMB.clone().to(device).requires_grad_()
    ref = {"ref_emb": REF.clone().to(device).requires_grad_(), "ref_labels": REF_LABELS.to(device)} if with_ref else {}
    indices_tuple = None if miner is None else miner(emb, LABELS.to(device), **ref)
    inputs = [emb, *([ref["ref_emb"]] if with_ref else [])]
    ours, theirs = (
        loss_class(alpha=2, beta=5, distance=distance())(emb, LABELS.to(device), indices_tuple, **ref)
        for loss_class in (MultiSimilarityLoss, losses.MultiSimilarityLoss)
    )
    assert theirs.item() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", [CosineSimilarity, DotProductSimilarity, LpDistance])
@pytest.mark.parametrize("with_ref", [False, True])
def test_gradcheck_twice(distance, with_ref):
    loss_func = MultiSimilarityLoss(beta=5, distance=distance())

    def loss_of(emb, ref):
        return loss_func(emb, LABELS, ref_emb=ref if with_ref else None, ref_labels=REF_LABELS if with_ref else None)

    inputs = (EMB.clone().requires_grad_(), REF.clone().requires_grad_(with_ref))
    assert torch.autograd.gradcheck(loss_of, inputs)
    if distance is not LpDistance:  # the square root in torch.cdist is not smooth at distance 0, on the diagonal
        assert torch.autograd.gradgradcheck(loss_of, inputs)


def test_no_overflow_and_no_lost_precision():
    """Exponents of several thousand: log(1 + exp(x)) is x there."""
    emb = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = MultiSimilarityLoss(alpha=3000, beta=5000)(emb, torch.tensor([0, 0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx((1.5 + 0.5 + 1.5 + 0.5) / 3, rel=1e-4)
    assert emb.grad.isfinite().all()


def test_one_mined_pair_counts():
    """PML gives 0 where each index tensor holds at most one entry."""
    one = tuple(torch.tensor([i]) for i in (0, 1, 0, 4))
    alone = MultiSimilarityLoss()(EMB, LABELS, one)
    twice = losses.MultiSimilarityLoss()(EMB, LABELS, tuple(torch.cat([i, i]) for i in one))
    assert losses.MultiSimilarityLoss()(EMB, LABELS, one).item() == 0
    assert alone.item() == pytest.approx(twice.item(), rel=1e-9)
    assert alone.item() > 0


def test_element_losses_are_one_dimensional():
    """PML's (B, 1) is broadcast to (B, B) by ClassWeightedReducer: a wrong value."""
    weights = torch.arange(1.0, 11.0)
    each = MultiSimilarityLoss(reducer=DoNothingReducer())(EMB, LABELS)["loss"]["losses"]
    assert each.shape == (9,)
    expected = (each * weights[LABELS]).mean()
    actual = MultiSimilarityLoss(reducer=ClassWeightedReducer(weights))(EMB, LABELS)
    torch.testing.assert_close(actual, expected)


def test_two_views_with_the_same_labels_object():
    """(i, i) is a pair of two views; PML drops it unless the labels are cloned."""
    view = EMB.flip(1)
    ours = MultiSimilarityLoss()(EMB, LABELS, ref_emb=view, ref_labels=LABELS)
    theirs = losses.MultiSimilarityLoss()(EMB, LABELS, ref_emb=view, ref_labels=LABELS.clone())
    torch.testing.assert_close(ours, theirs)
    assert not torch.isclose(ours, losses.MultiSimilarityLoss()(EMB, LABELS, ref_emb=view, ref_labels=LABELS))


def test_labels_are_not_needed_with_indices():
    indices_tuple = miners.MultiSimilarityMiner()(EMB, LABELS)
    torch.testing.assert_close(
        MultiSimilarityLoss()(EMB, indices_tuple=indices_tuple), MultiSimilarityLoss()(EMB, LABELS, indices_tuple)
    )


COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.compiles
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.skipif(not COMPILER, reason="no C++ compiler"))]
)
def test_compiles_without_graph_break(backend):
    loss_func = MultiSimilarityLoss()
    compiled = torch.compile(loss_func, fullgraph=True, backend=backend)
    emb = EMB.float().requires_grad_()
    expected, actual = loss_func(emb, LABELS), compiled(emb, LABELS)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, emb), torch.autograd.grad(expected, emb))


@pytest.mark.compiles
def test_compiles_with_half_int32_and_reference():
    loss_func = MultiSimilarityLoss()
    compiled = torch.compile(loss_func, fullgraph=True, backend="eager")
    for args in ((EMB.half(), LABELS.int()), (EMB.float()[:5], LABELS[:5]), (EMB, LABELS, None, REF, REF_LABELS)):
        torch.testing.assert_close(compiled(*args), loss_func(*args))


def test_works_with_torch_func():
    loss_func = MultiSimilarityLoss()
    emb = EMB.clone().requires_grad_()
    actual = torch.func.grad(lambda x: loss_func(x, LABELS))(EMB)
    torch.testing.assert_close(actual, torch.autograd.grad(loss_func(emb, LABELS), emb)[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0}, "alpha must be > 0 and finite, got 0"),
        ({"beta": -1.0}, r"beta must be > 0 and finite, got -1\.0"),
        ({"alpha": float("inf")}, "alpha must be > 0 and finite, got inf"),
        ({"base": float("nan")}, "base must be finite, got nan"),
        ({"negative_sign": "plus"}, "negative_sign must be 'minus' or 'printed', got 'plus'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MultiSimilarityLoss(**kwargs)


def test_bad_pairs():
    with pytest.raises(ValueError, match="labels or indices_tuple must be given, got None for both"):
        MultiSimilarityLoss()(EMB)
    both = tuple(torch.tensor([i]) for i in (0, 1, 0, 1))
    with pytest.raises(ValueError, match=r"a pair as positive or as negative, got \(0, 1\) as both"):
        MultiSimilarityLoss()(EMB, LABELS, both)


def test_pair_check_can_be_turned_off(without_validation):
    both = tuple(torch.tensor([i]) for i in (0, 1, 0, 1))
    assert MultiSimilarityLoss()(EMB, LABELS, both) > 0


def test_small_losses_keep_their_digits():  # log1p: 1 + 1e-7 would be 1 in float32
    emb, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.9]]), torch.tensor([0, 0, 1])
    loss_func = MultiSimilarityLoss(alpha=50, beta=50, base=0.6)
    unit = torch.nn.functional.normalize(emb.double()).numpy()
    sim = unit @ unit.T
    exps = [np.exp(-50 * (sim[0, 1] - 0.6)), np.exp(50 * (sim[0, 2] - 0.6)), np.exp(50 * (sim[1, 2] - 0.6))]
    expected = (np.log1p(exps[0]) * 2 + np.log1p(exps[1]) + np.log1p(exps[2]) + np.log1p(exps[1] + exps[2])) / 50 / 3
    assert 0 < expected < 1e-9
    actual = loss_func(emb.requires_grad_(), labels)
    assert actual.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_graph_for_all_batch_sizes(dtype):
    assert graphs_of_batches(MultiSimilarityLoss(), (12, 16, 9), dtype) == [1, 1, 1]


# Tiles, and mining inside


@pytest.fixture
def small_tiles(monkeypatch):
    """Let batches of more than 16 pairs be looked at in tiles of 4 x 4."""
    monkeypatch.setattr("pml_ext.losses.similarity.auto_block", lambda device: 16)
    monkeypatch.setattr("pml_ext.streaming.pair_tiles.auto_block", lambda device: 16)


def value_and_gradients(loss_func, *args, **refs):
    emb = EMB.clone().requires_grad_()
    leaves = [emb]
    if refs:
        refs["ref_emb"] = refs["ref_emb"].clone().requires_grad_()
        leaves.append(refs["ref_emb"])
    loss = loss_func(emb, LABELS, *args, **refs)
    return loss, *torch.autograd.grad(loss, leaves)


def assert_same(actual, expected):
    assert expected[0] > 0
    for a, e in zip(actual, expected, strict=True):
        assert e.any()
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


REFS = {"ref_emb": REF, "ref_labels": REF_LABELS}


@pytest.mark.parametrize("refs", [{}, REFS], ids=["batch", "references"])
@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity(normalize_embeddings=False)])
@pytest.mark.parametrize("kwargs", [{}, {"epsilon": 0.2}, {"negative_sign": "printed", "base": 0.1}])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_tiles_are_the_dense_form(refs, distance, kwargs, chunk_size):
    dense = value_and_gradients(MultiSimilarityLoss(beta=5, distance=distance, **kwargs), **refs)
    tiles = MultiSimilarityLoss(beta=5, distance=distance, chunk_size=chunk_size, **kwargs)
    assert_same(value_and_gradients(tiles, **refs), dense)


@pytest.mark.parametrize("refs", [{}, REFS], ids=["batch", "references"])
@pytest.mark.parametrize("distance", [CosineSimilarity(), DotProductSimilarity(), LpDistance(), SNRDistance()])
@pytest.mark.parametrize("epsilon", [0.1, 0.4, -0.1])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_mines_as_pml(refs, distance, epsilon, chunk_size):
    """Equal to PML's miner and PML's loss, in the dense form and in tiles; other distances are always dense."""
    mined = miners.MultiSimilarityMiner(epsilon, distance=distance)(EMB, LABELS, **refs)
    assert 0 < len(mined[1]) + len(mined[3]) < EMB.shape[0] * (8 if not refs else 7)
    theirs = value_and_gradients(losses.MultiSimilarityLoss(beta=5, distance=distance), mined, **refs)
    ours = MultiSimilarityLoss(beta=5, distance=distance, epsilon=epsilon, chunk_size=chunk_size)
    assert_same(value_and_gradients(ours, **refs), theirs)


def test_mines_among_the_pairs_of_a_tuple():
    """As if these were all pairs: the hardest are those of the tuple."""
    pairs = miners.BatchHardMiner()(EMB, LABELS)
    everything = value_and_gradients(MultiSimilarityLoss(beta=5, epsilon=10.0), pairs)
    assert_same(everything, value_and_gradients(MultiSimilarityLoss(beta=5), pairs))
    a, p, n = pairs
    sim = torch.nn.functional.normalize(EMB) @ torch.nn.functional.normalize(EMB).T
    kept = sim[a, p] - 0.1 < sim[a, n]  # of an anchor with one positive and one negative, both count or none
    assert 0 < kept.sum() < len(kept)
    expected = value_and_gradients(MultiSimilarityLoss(beta=5), (a[kept], p[kept], n[kept]))
    assert_same(value_and_gradients(MultiSimilarityLoss(beta=5, epsilon=0.1), pairs), expected)


@pytest.mark.usefixtures("small_tiles")
def test_long_batches_take_tiles_and_short_ones_are_dense():
    loss_func = MultiSimilarityLoss()
    for rows, streamed in ((4, False), (9, True)):
        emb = EMB[:rows].clone().requires_grad_()
        loss = loss_func(emb, LABELS[:rows])
        (grad,) = torch.autograd.grad(loss, emb, create_graph=True)
        if streamed:
            with pytest.raises(NotImplementedError, match="Multi-Similarity is streamed"):
                torch.autograd.grad(grad.sum(), emb)
        else:
            assert torch.autograd.grad(grad.square().sum(), emb)[0].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["alpha", "beta", "base"])
def test_settings_that_are_learned_take_the_dense_form(name):
    loss_func = MultiSimilarityLoss(beta=5)
    setting = torch.nn.Parameter(torch.tensor(float(getattr(loss_func, name)), dtype=torch.float64))
    setattr(loss_func, name, setting)
    (grad,) = torch.autograd.grad(loss_func(EMB, LABELS), setting)
    slopes = [MultiSimilarityLoss(**({"beta": 5} | {name: setting.item() + d}))(EMB, LABELS) for d in (1e-6, -1e-6)]
    assert grad.item() == pytest.approx(((slopes[0] - slopes[1]) / 2e-6).item(), rel=1e-6)


def test_a_tensor_that_is_not_learned_is_a_number():
    loss_func = MultiSimilarityLoss(alpha=torch.tensor([2.0]), beta=torch.tensor(5.0), chunk_size=3)
    torch.testing.assert_close(loss_func(EMB, LABELS), MultiSimilarityLoss(beta=5)(EMB, LABELS))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"epsilon": float("inf")}, ValueError, "epsilon must be finite, got inf"),
        ({"epsilon": "0.1"}, TypeError, "epsilon must be a number"),
        ({"epsilon": torch.ones(1, requires_grad=True)}, TypeError, "epsilon must be a number here"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or an integer >= 1, got 0"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size must be None or an integer >= 1, got 2.0"),
    ],
)
def test_bad_tiles_and_mining(kwargs, error, message):
    with pytest.raises(error, match=message):
        MultiSimilarityLoss(**kwargs)


@pytest.mark.compiles
def test_compiled_tiles():
    """A number forces tiles, which are an opaque call; without one the compiled loss is dense."""
    loss_func = MultiSimilarityLoss(chunk_size=4, epsilon=0.2)
    emb = EMB.clone().requires_grad_()
    compiled = torch.compile(loss_func, backend="eager")
    actual, expected = compiled(emb, LABELS), loss_func(emb, LABELS)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, emb), torch.autograd.grad(expected, emb))
