import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.regularizers import LpRegularizer

from pml_ext.losses import ContrastiveLoss
from tests.largest_tensor import LargestTensor

EMB = 0.5 * torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = 0.5 * torch.randn(28, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(6, (30,), generator=torch.Generator().manual_seed(2))
REF_LABELS = torch.randint(7, (28,), generator=torch.Generator().manual_seed(3))
DISTANCES = {
    "Euclidean, unit": (LpDistance(), 0.1, 0.9),
    "squared, unit": (LpDistance(power=2), 0.1, 0.9),
    "Euclidean": (LpDistance(normalize_embeddings=False), 0.3, 1.2),
    "squared": (LpDistance(normalize_embeddings=False, power=2), 0.3, 1.2),
    "cosine": (CosineSimilarity(), 0.8, 0.1),
    "dot": (DotProductSimilarity(normalize_embeddings=False), 0.3, -0.1),
    "another": (LpDistance(p=1), 0.2, 1.0),
}


def reference(x, y, pos_margin, neg_margin):
    """The equation with loops; shares no code with the package and uses no torch."""
    x, pos, neg = x / np.linalg.norm(x, axis=1, keepdims=True), [], []
    for i in range(len(x)):
        for j in range(len(x)):
            distance = np.linalg.norm(x[i] - x[j])
            if i != j and y[i] == y[j]:
                pos.append(max(0, distance - pos_margin))
            elif i != j:
                neg.append(max(0, neg_margin - distance))
    return sum(np.mean([loss for loss in part if loss > 0]) for part in (pos, neg))


def is_streamed(loss_func, *args):
    """Whether a loss forms no matrix of all pairs."""
    with LargestTensor() as largest:
        loss_func(*args)
    return largest.numel < 30 * 28


@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.4, 1.3)])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_reference(margins, chunk_size, dtype, tol, device):
    expected = reference(EMB.to(dtype).double().numpy(), LABELS.numpy(), *margins)
    loss_func = ContrastiveLoss(*margins, chunk_size=chunk_size)
    assert loss_func(EMB.to(device, dtype), LABELS).item() == pytest.approx(expected, rel=tol)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_hand_computed(chunk_size):
    """Cosines of 0.6 to the positive, 0 and 0.8 to the negative; only the latter is within the margin."""
    emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    pos, neg = 0.8**0.5 - 0.5, 1 - 0.4**0.5  # |x - y|^2 = 2 - 2 cos
    actual = ContrastiveLoss(0.5, 1.0, chunk_size=chunk_size)(emb, torch.tensor([4, 4, 1]))
    assert actual.item() == pytest.approx(pos + neg, rel=1e-6)


@pytest.mark.parametrize(("distance", "pos_margin", "neg_margin"), DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.TripletMarginMiner()])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("reducer", [AvgNonZeroReducer(), MeanReducer(), SumReducer(), ThresholdReducer(low=0.1)])
@pytest.mark.parametrize("chunk_size", [None, 7, 100])
def test_is_pml_loss(distance, pos_margin, neg_margin, miner, with_ref, reducer, chunk_size):
    emb = EMB.clone().requires_grad_()
    refs = {"ref_emb": REF.clone().requires_grad_(), "ref_labels": REF_LABELS} if with_ref else {}
    mined = None if miner is None else miner(emb, LABELS, **refs)
    leaves = [emb, *([refs["ref_emb"]] if with_ref else [])]
    settings = {"pos_margin": pos_margin, "neg_margin": neg_margin, "distance": distance, "reducer": reducer}
    ours = ContrastiveLoss(chunk_size=chunk_size, **settings)(emb, LABELS, mined, **refs)
    theirs = losses.ContrastiveLoss(**settings)(emb, LABELS, mined, **refs)
    assert theirs > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", DISTANCES)
def test_which_distances_are_streamed(name):
    distance, *margins = DISTANCES[name]
    loss_func = ContrastiveLoss(*margins, chunk_size=7, distance=distance)
    assert is_streamed(loss_func, EMB, LABELS) == (name != "another")


