import copy

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import DoNothingReducer, SumReducer

from pml_ext.losses import (
    AdaptiveAdditiveMarginLoss,
    CrossBatchMemory,
    DivergenceLoss,
    EnsembleLoss,
    HybridLoss,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
    SelfSupervisedLoss,
)
from tests.pml_internals import c_f

M, D, NUM_CLASSES = 3, 4, 5
EMB = torch.randn(8, M * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = torch.randn(6, M * D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([4, 4, 2, 2, 2, 0, 0, 1])
REF_LABELS = torch.tensor([0, 2, 4, 4, 1, 3])


def slices(emb):
    return emb.split(D, dim=1)


def paper_reference(emb, labels):
    """The paper's loss with loops; shares no code with the package and uses no torch."""
    total, n = 0.0, len(emb)
    unit = emb.reshape(n, M, D) / np.linalg.norm(emb.reshape(n, M, D), axis=2, keepdims=True)
    for m in range(M):
        for i in range(n):
            for j in range(n):
                squared = np.sum((unit[i, m] - unit[j, m]) ** 2)
                total += (squared if labels[i] == labels[j] else max(0.0, 1 - squared)) / n
    for i in range(n):
        for q in range(M):
            for p in range(q):
                total += max(0.0, 1 - np.sum((unit[i, p] - unit[i, q]) ** 2)) / n
    return total


def test_paper_matches_reference(device):
    expected = paper_reference(EMB.numpy(), LABELS.numpy())
    without_divergence = EnsembleLoss.paper(M, divergence_weight=0).to(device)
    assert without_divergence(EMB.to(device), LABELS).item() < expected - 0.1
    assert EnsembleLoss.paper(M).to(device)(EMB.to(device), LABELS).item() == pytest.approx(expected, rel=1e-6)


def test_paper_with_references(device):
    """More references than rows, and a memory that grows."""
    loss_func = EnsembleLoss.paper(M, divergence_weight=0)
    ref, ref_labels = torch.cat([REF, REF + 1]), torch.cat([REF_LABELS, REF_LABELS])
    unit, ref_unit = (x.view(-1, M, D) / x.view(-1, M, D).norm(dim=2, keepdim=True) for x in (EMB, ref))
    each = (unit[:, None] - ref_unit).square().sum(3)  # (8, 12, M)
    same = (LABELS[:, None] == ref_labels)[..., None]
    expected = torch.where(same, each, (1 - each).relu()).sum() / 8
    assert len(ref) > len(EMB)
    torch.testing.assert_close(loss_func(EMB, LABELS, ref_emb=ref, ref_labels=ref_labels), expected)
    memory = CrossBatchMemory(EnsembleLoss.paper(M), M * D, memory_size=20)
    values = [memory(EMB.float(), LABELS).item() for _ in range(3)]
    assert values[0] < values[1] < values[2]


def test_value_by_hand():
    """Two learners of two dimensions, two samples of one class, dot products."""
    emb = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])

    loss_func = EnsembleLoss(losses.ContrastiveLoss(), num_learners=2, divergence_weight=0.5)
    # learner 0: both at (1, 0), distance 0; learner 1: (1, 0) and (0, 1), distance sqrt(2)
    # divergence: sample 0 has identical learners, 1; sample 1 orthogonal ones, 0; mean 0.5
    assert loss_func(emb, torch.tensor([3, 3])).item() == pytest.approx(2**0.5 + 0.5 * 0.5, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_is_the_sum_of_its_parts(weight):
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M, divergence_weight=weight, divergence_margin=2.0)
    parts = sum(MultiSimilarityLoss()(own, LABELS) for own in slices(EMB))
    torch.testing.assert_close(loss_func(EMB, LABELS), parts + weight * DivergenceLoss(M, 2.0)(EMB))
    loss_func.set_reducer(DoNothingReducer())
    terms = loss_func(EMB, LABELS)
    assert list(terms) == ["learner_loss", "divergence_loss"]
    torch.testing.assert_close(terms["learner_loss"]["losses"], parts)


