import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.reducers import DoNothingReducer, MeanReducer, MultipleReducers, SumReducer
from pytorch_metric_learning.regularizers import LpRegularizer

from benchmarks import hybrid_defaults
from pml_ext.losses import CrossBatchMemory, HybridLoss, MultiSimilarityLoss, ProxyAnchorLoss
from tests.pml_internals import c_f

NUM_CLASSES, SIZE = 6, 5
EMB = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = torch.randn(7, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([5, 5, 2, 2, 2, 0, 0, 5, 3])
REF_LABELS = torch.tensor([5, 2, 0, 0, 5, 3, 1])


def make(**kwargs):
    return HybridLoss(NUM_CLASSES, SIZE, **kwargs).double()


def reference(x, y, proxies, sign):
    """MHGL's Eq. 5 to 7 with the paper's numbers, with loops; shares no code with the package and uses no torch."""

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    n, k = len(x), len(proxies)
    ms = pa_pos = pa_neg = 0.0
    for i in range(n):
        pos = sum(math.exp(-2 * (cos(x[i], x[j]) - 1)) for j in range(n) if j != i and y[j] == y[i])
        neg = sum(math.exp(50 * (cos(x[i], x[j]) + sign * 1)) for j in range(n) if y[j] != y[i])
        ms += (math.log(1 + pos) / 2 + math.log(1 + neg) / 50) / n
    for c in range(k):
        pa_pos += math.log(1 + sum(math.exp(-32 * (cos(x[i], proxies[c]) - 0.1)) for i in range(n) if y[i] == c))
        pa_neg += math.log(1 + sum(math.exp(32 * (cos(x[i], proxies[c]) + 0.1)) for i in range(n) if y[i] != c))
    return ms + 0.03 * (pa_pos / len(set(y)) + pa_neg / k)


@pytest.mark.parametrize(("negative_sign", "sign"), [("minus", -1), ("printed", 1)])
def test_paper_matches_reference(negative_sign, sign, device):
    loss_func = HybridLoss.paper(NUM_CLASSES, SIZE, negative_sign=negative_sign).double().to(device)
    proxies = loss_func.proxy_loss.proxies.detach().cpu().numpy()
    expected = reference(EMB.numpy(), LABELS.numpy(), proxies, sign)
    assert loss_func(EMB.to(device), LABELS).item() == pytest.approx(expected, rel=1e-9)


def test_paper_draws_proxies_from_a_normal_distribution():
    proxies = HybridLoss.paper(500, 100).proxy_loss.proxies
    assert proxies.std().item() == pytest.approx(1, abs=0.02)
    assert HybridLoss(500, 100).proxy_loss.proxies.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)


def test_hand_computed():
    """Two samples of one class at cosine 0, no negative pair; proxies on the axes."""
    loss_func = HybridLoss(
        pair_loss=MultiSimilarityLoss(alpha=1, base=0.0), proxy_loss=ProxyAnchorLoss(2, 2, alpha=1), proxy_weight=0.5
    )
    torch.nn.init.eye_(loss_func.proxy_loss.proxies)
    pair = math.log(1 + math.exp(0))
    pos = math.log(1 + math.exp(-0.9) + math.exp(0.1))
    neg = math.log(1 + math.exp(0.1) + math.exp(1.1))
    expected = pair + 0.5 * (pos + neg / 2)
    assert loss_func(torch.eye(2), torch.tensor([0, 0])).item() == pytest.approx(expected, rel=1e-6)


def test_gradcheck():
    loss_func = make(pair_loss=MultiSimilarityLoss(beta=5))
    assert torch.autograd.gradcheck(lambda emb: loss_func(emb, LABELS), EMB.clone().requires_grad_())


@pytest.mark.parametrize("weights", [(1.0, 0.03), (0.0, 1.0), (2.0, 0.0), (0.5, 3.0)])
@pytest.mark.parametrize("with_miner", [False, True])
def test_is_weighted_sum_of_children(weights, with_miner):
    """And of PML's MultipleLosses, which can have no reference, reducer or wrapper of its own."""
    loss_func = make(pair_loss=losses.MultiSimilarityLoss(), pair_weight=weights[0], proxy_weight=weights[1])
    indices_tuple = miners.MultiSimilarityMiner()(EMB, LABELS) if with_miner else None
    pair = loss_func.pair_loss(EMB, LABELS, indices_tuple)
    proxy = loss_func.proxy_loss(EMB, LABELS)
    assert pair > 0
    assert proxy > 0
    torch.testing.assert_close(loss_func(EMB, LABELS, indices_tuple), weights[0] * pair + weights[1] * proxy)
    both = losses.MultipleLosses([loss_func.pair_loss, loss_func.proxy_loss], weights=list(weights))
    if not with_miner:
        torch.testing.assert_close(loss_func(EMB, LABELS), both(EMB, LABELS))