def test_which_reducers_are_streamed():
    def streamed(reducer, **kwargs):
        return is_streamed(ContrastiveLoss(chunk_size=7, reducer=reducer, **kwargs), EMB, LABELS)

    class Mine(MeanReducer):
        pass

    raised = AvgNonZeroReducer()
    raised.low = 0.1
    each = {"pos_loss": SumReducer(), "neg_loss": MeanReducer()}
    assert streamed(None)
    assert streamed(MultipleReducers(each))
    assert streamed(None, embedding_regularizer=LpRegularizer())
    others = Mine(), raised, DoNothingReducer(), ThresholdReducer(low=0), AvgNonZeroReducer(collect_stats=True)
    assert not any(streamed(reducer) for reducer in others)
    assert not streamed(MultipleReducers(each | {"neg_loss": ThresholdReducer(low=0.1)}))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_reducer_for_each_and_a_regularizer(chunk_size):
    emb = EMB.clone().requires_grad_()
    ours, theirs = (
        loss_func(
            reducer=MultipleReducers({"pos_loss": SumReducer(), "neg_loss": MeanReducer()}),
            embedding_regularizer=LpRegularizer(),
            embedding_reg_weight=0.3,
            **kwargs,
        )(emb, LABELS)
        for loss_func, kwargs in ((ContrastiveLoss, {"chunk_size": chunk_size}), (losses.ContrastiveLoss, {}))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, emb), torch.autograd.grad(theirs, emb), rtol=1e-10, atol=1e-11)


def test_reducers_see_the_pairs_of_pml():
    """The same losses at the same indices in the same order."""
    ours, theirs = (
        loss_func(reducer=DoNothingReducer())(EMB, LABELS) for loss_func in (ContrastiveLoss, losses.ContrastiveLoss)
    )
    assert [*ours] == [*theirs] == ["pos_loss", "neg_loss"]
    for name, theirs_of in theirs.items():
        assert ours[name]["reduction_type"] == theirs_of["reduction_type"]
        assert all(torch.equal(a, b) for a, b in zip(ours[name]["indices"], theirs_of["indices"], strict=True))
        torch.testing.assert_close(ours[name]["losses"], theirs_of["losses"])


@pytest.mark.parametrize("reducer", [AvgNonZeroReducer, MeanReducer, SumReducer])
@pytest.mark.parametrize(
    "labels", [torch.zeros(30, dtype=torch.long), torch.arange(30)], ids=["one class", "all alone"]
)
@pytest.mark.parametrize("with_ref", [False, True])
def test_without_positives_or_negatives_as_pml(reducer, labels, with_ref):
    emb = EMB.clone().requires_grad_()
    refs = {"ref_emb": REF, "ref_labels": labels[:28] if labels.max() == 0 else labels[:28] + 30} if with_ref else {}
    ours = ContrastiveLoss(chunk_size=7, reducer=reducer())(emb, labels, **refs)
    theirs = losses.ContrastiveLoss(reducer=reducer())(emb, labels, **refs)
    assert theirs > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, emb), torch.autograd.grad(theirs, emb), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_nothing_within_the_margins_has_a_gradient_of_zeros(chunk_size):
    emb = EMB.clone().requires_grad_()
    loss = ContrastiveLoss(2.0, 0.0, chunk_size=chunk_size)(emb, LABELS)
    assert loss == losses.ContrastiveLoss(2.0, 0.0)(EMB, LABELS) == 0
    (grad,) = torch.autograd.grad(loss, emb)
    assert not grad.any()


def clusters(noise):
    """Return rows around few centers, many of another label nearby, and their exact loss, float64, with gradient."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 16, generator=rng, dtype=torch.float64).repeat(12, 1)
    emb = (centers + noise * torch.randn(120, 16, generator=rng, dtype=torch.float64)).float()
    labels = torch.randint(40, (120,), generator=rng)
    wide = emb.double().requires_grad_()
    unit = torch.nn.functional.normalize(wide)
    square = (unit[:, None] - unit).square().sum(2)
    distance = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    same = labels[:, None] == labels
    pos, neg = distance[same & ~torch.eye(120, dtype=torch.bool)], (1 - distance[~same]).relu()
    loss = sum(x.sum() / (x > 0).sum().clamp_min(1) for x in (pos, neg))
    return emb, labels, loss.detach(), torch.autograd.grad(loss, wide)[0]


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.03, 0.01, 1e-3, 0.0])
def test_pairs_that_are_near_are_exact(noise):
    """In float32, where products cancel: PML's distance of copies is up to 1e-3 and counts, in tiles it is 0."""
    emb, labels, value, grad = clusters(noise)
    emb.requires_grad_()
    loss = ContrastiveLoss(chunk_size=50)(emb, labels)
    (actual,) = torch.autograd.grad(loss, emb)
    assert loss.item() == pytest.approx(value.item(), abs=1e-6)
    assert (actual - grad).norm() < 1e-4 * grad.norm()
    if noise == 1e-3:
        (theirs,) = torch.autograd.grad(losses.ContrastiveLoss()(emb, labels), emb)
        assert (theirs - grad).norm() > 1e-3 * grad.norm()  # or there is no difference to state


