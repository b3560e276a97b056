import math
import sys

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DivisorReducer,
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer

from pml_ext.losses import EnsembleLoss, HybridLoss, ProxyAnchorLoss
from tests.graphs import graphs_of_batches

NUM_CLASSES, SIZE = 6, 5
EMB = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROXIES = torch.randn(NUM_CLASSES, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([5, 5, 2, 2, 2, 0, 0, 5, 3])  # classes 1 and 4 are absent


def make(loss_class=ProxyAnchorLoss, dtype=torch.float64, **kwargs):
    loss_func = loss_class(NUM_CLASSES, SIZE, **kwargs).to(dtype)
    with torch.no_grad():
        loss_func.proxies.copy_(PROXIES)
    return loss_func


def reference(x, y, proxies, margin, alpha):
    """The equation with loops; shares no code with the package and uses no torch."""
    pos_total = neg_total = 0.0
    for c, p in enumerate(proxies):
        pos = neg = 0.0
        for xi, yi in zip(x, y, strict=True):
            s = xi @ p / np.linalg.norm(xi) / np.linalg.norm(p)
            if yi == c:
                pos += math.exp(-alpha * (s - margin))
            else:
                neg += math.exp(alpha * (s + margin))
        pos_total += math.log(1 + pos)
        neg_total += math.log(1 + neg)
    return pos_total / len(set(y)) + neg_total / len(proxies)


@pytest.mark.parametrize(("margin", "alpha"), [(0.1, 32), (0.3, 4.0)])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_matches_reference(margin, alpha, dtype, tol, device):
    expected = reference(EMB.numpy(), LABELS.numpy(), PROXIES.numpy(), margin, alpha)
    loss_func = make(dtype=dtype, margin=margin, alpha=alpha).to(device)
    assert loss_func(EMB.to(device, dtype), LABELS).item() == pytest.approx(expected, rel=tol)


def test_hand_computed():
    """Proxies on the axes, one sample on the first axis: cosines 1 and 0."""
    loss_func = ProxyAnchorLoss(2, 2, margin=0.1, alpha=2)
    torch.nn.init.eye_(loss_func.proxies)
    expected = math.log(1 + math.exp(-2 * 0.9)) + math.log(1 + math.exp(2 * 0.1)) / 2
    assert loss_func(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distance", [CosineSimilarity, DotProductSimilarity, LpDistance])
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
def test_is_pml_loss(distance, miner, device):
    emb = EMB.clone().to(device).requires_grad_()
    labels = LABELS.to(device)
    indices_tuple = None if miner is None else miner(emb, labels)
    ours, theirs = (make(c, distance=distance()).to(device) for c in (ProxyAnchorLoss, losses.ProxyAnchorLoss))
    values = ours(emb, labels, indices_tuple), theirs(emb, labels, indices_tuple)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(v, [emb, f.proxies]) for v, f in zip(values, (ours, theirs), strict=True)]
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.get_logits(emb), theirs.get_logits(emb))


def test_same_initialization_and_state_dict():
    torch.manual_seed(3)
    theirs = losses.ProxyAnchorLoss(40, 8)
    torch.manual_seed(3)
    ours = ProxyAnchorLoss(40, 8)
    assert torch.equal(ours.proxies, theirs.proxies)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    other = ProxyAnchorLoss(40, 8)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other.proxies, theirs.proxies)
    theirs.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("distance", "streamed"),
    [
        (CosineSimilarity(), True),
        (DotProductSimilarity(), True),
        (CosineSimilarity(power=2), False),
        (LpDistance(), False),
    ],
    ids=["CosineSimilarity", "DotProductSimilarity", "power", "LpDistance"],
)
def test_gradcheck(distance, streamed):
    loss_func = make(alpha=4, distance=distance, chunk_size=4)

    def loss_of(emb, proxies):
        return torch.func.functional_call(loss_func, {"proxies": proxies}, (emb, LABELS))

    inputs = EMB.clone().requires_grad_(), PROXIES.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss_of, inputs)
    if not streamed:
        if not isinstance(distance, LpDistance):  # torch 2.5 has no second derivatives of torch.cdist
            assert torch.autograd.gradgradcheck(loss_of, inputs)
    else:
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.autograd.gradgradcheck(loss_of, inputs)


