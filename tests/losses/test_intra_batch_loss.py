import copy
import re

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import nn

from pml_ext.losses import (
    EnsembleLoss,
    HybridLoss,
    IntraBatchLoss,
    LabelSmoothingCrossEntropyLoss,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
)
from pml_ext.trunks import IntraBatchRefiner
from pml_ext.trunks.intra_batch_refiner import _IBC_NAMES

NUM_CLASSES, SIZE = 5, 8
EMB = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([4, 4, 2, 2, 2, 0, 0, 1, 3])


def refiner(**kwargs):
    return IntraBatchRefiner(SIZE, **{"dropout": 0.0, **kwargs})


def make(refined_by=None, **kwargs):
    torch.manual_seed(0)
    if kwargs.get("refined_weight", 1):
        kwargs["refiner"] = refiner() if refined_by is None else refined_by
    loss_func = IntraBatchLoss(NUM_CLASSES, SIZE, **kwargs).double()
    with torch.no_grad():
        for p in loss_func.refined_loss.parameters() if loss_func.refined_loss is not None else ():
            p.mul_(100)  # the start is so small that nothing would show
        if loss_func.norm is not None:
            loss_func.norm.weight.normal_()
    return loss_func


def smoothed(logits):
    return nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)


def test_value_from_its_parts():
    """Raw embeddings to the raw classifier; normalized ones to the graph, batch norm and a bare classifier."""
    loss_func = make(temperature=0.3)
    refined = loss_func.refiner(EMB / EMB.norm(dim=1, keepdim=True))
    mean, var = refined.mean(0), refined.var(0, unbiased=False)
    normal = (refined - mean) / (var + 1e-5).sqrt() * loss_func.norm.weight
    logits = normal @ loss_func.refined_loss.weight.T
    raw = EMB @ loss_func.raw_loss.weight.T + loss_func.raw_loss.bias
    torch.testing.assert_close(loss_func(EMB, LABELS), smoothed(logits / 0.3) + smoothed(raw / 0.3))
    torch.testing.assert_close(loss_func.refine(EMB), refined)
    torch.testing.assert_close(loss_func.get_logits(EMB), raw / 0.3)


def test_scale_of_the_embeddings_matters_to_the_raw_part_alone():
    loss_func = make(reducer=DoNothingReducer())
    plain, scaled = loss_func(EMB, LABELS), loss_func(3 * EMB, LABELS)
    torch.testing.assert_close(scaled["refined_loss"]["losses"], plain["refined_loss"]["losses"])
    assert not torch.isclose(scaled["raw_loss"]["losses"], plain["raw_loss"]["losses"])


def test_weights():
    loss_func = make(refined_weight=0.5, raw_weight=2.0, reducer=DoNothingReducer())
    plain = make(reducer=DoNothingReducer())
    for name, weight in (("refined_loss", 0.5), ("raw_loss", 2.0)):
        expected = weight * plain(EMB, LABELS)[name]["losses"]
        torch.testing.assert_close(loss_func(EMB, LABELS)[name]["losses"], expected)


def test_gradients_pass_between_samples():
    loss_func = make(raw_weight=0)
    emb = EMB.clone().requires_grad_()
    refined = loss_func.refine(emb)
    (grad,) = torch.autograd.grad(refined[0, ::3].sum(), emb)
    assert grad.abs().sum(1).gt(1e-6).all()
    raw_only = make(refined_weight=0)
    (grad,) = torch.autograd.grad(raw_only(emb, LABELS), emb)
    (expected,) = torch.autograd.grad(raw_only.raw_loss(emb, LABELS), emb)
    torch.testing.assert_close(grad, expected)


def test_parts_that_are_off_are_not_there():
    raw_only, refined_only = make(refined_weight=0), make(raw_weight=0)
    assert raw_only.refiner is None
    assert [name.split(".")[0] for name, _ in raw_only.named_parameters()] == ["raw_loss"] * 2
    assert refined_only.raw_loss is None
    for loss_func in (raw_only, refined_only):
        loss_func(EMB, LABELS).backward()
        assert all(p.grad.any() for p in loss_func.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="refined_weight must be positive for refine, got 0"):
        raw_only.refine(EMB)
    with pytest.raises(TypeError, match="raw_loss must define get_logits; NoneType does not"):
        refined_only.get_logits(EMB)