def test_float32_is_near_float64():
    loss_func = ContrastiveLoss(chunk_size=7)
    narrow, wide = (EMB.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    values = [loss_func(x, LABELS) for x in (narrow, wide)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-6)
    grads = [torch.autograd.grad(v, x)[0] for v, x in zip(values, (narrow, wide), strict=True)]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "distance", [LpDistance(), LpDistance(power=2, normalize_embeddings=False), CosineSimilarity()]
)
def test_gradcheck(distance):
    inputs = EMB[:12].clone().requires_grad_(), REF[:9].clone().requires_grad_()
    loss_func = ContrastiveLoss(0.11, 0.93, 5, distance=distance)
    assert torch.autograd.gradcheck(lambda x, r: loss_func(x, LABELS[:12], None, r, REF_LABELS[:9]), inputs)
    assert torch.autograd.gradcheck(lambda x: loss_func(x, LABELS[:12]), inputs[0])


def test_second_derivatives_are_refused_in_tiles():
    emb = EMB.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ContrastiveLoss(chunk_size=7)(emb, LABELS), emb, create_graph=True)
    with pytest.raises(NotImplementedError, match="Contrastive is streamed and has no second derivatives"):
        torch.autograd.grad(grad.sum(), emb)


def test_two_backwards_through_one_graph():
    emb = EMB.clone().requires_grad_()
    loss = ContrastiveLoss(chunk_size=7)(emb, LABELS)
    once, twice = (torch.autograd.grad(loss, emb, retain_graph=True)[0] for _ in range(2))
    assert once.any()
    assert torch.equal(once, twice)


def test_without_gradients_none_are_made():
    """A batch in a memory of references: nothing as large as them."""
    refs = REF.repeat(40, 1).requires_grad_()
    with torch.no_grad(), LargestTensor() as largest:
        loss = ContrastiveLoss(chunk_size=7)(EMB, LABELS, None, refs, REF_LABELS.repeat(40))
    assert loss > 0
    assert largest.numel < refs.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_references_get_half_gradients(dtype):
    emb, refs = EMB.float().requires_grad_(), REF.to(dtype).requires_grad_()
    wide = refs.detach().float().requires_grad_()
    loss_func = ContrastiveLoss(chunk_size=7)
    actual, expected = (loss_func(emb, LABELS, None, x, REF_LABELS) for x in (refs, wide))
    torch.testing.assert_close(actual, expected)
    (grad,), (e,) = torch.autograd.grad(actual, refs), torch.autograd.grad(expected, wide)
    assert grad.dtype == dtype
    assert e.any()
    torch.testing.assert_close(grad.float(), e, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["pos_margin", "neg_margin"])
def test_a_margin_that_is_learned(name):
    margins = {"pos_margin": 0.3, "neg_margin": 0.9}
    loss_func = ContrastiveLoss(**margins, chunk_size=7)
    margin = torch.nn.Parameter(torch.tensor(margins[name], dtype=torch.float64))
    setattr(loss_func, name, margin)
    (grad,) = torch.autograd.grad(loss_func(EMB, LABELS), margin)
    values = [ContrastiveLoss(**margins | {name: margins[name] + d})(EMB, LABELS).item() for d in (1e-6, -1e-6)]
    assert grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_one_pair_is_not_lost():
    """PML gives 0."""
    pair = tuple(torch.tensor([i]) for i in (0, 1, 0, 2))
    twice = tuple(torch.cat([i, i]) for i in pair)
    assert losses.ContrastiveLoss()(EMB, LABELS, pair) == 0
    expected = losses.ContrastiveLoss()(EMB, LABELS, twice)
    assert expected > 0
    torch.testing.assert_close(ContrastiveLoss()(EMB, LABELS, pair), expected)


@pytest.mark.parametrize("name", ["pos_margin", "neg_margin"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        ContrastiveLoss(**{name: float("nan")})
    with pytest.raises(ValueError, match="chunk_size must be None or an integer >= 1, got 0"):
        ContrastiveLoss(chunk_size=0)
    with pytest.raises(ValueError, match="labels or indices_tuple must be given, got None for both"):
        ContrastiveLoss()(EMB)


def test_several_gradients_in_one_backward_of_tiles():
    emb = EMB.clone().requires_grad_()
    loss, upstream = ContrastiveLoss(chunk_size=4)(emb, LABELS), torch.tensor([1.0, -2.0], dtype=torch.float64)
    (both,) = torch.autograd.grad(loss, emb, upstream, retain_graph=True, is_grads_batched=True)
    for grad, factor in zip(both, upstream, strict=True):
        (expected,) = torch.autograd.grad(loss, emb, factor, retain_graph=True)
        assert expected.any()
        torch.testing.assert_close(grad, expected)