REDUCERS = {
    "default": None,
    "Mean": MeanReducer(),
    "Sum": SumReducer(),
    "Threshold": ThresholdReducer(low=0.1, high=20.0),
    "AvgNonZero": AvgNonZeroReducer(),
    "Divisor": DivisorReducer(),
    "by name": MultipleReducers({"pos_loss": SumReducer(), "neg_loss": DivisorReducer()}),
}


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_reducers_are_those_of_pml(reducer, chunk_size, device):
    """Value and gradients: one walk for the default, two where a reducer weighs proxies."""
    emb = EMB.clone().to(device).requires_grad_()
    ours, theirs = make(reducer=reducer, chunk_size=chunk_size), make(losses.ProxyAnchorLoss, reducer=reducer)
    grads = []
    for loss_func in (ours.to(device), theirs.to(device)):
        loss = loss_func(emb, LABELS.to(device))
        grads.append((loss, *torch.autograd.grad(2 * loss, [emb, loss_func.proxies])))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_do_nothing_reducer_gives_what_pml_gives():
    ours, theirs = (make(c, reducer=DoNothingReducer())(EMB, LABELS) for c in (ProxyAnchorLoss, losses.ProxyAnchorLoss))
    assert set(ours) == set(theirs)
    for name, entry in theirs.items():
        assert entry["divisor"] == ours[name]["divisor"]
        for key in ("losses", "indices"):
            torch.testing.assert_close(ours[name][key], entry[key])


@pytest.mark.parametrize("reducer", [None, MeanReducer()])
def test_walks(reducer, monkeypatch):
    """By default one walk for value and gradients; with another reducer two."""
    walks = []
    module = sys.modules["pml_ext.streaming.proxy_anchor"]
    walk = module._walk
    monkeypatch.setattr(module, "_walk", lambda *args: (walks.append(args[5]), walk(*args))[1])
    make(reducer=reducer)(EMB, LABELS).backward()
    assert len(walks) == (1 if reducer is None else 2)
    assert walks[-1] is not None


def test_statistics_of_the_reducer_are_recorded():
    for kwargs in ({"collect_stats": True}, {"reducer": DivisorReducer(collect_stats=True)}):
        loss_func = make(**kwargs)
        torch.testing.assert_close(loss_func(EMB, LABELS), make()(EMB, LABELS))
        assert loss_func.reducer.reducers["pos_loss"].divisor == 4
        assert loss_func.reducer.reducers["neg_loss"].divisor == 6