def test_bias_of_the_batch_norm_stays_zero():
    loss_func = make()
    norm = loss_func.norm
    assert not norm.bias.requires_grad
    optimizer = torch.optim.Adam(loss_func.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_func(EMB, LABELS).backward()
        optimizer.step()
    assert not norm.bias.any()


def test_start_of_the_classifier():
    loss_func = IntraBatchLoss(200, 64)
    classifier = loss_func.refined_loss
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert classifier.bias is None
    assert loss_func.refiner.heads == 2
    assert loss_func.refiner.num_layers == 1


@pytest.mark.parametrize("output", ["last", "cat"])
def test_outputs_of_the_refiner(output):
    loss_func = make(refiner(num_layers=3, output=output), raw_weight=0)
    refined = loss_func.refine(EMB)
    assert refined.shape[1] == (3 * SIZE if output == "cat" else SIZE)
    normal = nn.functional.batch_norm(refined, None, None, loss_func.norm.weight, training=True)
    torch.testing.assert_close(loss_func(EMB, LABELS), smoothed(normal @ loss_func.refined_loss.weight.T / 0.2))


def inner_losses(size=SIZE):
    return {
        "HybridLoss": lambda: HybridLoss(NUM_CLASSES, size, proxy_weight=1.0),
        "EnsembleLoss": lambda: EnsembleLoss(MultiSimilarityLoss(), 4),
        "EnsembleLoss of HybridLoss": lambda: EnsembleLoss(HybridLoss(NUM_CLASSES, size // 4), 4),
        "PML TripletMarginLoss": lambda: losses.TripletMarginLoss(),
        "PML ArcFaceLoss": lambda: losses.ArcFaceLoss(NUM_CLASSES, size),
    }


@pytest.mark.parametrize("output", ["last", "cat"])
@pytest.mark.parametrize("name", inner_losses())
def test_any_loss_on_refined_embeddings(name, output):
    size = 2 * SIZE if output == "cat" else SIZE
    loss_func = make(refiner(num_layers=2, output=output), loss=inner_losses(size)[name](), raw_weight=0)
    torch.testing.assert_close(loss_func(EMB, LABELS), loss_func.refined_loss(loss_func.refine(EMB), LABELS))
    loss_func(EMB, LABELS).backward()
    assert all(p.grad is not None for p in loss_func.parameters())
    assert loss_func.norm is None


def test_any_loss_on_raw_embeddings():
    raw = ProxyAnchorLoss(NUM_CLASSES, SIZE)
    loss_func = make(raw_loss=raw, loss=MultiSimilarityLoss())
    expected = raw(EMB, LABELS) + MultiSimilarityLoss()(loss_func.refine(EMB), LABELS)
    torch.testing.assert_close(loss_func(EMB, LABELS), expected)
    assert IntraBatchLoss(None, SIZE, loss=MultiSimilarityLoss(), raw_loss=raw).num_classes == NUM_CLASSES
    torch.testing.assert_close(loss_func.get_logits(EMB), raw.get_logits(EMB))


def test_ensembles_of_it():
    """Copies for the learners are drawn afresh as the parts say: attention by Xavier, classifiers small."""
    loss_func = EnsembleLoss(IntraBatchLoss(NUM_CLASSES, 32), 2)
    first, second = loss_func.losses.values()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b)
    for child in (first, second):
        assert child.refiner.layers[0].attend.query.weight.abs().max() > 0.27  # (6 / 64)^0.5 = 0.31; Linear's: 0.18
        assert child.refined_loss.weight.std() < 0.002
    assert loss_func(torch.randn(9, 64), LABELS) > 0


def test_miner_reaches_both_parts():
    loss_func = make(loss=LabelSmoothingCrossEntropyLoss(NUM_CLASSES, SIZE))
    mined = miners.BatchHardMiner()(EMB, LABELS)
    expected = loss_func.refined_loss(loss_func.refine(EMB), LABELS, mined)
    expected = expected + loss_func.raw_loss(EMB, LABELS, mined)
    torch.testing.assert_close(loss_func(EMB, LABELS, mined), expected)


def test_eval_is_deterministic():
    loss_func = make(refiner(dropout=0.5))
    assert loss_func(EMB, LABELS) != loss_func(EMB, LABELS)
    loss_func.eval()
    loss = loss_func(EMB, LABELS)
    assert loss == loss_func(EMB, LABELS) > 0
    norm = loss_func.norm
    logits = norm(loss_func.refine(EMB)) @ loss_func.refined_loss.weight.T
    expected = smoothed(logits / 0.2) + smoothed(loss_func.get_logits(EMB))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("null_message", [True, False])
def test_batch_of_one(null_message):
    """Running statistics stand in for those of the batch, and are not changed."""
    loss_func = make(refiner(null_message=null_message)).train()
    before = copy.deepcopy(loss_func.norm.state_dict())
    loss = loss_func(EMB[:1], LABELS[:1])
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss_func.parameters() if p.requires_grad)
    assert all(torch.equal(x, before[name]) for name, x in loss_func.norm.state_dict().items())
    torch.testing.assert_close(loss_func.eval()(EMB[:1], LABELS[:1]), loss)


def test_dtypes_may_differ():
    loss_func = make().float()
    emb = EMB.clone().requires_grad_()
    loss = loss_func(emb, LABELS)
    loss.backward()
    assert emb.grad.dtype == torch.float64
    torch.testing.assert_close(loss, make()(EMB, LABELS), rtol=1e-4, atol=0, check_dtype=False)
    assert make()(EMB.float(), LABELS) > 0


def test_other_refiners():
    class Mean(nn.Module):
        out_features = SIZE

        def forward(self, embeddings):
            return embeddings + embeddings.mean(0)

    loss_func = make(Mean(), loss=MultiSimilarityLoss(), raw_weight=0)
    unit = EMB / EMB.norm(dim=1, keepdim=True)
    torch.testing.assert_close(loss_func(EMB, LABELS), MultiSimilarityLoss()(unit + unit.mean(0), LABELS))


def test_refiner_without_parameters_and_double_embeddings():
    class Mean(nn.Module):
        out_features = SIZE

        def forward(self, embeddings):
            return embeddings + embeddings.mean(0)

    class Several(Mean):
        def forward(self, embeddings):
            return [embeddings, embeddings]

    loss = IntraBatchLoss(NUM_CLASSES, SIZE, Mean())(EMB, LABELS)
    assert loss > 0
    with pytest.raises(TypeError, match="refiner must return one tensor, got list"):
        IntraBatchLoss(NUM_CLASSES, SIZE, Several())(EMB, LABELS)


def test_half_parameters_are_refused():
    with pytest.raises(ValueError, match=r"call loss_func\.float\(\).*got a refiner of torch\.float16"):
        make().half()(EMB, LABELS)


def test_odd_width():
    assert IntraBatchLoss(NUM_CLASSES, 7)(EMB[:, :7], LABELS) > 0


def test_released_weights():
    """Random weights under the authors' names."""
    donor = make(refiner(num_layers=2))
    released = {}
    for name, x in donor.state_dict().items():
        if name.startswith("refiner."):
            name = name.removeprefix("refiner.")
            for theirs, ours in _IBC_NAMES.items():
                name = name.replace(ours, theirs)
        elif name.startswith("norm."):
            name = "bottleneck.0." + name.removeprefix("norm.")
        elif name.startswith("refined_loss."):
            name = "fc.0." + name.removeprefix("refined_loss.")
        else:
            continue
        released[name] = x
    assert {"bottleneck.0.running_mean", "fc.0.weight", "dim_red.bias"} <= set(released)
    other = IntraBatchLoss(NUM_CLASSES, SIZE, refiner(num_layers=2)).double()
    raw = other.raw_loss.weight.clone()
    other.load_released(released)
    assert torch.equal(other.raw_loss.weight, raw)
    other.raw_loss.load_state_dict(donor.raw_loss.state_dict())
    torch.testing.assert_close(other(EMB, LABELS), donor(EMB, LABELS))
    with pytest.raises(RuntimeError, match=r"refiner\.layers\.0\.norm1\.weight"):
        other.load_released({k: x for k, x in released.items() if "layers.0.norm1.weight" not in k})
    with pytest.raises(RuntimeError, match=r"fc\.1\.weight"):  # of a classifier for another layer
        other.load_released(released | {"fc.1.weight": released["fc.0.weight"]})


def test_parameters_keep_the_order_of_the_first_version():
    """Optimizers' states know parameters by it alone."""
    parts = [name.split(".")[0] for name, _ in make().named_parameters()]
    assert list(dict.fromkeys(parts)) == ["norm", "refined_loss", "refiner", "raw_loss"]


@pytest.mark.parametrize("inner", [None, "shared"])
def test_state_dicts_of_the_first_version(inner):
    kwargs = {} if inner is None else {"loss": HybridLoss(NUM_CLASSES, SIZE)}
    donor = make(**kwargs)
    old_part = "layer_0" if inner is None else inner
    old = {
        re.sub(r"^refined_loss\.", f"refined_losses.{old_part}.", re.sub(r"^norm\.", "norms.layer_0.", name)): x
        for name, x in donor.state_dict().items()
    }
    assert old.keys() != donor.state_dict().keys()
    torch.manual_seed(1)
    other = IntraBatchLoss(NUM_CLASSES, SIZE, refiner(), **kwargs).double()
    wrapped = nn.ModuleDict({"metric_loss": other})
    wrapped.load_state_dict({f"metric_loss.{name}": x for name, x in old.items()})
    torch.testing.assert_close(other(EMB, LABELS), donor(EMB, LABELS))


def test_statistics():
    loss_func = make(collect_stats=True, refined_weight=0.5, raw_weight=2.0)
    loss = loss_func(EMB, LABELS)
    assert loss_func.raw_loss_value == pytest.approx(loss_func.raw_loss(EMB, LABELS).item())
    total = 0.5 * loss_func.refined_loss_value + 2 * loss_func.raw_loss_value
    assert total == pytest.approx(loss.item())


def test_input_is_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr("pml_ext.losses.base_loss.check_batch", lambda *args: calls.append(args))
    make(loss=HybridLoss(NUM_CLASSES, SIZE))(EMB, LABELS)
    assert len(calls) == 1


def test_references_are_refused():
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        make()(EMB, LABELS, ref_emb=EMB + 1, ref_labels=LABELS)


class Sizeless(nn.Module):
    pass


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"refined_weight": 0, "raw_weight": 0}, ValueError, "refined_weight or raw_weight must be positive, got 0"),
        ({"refined_weight": -1}, ValueError, "refined_weight must be >= 0 and finite, got -1"),
        ({"raw_weight": float("inf")}, ValueError, "raw_weight must be >= 0 and finite, got inf"),
        ({"num_classes": None}, ValueError, "num_classes must be given unless both loss and raw_loss are"),
        ({"num_classes": None, "loss": MultiSimilarityLoss()}, ValueError, "num_classes must be given unless both"),
        ({"embedding_size": None}, ValueError, "embedding_size must be an integer >= 1, got None"),
        ({"temperature": 0}, ValueError, "temperature must be > 0"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing must lie in 0 to 1"),
        ({"loss": 3}, TypeError, "loss must be a BaseMetricLossFunction, got 3"),
        ({"raw_loss": MultiSimilarityLoss(reducer=DoNothingReducer())}, ValueError, "raw_loss must reduce its losses"),
        ({"loss": ProxyAnchorLoss(NUM_CLASSES, 4)}, ValueError, r"embedding_size must agree with loss, got \[8, 4\]"),
        ({"raw_loss": ProxyAnchorLoss(NUM_CLASSES, 4)}, ValueError, "embedding_size must agree with raw_loss"),
        ({"loss": ProxyAnchorLoss(7, SIZE)}, ValueError, "num_classes must agree with loss"),
        ({"refiner": "gat"}, TypeError, r"refiner must be a torch\.nn\.Module, got 'gat'"),
        ({"refiner": Sizeless()}, ValueError, "refiner must define out_features; Sizeless does not"),
        (
            {"refiner": IntraBatchRefiner(4)},
            ValueError,
            "refiner must take embeddings of embedding_size = 8, got one f",
        ),
        ({"refiner": refiner(), "refined_weight": 0}, ValueError, "refiner must not be given where its weight is 0"),
        ({"raw_loss": MultiSimilarityLoss(), "raw_weight": 0}, ValueError, "raw_loss must not be given where its"),
        ({"distance": CosineSimilarity()}, ValueError, "distance must be given to loss or raw_loss itself, got Cosine"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        IntraBatchLoss(**({"num_classes": NUM_CLASSES, "embedding_size": SIZE} | kwargs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_device_must_be_that_of_the_embeddings():
    with pytest.raises(ValueError, match=r"call loss_func\.to\(device\)"):
        make()(EMB.cuda(), LABELS)


def test_backward_of_refine_inside_of_autocast():
    loss_func = make().float().eval()
    emb = EMB.float().requires_grad_()
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(loss_func.refine(emb).pow(3).sum(), emb)
    assert grads[0].any()
    assert torch.equal(*grads)