def test_tuple_reference_and_miner_reach_the_pair_part_alone():
    loss_func = make(proxy_weight=2.0)
    proxy = 2 * loss_func.proxy_loss(EMB, LABELS)
    mined = miners.BatchHardMiner()(EMB, LABELS)
    torch.testing.assert_close(loss_func(EMB, LABELS, mined), loss_func.pair_loss(EMB, LABELS, mined) + proxy)
    with_ref = loss_func(EMB, LABELS, ref_emb=REF, ref_labels=REF_LABELS)
    torch.testing.assert_close(with_ref, loss_func.pair_loss(EMB, LABELS, None, REF, REF_LABELS) + proxy)
    assert not torch.isclose(with_ref, loss_func(EMB, LABELS))
    with_miner = make(proxy_weight=2.0, miner=miners.BatchHardMiner())
    with_miner.load_state_dict(loss_func.state_dict())
    torch.testing.assert_close(with_miner(EMB, LABELS), loss_func(EMB, LABELS, mined))
    other = miners.MultiSimilarityMiner()(EMB, LABELS)  # an explicit tuple overrides the miner
    torch.testing.assert_close(with_miner(EMB, LABELS, other), loss_func(EMB, LABELS, other))
    mined_in_ref = miners.BatchHardMiner()(EMB, LABELS, REF, REF_LABELS)
    torch.testing.assert_close(
        with_miner(EMB, LABELS, ref_emb=REF, ref_labels=REF_LABELS),
        loss_func(EMB, LABELS, mined_in_ref, REF, REF_LABELS),
    )


def test_two_views_with_the_same_labels_object():
    """A pair loss of PML's in the hybrid keeps the pairs (i, i) too."""
    values = [
        make(pair_loss=pair_loss, proxy_weight=0.0)(EMB, LABELS, ref_emb=EMB.flip(1), ref_labels=LABELS)
        for pair_loss in (losses.MultiSimilarityLoss(), MultiSimilarityLoss())
    ]
    torch.testing.assert_close(*values)


def test_children_keep_reducers_and_regularizers():
    pair_loss = MultiSimilarityLoss(reducer=SumReducer(), embedding_regularizer=LpRegularizer())
    loss_func = make(pair_loss=pair_loss, pair_weight=1.0, proxy_weight=0.0)
    expected = 9 * MultiSimilarityLoss()(EMB, LABELS) + EMB.norm(dim=1).mean()
    torch.testing.assert_close(loss_func(EMB, LABELS), expected)


def test_keywords_reach_the_default_children():
    loss_func = make(
        weight_init_func=c_f.TorchInitWrapper(torch.nn.init.ones_),
        weight_regularizer=LpRegularizer(),
        weight_reg_weight=3.0,
        distance=DotProductSimilarity(normalize_embeddings=False),
    )
    assert torch.equal(loss_func.proxy_loss.proxies, torch.ones(NUM_CLASSES, SIZE))
    assert loss_func.proxy_loss.weight_reg_weight == 3.0
    assert "weight_reg_loss" in loss_func.proxy_loss.sub_loss_names()
    assert type(loss_func.pair_loss.distance) is type(loss_func.proxy_loss.distance) is DotProductSimilarity


def test_defaults():
    """The row that benchmarks/hybrid_defaults.py and docs/benchmarks.md call the default."""
    loss_func = make()
    expected = MultiSimilarityLoss(base=0.5)(EMB, LABELS) + 0.03 * loss_func.proxy_loss(EMB, LABELS)
    torch.testing.assert_close(loss_func(EMB, LABELS), expected)
    assert hybrid_defaults.DEFAULT == "MS(0.5) + 0.03 PA"


def test_paper_passes_keywords_on():
    distance = DotProductSimilarity()
    loss_func = HybridLoss.paper(NUM_CLASSES, SIZE, distance=distance, miner=miners.BatchHardMiner())
    assert loss_func.pair_loss.distance is loss_func.proxy_loss.distance is distance
    assert loss_func.proxy_weight == 0.03
    custom = HybridLoss.paper(NUM_CLASSES, SIZE, proxy_loss=losses.CosFaceLoss(NUM_CLASSES, SIZE))
    assert type(custom.proxy_loss) is losses.CosFaceLoss