@pytest.mark.compiles
@pytest.mark.parametrize("num_classes", [6, 2000])
def test_compiles(num_classes):
    """As one graph where one chunk holds all classes, with an opaque call beyond."""
    torch.compiler.reset()
    loss_func = ProxyAnchorLoss(num_classes, SIZE)
    compiled = torch.compile(loss_func, backend="aot_eager")
    emb = EMB.float().requires_grad_()
    results = []
    for f in (loss_func, compiled):
        value = f(emb.repeat(40, 1), LABELS.repeat(40))
        results.append((value, *torch.autograd.grad(value, [emb, loss_func.proxies])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_no_overflow():
    loss_func = make(dtype=torch.float32, alpha=5000)
    emb = EMB.float().requires_grad_()
    loss = loss_func(emb, LABELS)
    loss.backward()
    assert loss.isfinite()
    assert emb.grad.isfinite().all()
    assert loss_func.proxies.grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_proxies_keep_their_dtype(half):
    """PML casts them to the embeddings' dtype, and the optimizer fails at its next step."""
    loss_func = make(dtype=torch.float32)
    optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
    for emb in (EMB.float(), EMB.to(half), EMB.float()):
        optimizer.zero_grad()
        loss = loss_func(emb, LABELS)
        loss.backward()
        optimizer.step()
        assert loss.dtype == loss_func.proxies.dtype == loss_func.proxies.grad.dtype == torch.float32


def test_mixed_precision_of_embeddings_and_proxies():
    """The wider dtype is used; the parameter keeps its own."""
    wide = make()(EMB, LABELS)
    for emb_dtype, proxy_dtype in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        loss_func = make(dtype=proxy_dtype)
        torch.testing.assert_close(loss_func(EMB.to(emb_dtype), LABELS).double(), wide, rtol=1e-5, atol=0)
        assert loss_func.proxies.dtype == proxy_dtype
        assert loss_func.get_logits(EMB.to(emb_dtype)).dtype == torch.float64
    half_proxies = make(dtype=torch.bfloat16)
    assert half_proxies(EMB.float(), LABELS).dtype == torch.float32
    assert half_proxies.proxies.dtype == torch.bfloat16


def test_class_weights_belong_to_proxies():
    """PML looks the class of proxy c up in labels[c]: dependent on the order of the batch, or an IndexError."""
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    loss_func = make(reducer=ClassWeightedReducer(weights))
    each = make(reducer=DoNothingReducer())(EMB, LABELS)
    expected = sum((each[name]["losses"] * weights).mean() for name in ("pos_loss", "neg_loss"))
    torch.testing.assert_close(loss_func(EMB, LABELS), expected)
    order = torch.randperm(9)
    torch.testing.assert_close(loss_func(EMB[order], LABELS[order]), expected)


def test_numpy_sizes_are_accepted():
    assert ProxyAnchorLoss(LABELS.numpy().max() + 1, SIZE).proxies.shape == (6, SIZE)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_logits_are_full_precision_under_autocast(half):
    loss_func = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = loss_func.get_logits(EMB.to(half))
    assert torch.equal(logits, loss_func.get_logits(EMB.to(half).float()))


def test_reducer_and_weight_regularizer():
    plain, mean = make(), make(reducer=MeanReducer())
    each = make(reducer=DoNothingReducer())(EMB, LABELS)
    torch.testing.assert_close(mean(EMB, LABELS), each["pos_loss"]["losses"].mean() + each["neg_loss"]["losses"].mean())
    regularized = make(weight_regularizer=LpRegularizer(), weight_reg_weight=0.5)
    expected = plain(EMB, LABELS) + 0.5 * PROXIES.norm(dim=1).mean()
    torch.testing.assert_close(regularized(EMB, LABELS), expected)
    by_both, by_loss = (torch.autograd.grad(f(EMB, LABELS), f.proxies)[0] for f in (regularized, plain))
    unit = PROXIES / PROXIES.norm(dim=1, keepdim=True)
    torch.testing.assert_close(by_both - by_loss, 0.5 * unit / NUM_CLASSES)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 5), "num_classes must be an integer >= 1, got 0"),
        ((5, 0), "embedding_size must be an integer >= 1, got 0"),
        ((4.5, 5), r"num_classes must be an integer >= 1, got 4\.5"),
        ((5, 5, 0.1, 0), "alpha must be > 0 and finite, got 0"),
        ((5, 5, float("nan")), "margin must be finite, got nan"),
        ((5, 5, 0.1, 32, 0), "chunk_size must be None or an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        ProxyAnchorLoss(*args)


def test_bad_input():
    loss_func = make()
    with pytest.raises(ValueError, match="labels are required"):
        loss_func(EMB)
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        loss_func(EMB, LABELS, ref_emb=EMB + 1, ref_labels=LABELS)
    with pytest.raises(ValueError, match=r"shape \(batch_size, embedding_size\) = \(9, 5\), got \(9, 4\)"):
        loss_func.get_logits(EMB[:, :4])


def test_dense_gradient_penalty_is_finite():
    """Embeddings near proxies that are far apart: nothing is left of most sums."""
    loss_func = ProxyAnchorLoss(4, 16, distance=LpDistance(normalize_embeddings=False))
    with torch.no_grad():
        loss_func.proxies.copy_(10 * torch.eye(4, 16))
    emb = (10 * torch.eye(4, 16).repeat(5, 1) + 0.1 * torch.randn(20, 16)).requires_grad_()
    (grad,) = torch.autograd.grad(loss_func(emb, torch.arange(4).repeat(5)), emb, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), emb)
    assert grad.any()
    assert second.isfinite().all()


def test_dense_refuses_wrong_labels_without_validation(without_validation):
    loss_func = ProxyAnchorLoss(4, 8, distance=LpDistance())
    for labels in (torch.tensor([0, 4]), torch.tensor([0, -1])):
        with pytest.raises((RuntimeError, IndexError)):
            loss_func(torch.randn(2, 8), labels)


WEIGHTED = torch.tensor([0, 2, 6, 6]), torch.tensor([1, 3, 5, 5]), torch.tensor([2, 8, 8, 3])  # 4 and 7 are not named