def with_parameters(size=D):
    table = torch.randn(NUM_CLASSES, 3, generator=torch.Generator().manual_seed(5))
    return {
        "ProxyAnchorLoss": lambda: ProxyAnchorLoss(NUM_CLASSES, size),
        "HybridLoss": lambda: HybridLoss(NUM_CLASSES, size, proxy_weight=1.0),
        "AdaptiveAdditiveMarginLoss": lambda: AdaptiveAdditiveMarginLoss(NUM_CLASSES, size, class_embeddings=table),
        "PML ProxyAnchorLoss": lambda: losses.ProxyAnchorLoss(NUM_CLASSES, size),
        "PML NormalizedSoftmaxLoss": lambda: losses.NormalizedSoftmaxLoss(NUM_CLASSES, size),
        "PML SoftTripleLoss": lambda: losses.SoftTripleLoss(NUM_CLASSES, size),
        "PML ArcFaceLoss": lambda: losses.ArcFaceLoss(NUM_CLASSES, size),
    }


@pytest.mark.parametrize("form", ["instance", "factory", "list"])
@pytest.mark.parametrize("name", with_parameters())
def test_losses_with_parameters(name, form):
    """Each learner gets its own, drawn for itself; the value is the sum over learners."""
    make = with_parameters()[name]
    instance = make()
    before = [p.detach().clone() for p in instance.parameters()]
    given = {"instance": instance, "factory": make, "list": [make() for _ in range(M)]}[form]
    loss_func = EnsembleLoss(given, M).double()
    children = list(loss_func.losses.values())
    assert len(children) == M
    own = [list(child.parameters()) for child in children]
    assert len({id(p) for ps in own for p in ps}) == M * len(before)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(own[first], own[second], strict=True))
    assert all(torch.equal(p, b) for p, b in zip(instance.parameters(), before, strict=True))
    expected = sum(child(own, LABELS) for child, own in zip(children, slices(EMB), strict=True))
    loss = loss_func(EMB, LABELS)
    torch.testing.assert_close(loss, expected + DivergenceLoss(M)(EMB))
    loss.backward()
    assert all(p.grad.any() for p in loss_func.parameters())


def test_copies_are_drawn_as_the_original_was():
    """By weight_init_func, with its settings; in every child of a composite; under double too."""
    wide = c_f.TorchInitWrapper(torch.nn.init.normal_, std=30.0)
    loss_func = EnsembleLoss(HybridLoss(NUM_CLASSES, 50, weight_init_func=wide), 2)
    for child in loss_func.losses.values():
        assert child.proxy_loss.proxies.std().item() == pytest.approx(30, rel=0.2)
        assert child.proxy_loss.proxies.requires_grad