@pytest.mark.parametrize(
    "loss_class",
    [
        losses.ArcFaceLoss,
        losses.CosFaceLoss,
        losses.NormalizedSoftmaxLoss,
        losses.ProxyAnchorLoss,
        losses.ProxyNCALoss,
        losses.SoftTripleLoss,
        losses.SubCenterArcFaceLoss,
    ],
)
def test_proxy_losses_of_pml(loss_class):
    """Some of them carry a num_classes or embedding_size of 0."""
    proxy_loss = loss_class(num_classes=NUM_CLASSES, embedding_size=SIZE)
    loss_func = HybridLoss(NUM_CLASSES, SIZE, proxy_loss=proxy_loss, proxy_weight=0.5)
    expected = loss_func.pair_loss(EMB.float(), LABELS) + 0.5 * proxy_loss(EMB.float(), LABELS)
    torch.testing.assert_close(loss_func(EMB.float(), LABELS), expected)
    torch.testing.assert_close(HybridLoss(proxy_loss=proxy_loss, proxy_weight=0.5)(EMB.float(), LABELS), expected)


def test_paper_numbers_are_fixed():
    with pytest.raises(ValueError, match="pair_loss, proxy_weight must not be given, the paper fixes them"):
        HybridLoss.paper(NUM_CLASSES, SIZE, proxy_weight=0.1, pair_loss=MultiSimilarityLoss())


def test_what_the_miner_returns_is_checked():
    def miner(*_):
        return (torch.tensor([0]), torch.tensor([1]), torch.tensor([-1]))

    with pytest.raises(ValueError, match=r"indices_tuple\[2\] must be >= 0, got -1"):
        make(miner=miner)(EMB, LABELS)


def test_sub_losses_stats_and_repr():
    each = make(reducer=DoNothingReducer(), proxy_weight=2.0)
    terms = each(EMB, LABELS)
    assert set(terms) == {"pair_loss", "proxy_loss"}
    torch.testing.assert_close(terms["proxy_loss"]["losses"], 2 * each.proxy_loss(EMB, LABELS))
    recording = make(collect_stats=True)
    recording(EMB, LABELS)
    assert recording.pair_loss_value == pytest.approx(recording.pair_loss(EMB, LABELS).item())
    assert recording.proxy_loss_value == pytest.approx(recording.proxy_loss(EMB, LABELS).item())
    text = repr(make(pair_weight=0.5, proxy_weight=0.25))
    for setting in ("pair_weight=0.5", "proxy_weight=0.25", "beta=50", "num_classes=6", "margin=0.1"):
        assert setting in text
    assert "negative_sign='printed'" in repr(HybridLoss.paper(NUM_CLASSES, SIZE, negative_sign="printed"))


class HalvingReducer(MeanReducer):
    def already_reduced_reduction(self, losses, *args):
        return losses / 2


def test_plain_reducers_are_left_out_where_they_only_add(monkeypatch):
    """PML's reducers give the same digits by four times the calls; any other one is called."""
    weights = {"embedding_regularizer": LpRegularizer(), "proxy_weight": 0.7}
    loss_func = make(weight_regularizer=LpRegularizer(), **weights)
    halved = make(reducer=HalvingReducer(), **weights)
    halved.load_state_dict(loss_func.state_dict())
    recording = make(reducer=MeanReducer(collect_stats=True))
    recording(EMB, LABELS)
    assert recording.reducer.reducers["pair_loss"].losses_size == 1
    grads, calls = [], []
    called = MultipleReducers.forward
    monkeypatch.setattr(MultipleReducers, "forward", lambda *args: calls.append(args) or called(*args))
    for expected_calls in (0, 2):  # the hybrid's own and the proxy loss's
        emb = EMB.clone().requires_grad_()
        value = loss_func(emb, LABELS)
        assert len(calls) == expected_calls
        grads.append((value.detach(), *torch.autograd.grad(value, (emb, loss_func.proxy_loss.proxies))))
        monkeypatch.setattr(HybridLoss, "_sum_of_reduced", lambda *_: None)
        monkeypatch.setattr(ProxyAnchorLoss, "_sum_of_reduced", lambda *_: None)
    for actual, expected in zip(*grads, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-16)
    monkeypatch.undo()
    terms = make(reducer=DoNothingReducer(), **weights)
    terms.load_state_dict(loss_func.state_dict())
    total = sum(x["losses"] for x in terms(EMB, LABELS).values())
    torch.testing.assert_close(halved(EMB, LABELS), total / 2)