@pytest.mark.parametrize("miner_output", [WEIGHTED, (*WEIGHTED[:2], *WEIGHTED[::2])], ids=["triplets", "pairs"])
@pytest.mark.parametrize("distance", [CosineSimilarity(), LpDistance()], ids=["streamed", "dense"])
def test_tuple_weights_as_a_factor(distance, miner_output):
    """As PML 3 has them: exponentials times the share, rows of share 0 left out."""
    loss_func = ProxyAnchorLoss(NUM_CLASSES, SIZE, tuple_weights="factor", distance=distance).double()
    counts = np.bincount(torch.cat(miner_output).numpy(), minlength=len(EMB))
    w, labels = counts / counts.max(), LABELS.numpy()
    assert set(np.flatnonzero(w == 0)) == {4, 7}
    matrix = distance(EMB, loss_func.proxies).detach().numpy()
    s, margin = (matrix, 0.1) if distance.is_inverted else (-matrix, -0.1)
    own = labels[:, None] == np.arange(NUM_CLASSES)
    pos = np.log1p((np.exp(-32 * (s - margin)) * own * w[:, None]).sum(0)).sum() / len(set(labels[w > 0]))
    neg = np.log1p((np.exp(32 * (s + margin)) * ~own * w[:, None]).sum(0)).sum() / NUM_CLASSES
    assert loss_func(EMB, LABELS, miner_output).item() == pytest.approx(pos + neg, rel=1e-9)


def test_rows_that_nothing_names_are_left_out():
    """Equal shares: the loss of these rows alone. PML 2.9 counts the others 1 / e, and so does the default."""
    rows = torch.tensor([0, 1, 2, 3, 5, 6])
    pairs = rows[0::2], rows[1::2], rows[0::2], rows[1::2]
    emb = EMB.clone().requires_grad_()
    torch.manual_seed(0)
    factor = ProxyAnchorLoss(NUM_CLASSES, SIZE, tuple_weights="factor").double()
    loss = factor(emb, LABELS, pairs)
    torch.testing.assert_close(loss, factor(EMB[rows], LABELS[rows]))
    (grad,) = torch.autograd.grad(loss, emb)
    assert set(grad.any(1).nonzero().flatten().tolist()) == set(rows.tolist())
    default, theirs = ProxyAnchorLoss(NUM_CLASSES, SIZE).double(), losses.ProxyAnchorLoss(NUM_CLASSES, SIZE).double()
    theirs.load_state_dict(default.state_dict())
    torch.testing.assert_close(default(EMB, LABELS, pairs), theirs(EMB, LABELS, pairs))
    default.load_state_dict(factor.state_dict())
    assert default(EMB, LABELS, pairs) != loss
    torch.testing.assert_close(factor(EMB, LABELS, (rows[:0],) * 3), factor(EMB, LABELS))  # nothing mined: all count
    with pytest.raises(ValueError, match="tuple_weights must be one of exponent, factor, got 'w'"):
        ProxyAnchorLoss(NUM_CLASSES, SIZE, tuple_weights="w")


def test_learned_scale_and_margin():
    """PML's gradients, by embeddings, proxies, scale and margin; numbers that are set later count too."""
    ours, theirs = (cls(NUM_CLASSES, SIZE).double() for cls in (ProxyAnchorLoss, losses.ProxyAnchorLoss))
    theirs.load_state_dict(ours.state_dict())
    for loss_func in (ours, theirs):
        for name, value in (("alpha", 24.0), ("margin", 0.2)):
            setattr(loss_func, name, torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)))
    emb, pairs = EMB.clone().requires_grad_(), miners.MultiSimilarityMiner()(EMB, LABELS)
    for indices_tuple in (None, pairs):
        by_ours, by_theirs = (
            torch.autograd.grad(f(emb, LABELS, indices_tuple), (emb, f.proxies, f.alpha, f.margin))
            for f in (ours, theirs)
        )
        assert all(grad.any() for grad in by_ours)
        torch.testing.assert_close(by_ours, by_theirs)


def test_learned_scale_is_not_drawn_afresh_for_each_learner():
    loss = ProxyAnchorLoss(NUM_CLASSES, SIZE, alpha=torch.nn.Parameter(torch.tensor(20.0)))
    ensemble = EnsembleLoss(loss, 2)
    assert [child.alpha.item() for child in ensemble.losses.values()] == [20.0, 20.0]
    assert not torch.equal(*(child.proxies for child in ensemble.losses.values()))


@pytest.mark.compiles
@pytest.mark.parametrize("make", [ProxyAnchorLoss, HybridLoss])
def test_one_graph_for_all_batch_sizes(make):
    assert graphs_of_batches(make(8, 8), (12, 16, 9)) == [1, 1, 1]