class Scaled(MultiSimilarityLoss):
    """A loss with a parameter, with or without a way to draw it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = torch.nn.Parameter(torch.rand(()))

    def compute_loss(self, *args):
        terms = super().compute_loss(*args)
        terms["loss"]["losses"] = terms["loss"]["losses"] * self.scale
        return terms


class Resettable(Scaled):
    def reset_parameters(self):
        torch.nn.init.uniform_(self.scale)


def test_reset_parameters_is_used():
    loss_func = EnsembleLoss(Resettable(), 2)
    first, second = (child.scale for child in loss_func.losses.values())
    assert first != second


def test_parameters_that_cannot_be_drawn_are_refused():
    message = "loss must be a list of 3 losses or a function that makes one, got one Scaled"
    with pytest.raises(ValueError, match=message):
        EnsembleLoss(Scaled(), 3)
    with pytest.raises(ValueError, match="got one MarginLoss"):
        EnsembleLoss(HybridLoss(NUM_CLASSES, D, pair_loss=losses.MarginLoss(learn_beta=True)), 3)
    assert EnsembleLoss(Scaled, 3)(EMB.float(), LABELS) > 0


def test_losses_without_parameters_are_shared():
    inner = MultiSimilarityLoss()
    loss_func = EnsembleLoss(inner, M)
    assert list(loss_func.losses.values()) == [inner]
    different = EnsembleLoss([MultiSimilarityLoss(alpha=a) for a in (1, 2, 3)], M, divergence_weight=0)
    expected = sum(MultiSimilarityLoss(alpha=a)(own, LABELS) for a, own in zip((1, 2, 3), slices(EMB), strict=True))
    torch.testing.assert_close(different(EMB, LABELS), expected)


@pytest.mark.parametrize("name", ["PML ProxyAnchorLoss", "HybridLoss", "MultiSimilarityLoss"])
def test_permuted_learners(name):
    make = with_parameters().get(name, MultiSimilarityLoss)
    loss_func = EnsembleLoss([make() for _ in range(M)], M).double()
    order = [2, 0, 1]
    other = EnsembleLoss([copy.deepcopy(loss_func.losses[f"learner_{m}"]) for m in order], M)
    permuted = torch.cat([slices(EMB)[m] for m in order], 1)
    torch.testing.assert_close(other(permuted, LABELS), loss_func(EMB, LABELS))
    if list(loss_func.parameters()):  # to another learner's proxies the slices are strangers
        assert not torch.isclose(loss_func(permuted, LABELS), loss_func(EMB, LABELS))


def test_gradcheck():
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M, divergence_margin=1.9)
    assert torch.autograd.gradcheck(lambda emb: loss_func(emb, LABELS), EMB.clone().requires_grad_())


def test_indices_go_to_every_learner():
    indices_tuple = miners.BatchHardMiner()(EMB, LABELS)
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M, miner=miners.MultiSimilarityMiner())
    expected = sum(MultiSimilarityLoss()(own, LABELS, indices_tuple) for own in slices(EMB)) + DivergenceLoss(M)(EMB)
    torch.testing.assert_close(loss_func(EMB, LABELS, indices_tuple), expected)


@pytest.mark.parametrize("with_refs", [False, True])
def test_miner_mines_for_each_learner(with_refs):
    miner = miners.BatchHardMiner()
    refs = {"ref_emb": REF, "ref_labels": REF_LABELS} if with_refs else {}
    expected = DivergenceLoss(M)(EMB)
    for m, own in enumerate(slices(EMB)):
        ref = {"ref_emb": slices(REF)[m], "ref_labels": REF_LABELS} if with_refs else {}
        expected = expected + MultiSimilarityLoss()(own, LABELS, miner(own, LABELS, **ref), **ref)
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M, miner=miner)
    torch.testing.assert_close(loss_func(EMB, LABELS, **refs), expected)
    whole = miner(EMB, LABELS, **refs)
    assert not torch.isclose(loss_func(EMB, LABELS, whole, **refs), expected)


def test_what_a_miner_returns_is_checked():
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M, miner=lambda *_: (torch.tensor([9]),) * 3)
    with pytest.raises(ValueError, match=r"indices_tuple\[0\] must be < the number of rows = 8, got 9"):
        loss_func(EMB, LABELS)
    with pytest.raises(ValueError, match="labels"):
        EnsembleLoss(MultiSimilarityLoss(), M, miner=miners.BatchHardMiner())(EMB)


def test_references():
    expected = DivergenceLoss(M)(EMB)
    for own, ref in zip(slices(EMB), slices(REF), strict=True):
        expected = expected + MultiSimilarityLoss()(own, LABELS, ref_emb=ref, ref_labels=REF_LABELS)
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M)
    torch.testing.assert_close(loss_func(EMB, LABELS, ref_emb=REF, ref_labels=REF_LABELS), expected)
    with pytest.raises(ValueError, match="ref_emb must have"):
        loss_func(EMB, LABELS, ref_emb=REF[:, :-1], ref_labels=REF_LABELS)


def test_memory():
    """Each learner compares with its own part of the memory."""
    memory = CrossBatchMemory(EnsembleLoss(MultiSimilarityLoss(), M), M * D, memory_size=32)
    each = [CrossBatchMemory(MultiSimilarityLoss(), D, memory_size=32) for _ in range(M)]
    for seed in range(3):
        emb = torch.randn(8, M * D, generator=torch.Generator().manual_seed(seed))
        expected = sum(one(own, LABELS) for one, own in zip(each, slices(emb), strict=True)) + DivergenceLoss(M)(emb)
        torch.testing.assert_close(memory(emb, LABELS), expected)


def test_memory_takes_the_miner_and_refuses_proxies():
    memory = CrossBatchMemory(EnsembleLoss(MultiSimilarityLoss(), M, miner=miners.BatchHardMiner()), M * D)
    assert isinstance(memory.miner, miners.BatchHardMiner)
    with pytest.raises(TypeError, match=r"loss\.losses\['learner_0'\] must be one that supports ref_emb, got ProxyAnc"):
        CrossBatchMemory(EnsembleLoss(ProxyAnchorLoss(NUM_CLASSES, D), M), M * D)
    mining = EnsembleLoss(lambda: HybridLoss(NUM_CLASSES, D, miner=miners.BatchHardMiner()), M)
    with pytest.raises(
        ValueError, match=r"miner must be given to the memory: loss\.losses\['learner_0'\] would not use"
    ):
        CrossBatchMemory(mining, M * D)
    hybrids = EnsembleLoss(lambda: HybridLoss(NUM_CLASSES, D, pair_loss=losses.VICRegLoss()), M)
    with pytest.raises(TypeError, match=r"loss\.losses\['learner_0'\]\.pair_loss must be one .* got VICRegLoss"):
        CrossBatchMemory(hybrids, M * D)


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_views(symmetric):
    first, second = EMB, EMB.flip(1)
    actual = SelfSupervisedLoss(EnsembleLoss(MultiSimilarityLoss(), M, divergence_weight=0), symmetric)(first, second)
    each = SelfSupervisedLoss(MultiSimilarityLoss(), symmetric)
    torch.testing.assert_close(actual, sum(each(a, b) for a, b in zip(slices(first), slices(second), strict=True)))
    for inner in (ProxyAnchorLoss(NUM_CLASSES, D), HybridLoss(NUM_CLASSES, D)):
        with pytest.raises(TypeError, match=r"loss\.losses\['learner_0'\] must be one that takes two views"):
            SelfSupervisedLoss(EnsembleLoss(inner, M))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_logits_of_half_embeddings(half):
    loss_func = EnsembleLoss(ProxyAnchorLoss(NUM_CLASSES, D), M)
    emb = EMB.to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = loss_func.get_logits(emb)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, loss_func.get_logits(emb.float()))


def test_logits_are_the_mean_of_the_learners():
    loss_func = EnsembleLoss(ProxyAnchorLoss(NUM_CLASSES, D), M).double()
    cosines = [
        torch.nn.functional.normalize(own) @ torch.nn.functional.normalize(child.proxies).T
        for own, child in zip(slices(EMB), loss_func.losses.values(), strict=True)
    ]
    torch.testing.assert_close(loss_func.get_logits(EMB), sum(cosines) / M)
    with pytest.raises(TypeError, match="must define get_logits; MultiSimilarityLoss does not"):
        EnsembleLoss(MultiSimilarityLoss(), M).get_logits(EMB)


def test_statistics():
    loss_func = EnsembleLoss(MultiSimilarityLoss(), M, collect_stats=True)
    loss_func(EMB, LABELS)
    for m, own in enumerate(slices(EMB)):
        assert getattr(loss_func, f"learner_{m}_loss") == pytest.approx(MultiSimilarityLoss()(own, LABELS).item())
    assert -0.5 <= loss_func.learner_similarity <= 1
    assert loss_func.learner_similarity == loss_func.divergence.learner_similarity != 0
    assert not hasattr(EnsembleLoss(MultiSimilarityLoss(), M), "learner_0_loss")


def test_sizes_are_those_of_the_slices():
    loss_func = EnsembleLoss(HybridLoss(NUM_CLASSES, D), M)
    assert (loss_func.num_classes, loss_func.embedding_size) == (NUM_CLASSES, M * D)
    with pytest.raises(ValueError, match=r"embeddings must have shape .* = \(8, 12\), got \(8, 4\)"):
        loss_func(EMB[:, :D], LABELS)
    with pytest.raises(ValueError, match="labels must be < num_classes = 5, got 6"):
        loss_func(EMB, LABELS + 2)
    with pytest.raises(ValueError, match="num_classes must agree with learner_0 and learner_1"):
        EnsembleLoss([ProxyAnchorLoss(3, D), ProxyAnchorLoss(4, D)], 2)


def test_input_is_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr("pml_ext.losses.base_loss.check_batch", lambda *args: calls.append(args))
    EnsembleLoss(HybridLoss(NUM_CLASSES, D), M)(EMB, LABELS)
    assert len(calls) == 1


def test_width_must_be_divisible(without_validation):
    with pytest.raises(ValueError, match=r"embeddings must have a width that num_learners = 5 divides"):
        EnsembleLoss(MultiSimilarityLoss(), 5)(EMB, LABELS)


SHARED = ProxyAnchorLoss(NUM_CLASSES, D)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"loss": "contrastive"}, TypeError, "loss must be a BaseMetricLossFunction, a list .* got 'contrastive'"),
        ({"loss": losses.MultipleLosses([MultiSimilarityLoss()])}, TypeError, "loss must be .* got a MultipleLosses"),
        ({"loss": [MultiSimilarityLoss()]}, ValueError, "loss must be num_learners = 2 losses, got a list of 1"),
        ({"loss": [MultiSimilarityLoss(), 3]}, TypeError, r"loss\[1\] must be a BaseMetricLossFunction, got 3"),
        ({"loss": [SHARED, SHARED]}, ValueError, r"one of its own for each learner, got loss\[1\]"),
        ({"loss": lambda: SHARED}, ValueError, r"one of its own for each learner, got loss\[1\]"),
        ({"loss": MultiSimilarityLoss(reducer=DoNothingReducer())}, ValueError, "loss must reduce its losses"),
        ({"num_learners": 0}, ValueError, "num_learners must be an integer >= 1, got 0"),
        ({"divergence_weight": -1}, ValueError, "divergence_weight must be >= 0 and finite, got -1"),
        ({"divergence_margin": 0}, ValueError, "divergence_margin must be > 0 and finite, got 0"),
        ({"miner": 3}, TypeError, "miner must be callable, got int"),
        (
            {"miner": miners.BatchHardMiner},
            TypeError,
            r"miner must be an object, .*class BatchHardMiner: BatchHardMiner\(\)",
        ),
        ({"divergence": DivergenceLoss(2)}, TypeError, "EnsembleLoss has no argument divergence: .* divergence_weight"),
        ({"loss": DivergenceLoss(2)}, ValueError, "loss must be what a learner is trained with, got a DivergenceLoss"),
        ({"loss": [MultiSimilarityLoss(), DivergenceLoss(2)]}, ValueError, r"loss\[1\] must be what a learner"),
        ({"loss": ProxyAnchorLoss}, TypeError, "loss must be a loss with its arguments, got the class ProxyAnchorLoss"),
        (
            {"num_learners": MultiSimilarityLoss()},
            TypeError,
            r"num_learners must be .* EnsembleLoss\(loss, num_learners\)",
        ),
        (
            {"divergence_weight": DivergenceLoss(2)},
            TypeError,
            "divergence_weight must be a number .* got a DivergenceLoss",
        ),
        ({"distance": CosineSimilarity()}, ValueError, "distance must be given to loss itself, got CosineSimilarity"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        EnsembleLoss(**({"loss": MultiSimilarityLoss(), "num_learners": 2} | kwargs))


def test_children_keep_their_reducers():
    loss_func = EnsembleLoss(MultiSimilarityLoss(reducer=SumReducer()), M, divergence_weight=0)
    torch.testing.assert_close(
        loss_func(EMB, LABELS), 8 * EnsembleLoss(MultiSimilarityLoss(), M, divergence_weight=0)(EMB, LABELS)
    )