def test_get_logits():
    loss_func = make()
    expected = torch.nn.functional.normalize(EMB) @ torch.nn.functional.normalize(loss_func.proxy_loss.proxies).T
    torch.testing.assert_close(loss_func.get_logits(EMB), expected)
    theirs = HybridLoss(proxy_loss=losses.ProxyAnchorLoss(NUM_CLASSES, SIZE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = theirs.get_logits(EMB.bfloat16())
    assert logits.dtype == theirs.proxy_loss.proxies.dtype == torch.float32
    assert torch.equal(logits, theirs.get_logits(EMB.bfloat16().float()))
    with pytest.raises(TypeError, match="proxy_loss must define get_logits; ContrastiveLoss does not"):
        HybridLoss(proxy_loss=losses.ContrastiveLoss()).get_logits(EMB)


def test_pml_proxies_are_not_cast_by_half_embeddings():
    """PML's loss casts its proxies to what it is given: the hybrid hands it float32."""
    loss_func = HybridLoss(proxy_loss=losses.ProxyAnchorLoss(NUM_CLASSES, SIZE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_func(EMB.bfloat16(), LABELS).backward()
    assert loss_func.proxy_loss.proxies.dtype == torch.float32


def test_sizes_are_needed_for_the_default_proxy_loss_alone():
    HybridLoss(proxy_loss=losses.CosFaceLoss(NUM_CLASSES, SIZE))
    with pytest.raises(ValueError, match=r"default proxy_loss.*got num_classes=None, embedding_size=5"):
        HybridLoss(embedding_size=SIZE)
    with pytest.raises(ValueError, match="num_classes must agree"):
        HybridLoss(7, SIZE, proxy_loss=ProxyAnchorLoss(NUM_CLASSES, SIZE))
    with pytest.raises(ValueError, match="embedding_size must agree"):
        HybridLoss(NUM_CLASSES, 7, proxy_loss=ProxyAnchorLoss(NUM_CLASSES, SIZE))
    custom = HybridLoss(NUM_CLASSES, SIZE, proxy_loss=losses.CosFaceLoss(NUM_CLASSES, SIZE))
    with pytest.raises(ValueError, match=r"embeddings must have shape .* = \(9, 5\), got \(9, 4\)"):
        custom(EMB[:, :4], LABELS)


def test_losses_in_place_of_sizes():
    with pytest.raises(
        TypeError, match=r"num_classes must be .* got a Multi.*: HybridLoss\(pair_loss=\.\.\., proxy_loss"
    ):
        HybridLoss(MultiSimilarityLoss(), ProxyAnchorLoss(3, 2))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"pair_weight": -1}, ValueError, "pair_weight must be >= 0 and finite, got -1"),
        ({"proxy_weight": float("nan")}, ValueError, "proxy_weight must be >= 0 and finite, got nan"),
        ({"miner": 3}, TypeError, "miner must be callable, got int"),
        (
            {"miner": miners.BatchHardMiner},
            TypeError,
            r"miner must be an object, .*class BatchHardMiner: BatchHardMiner\(\)",
        ),
        ({"pair_loss": MultiSimilarityLoss}, TypeError, "pair_loss must be .* got the class MultiSimilarityLoss"),
        ({"pair_loss": torch.nn.Identity()}, TypeError, "pair_loss must be a BaseMetricLossFunction, got an Identity"),
        (
            {"pair_loss": CrossBatchMemory(MultiSimilarityLoss(), SIZE)},
            TypeError,
            "pair_loss must be a BaseMetricLossFunction, got a CrossBatchMemory",
        ),
        (
            {"pair_loss": MultiSimilarityLoss(reducer=DoNothingReducer())},
            ValueError,
            "got a loss with DoNothingReducer",
        ),
        (
            {"proxy_loss": ProxyAnchorLoss(NUM_CLASSES, SIZE), "weight_reg_weight": 2},
            ValueError,
            "weight_reg_weight must be given to the proxy_loss itself",
        ),
        (
            {
                "pair_loss": MultiSimilarityLoss(),
                "proxy_loss": ProxyAnchorLoss(NUM_CLASSES, SIZE),
                "distance": DotProductSimilarity(),
            },
            ValueError,
            "distance must be given to pair_loss and proxy_loss",
        ),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        HybridLoss(NUM_CLASSES, SIZE, **kwargs)
