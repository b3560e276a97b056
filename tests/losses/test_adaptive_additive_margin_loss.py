import math

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
    SumReducer,
    ThresholdReducer,
)

from pml_ext.losses import AdaptiveAdditiveMarginLoss
from pml_ext.streaming import class_margins as class_margins_module

NUM_CLASSES, SIZE = 6, 5
EMB = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROXIES = torch.randn(NUM_CLASSES, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TEXT = 3 + torch.randn(NUM_CLASSES, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS = torch.tensor([5, 5, 2, 2, 2, 0, 0, 5, 3])  # classes 1 and 4 are absent
METRICS = ["cosine", "euclidean", "squared_euclidean"]


def make(dtype=torch.float64, **kwargs):
    loss_func = AdaptiveAdditiveMarginLoss(NUM_CLASSES, SIZE, **kwargs).to(dtype)
    with torch.no_grad():
        loss_func.proxies.copy_(PROXIES)
    return loss_func


def class_distance(t, u, metric):
    if metric == "cosine":
        return 1 - t @ u / np.linalg.norm(t) / np.linalg.norm(u)
    return np.linalg.norm(t - u) ** (2 if metric == "squared_euclidean" else 1)


def margins_by_loops(text, metric, normalize, margin_scale, base_margin, direction):
    """Return m_yj; rows of ``text`` with NaN, or of zeros, describe nothing."""
    known = [bool(np.isfinite(t).all() and t.any()) for t in text]
    pairs = [(y, j) for y in range(len(text)) for j in range(len(text)) if known[y] and known[j] and y != j]
    distances = {pair: class_distance(text[pair[0]], text[pair[1]], metric) for pair in pairs}
    largest = max(distances.values()) if normalize else 1.0
    margins = np.full((len(text), len(text)), base_margin)
    np.fill_diagonal(margins, 0)
    for pair, distance in distances.items():
        d = distance / largest
        margins[pair] += margin_scale * (d if direction == "distance" else 1 - d)
    return margins


def reference(x, y, proxies, margins, scale):
    """The equation with loops; shares no code with the package and uses no torch."""
    total = 0.0
    for xi, yi in zip(x, y, strict=True):
        cosines = [xi @ p / np.linalg.norm(xi) / np.linalg.norm(p) for p in proxies]
        others = sum(math.exp(scale * (c + margins[yi, j])) for j, c in enumerate(cosines) if j != yi)
        own = math.exp(scale * cosines[yi])
        total -= math.log(own / (own + others))
    return total / len(x)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("direction", ["distance", "similarity"])
@pytest.mark.parametrize("missing", [None, "nan", "zero"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_matches_reference(metric, normalize, direction, missing, dtype, tol, device):
    text = TEXT.clone()
    if missing is not None:
        text[[1, 5]] = torch.nan if missing == "nan" else 0.0
    setting = {"normalize": normalize, "margin_scale": 0.4, "base_margin": 0.1, "direction": direction}
    margins = margins_by_loops(text.numpy(), metric, **setting)
    expected = reference(EMB.numpy(), LABELS.numpy(), PROXIES.numpy(), margins, 8.0)
    loss_func = make(dtype, class_embeddings=text, class_metric=metric, scale=8.0, chunk_size=4, **setting).to(device)
    assert loss_func(EMB.to(device, dtype), LABELS).item() == pytest.approx(expected, rel=tol)
    actual = loss_func.get_margins(torch.arange(NUM_CLASSES, device=device)).cpu().numpy()
    np.testing.assert_allclose(actual, margins, atol=1e-6)


@pytest.mark.parametrize("direction", ["distance", "similarity"])
@pytest.mark.parametrize("normalize", [True, False])
def test_class_distances(direction, normalize, device):
    """A matrix that is not symmetric: row y belongs to samples of class y."""
    distances = torch.rand(NUM_CLASSES, NUM_CLASSES, dtype=torch.float64) + 0.2
    distances.fill_diagonal_(0)
    distances[4], distances[:, 4] = torch.nan, torch.nan
    d = (distances / distances.nan_to_num(nan=0.0).max() if normalize else distances).numpy()
    margins = 0.1 + 0.4 * (d if direction == "distance" else 1 - d)
    margins = np.where(np.isnan(margins), 0.1, margins)
    np.fill_diagonal(margins, 0)
    expected = reference(EMB.numpy(), LABELS.numpy(), PROXIES.numpy(), margins, 8.0)
    setting = {"normalize": normalize, "margin_scale": 0.4, "base_margin": 0.1, "direction": direction, "scale": 8.0}
    loss_func = make(class_distances=distances, chunk_size=4, **setting).to(device)
    assert loss_func(EMB.to(device), LABELS).item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(
        loss_func.get_margins(torch.arange(NUM_CLASSES, device=device)).cpu(), margins, atol=1e-6
    )


def test_class_distances_are_those_of_class_embeddings():
    embeddings = make(class_embeddings=TEXT, class_metric="euclidean")
    distances = make(class_distances=torch.cdist(TEXT, TEXT))
    torch.testing.assert_close(embeddings(EMB, LABELS), distances(EMB, LABELS), rtol=1e-9, atol=0)


def test_hand_computed():
    """One sample on the first axis, proxies on three: cosines 1, 0, 0; margins 0.5 and 0.25."""
    distances = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    loss_func = AdaptiveAdditiveMarginLoss(3, 3, class_distances=distances, margin_scale=0.5, scale=2.0)
    torch.nn.init.eye_(loss_func.proxies)
    expected = -math.log(math.exp(2) / (math.exp(2) + math.exp(1) + math.exp(0.5)))
    assert loss_func(torch.tensor([[4.0, 0, 0]]), torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)


REDUCERS = {
    "Mean": MeanReducer(),
    "Sum": SumReducer(),
    "AvgNonZero": AvgNonZeroReducer(),
    "Threshold": ThresholdReducer(low=2.0, high=30.0),
    "ClassWeighted": ClassWeightedReducer(torch.arange(1.0, 7.0, dtype=torch.float64)),
}


def compare(ours, theirs, weight, indices_tuple=None):
    """Same value, same gradients."""
    emb = EMB.clone().requires_grad_()
    values = ours(emb, LABELS, indices_tuple), theirs(emb, LABELS, indices_tuple)
    assert values[1] > 0.1
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    a, b = (torch.autograd.grad(v, [emb, w]) for v, w in zip(values, (ours.proxies, weight), strict=True))
    torch.testing.assert_close(a[0], b[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(a[1], b[1].T, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS)
@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(), miners.BatchHardMiner()])
def test_constant_margin_is_cosface(reducer, miner):
    theirs = losses.CosFaceLoss(NUM_CLASSES, SIZE, margin=0.35, scale=64, reducer=reducer).double()
    theirs.W.data = PROXIES.T.clone()
    ours = make(base_margin=0.35, scale=64, reducer=reducer)
    compare(ours, theirs, theirs.W, None if miner is None else miner(EMB, LABELS))
    torch.testing.assert_close(ours.get_logits(EMB), theirs.get_logits(EMB))


def test_constant_distances_are_cosface():
    """Every pair of classes equally far apart."""
    theirs = losses.CosFaceLoss(NUM_CLASSES, SIZE, margin=0.2, scale=10).double()
    theirs.W.data = PROXIES.T.clone()
    compare(make(class_embeddings=torch.eye(NUM_CLASSES).double(), margin_scale=0.2, scale=10), theirs, theirs.W)


def test_zero_margin_is_normalized_softmax():
    theirs = losses.NormalizedSoftmaxLoss(NUM_CLASSES, SIZE, temperature=0.05, distance=CosineSimilarity()).double()
    theirs.W.data = PROXIES.T.clone()
    compare(make(scale=1 / 0.05), theirs, theirs.W)


@pytest.mark.parametrize(
    "distance", [DotProductSimilarity(normalize_embeddings=False), LpDistance(), CosineSimilarity(power=2)]
)
def test_other_distances(distance):
    """Dense or streamed: cross entropy of what the distance gives, a distance being a negative similarity."""
    loss_func = make(class_embeddings=TEXT, scale=2.0, distance=distance)
    mat = distance(EMB, PROXIES) * (1 if distance.is_inverted else -1)
    margins = torch.from_numpy(margins_by_loops(TEXT.numpy(), "cosine", True, 0.3, 0.0, "distance"))
    expected = torch.nn.functional.cross_entropy(2 * (mat + margins[LABELS]), LABELS)
    torch.testing.assert_close(loss_func(EMB, LABELS), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss_func.get_logits(EMB), 2 * mat)


def test_gradcheck():
    for kwargs in ({}, {"class_embeddings": TEXT}, {"class_embeddings": TEXT, "class_metric": "euclidean"}):
        loss_func = make(chunk_size=4, scale=4.0, **kwargs)

        def loss_of(emb, proxies, loss_func=loss_func):
            return torch.func.functional_call(loss_func, {"proxies": proxies}, (emb, LABELS))

        assert torch.autograd.gradcheck(loss_of, (EMB.clone().requires_grad_(), PROXIES.clone().requires_grad_()))


def test_dense_and_streamed_agree(monkeypatch):
    streamed = make(class_embeddings=TEXT, base_margin=0.1, chunk_size=2)
    value = streamed(EMB, LABELS)
    monkeypatch.setattr("pml_ext.losses.base_proxy_loss.can_stream", lambda *_: False)
    monkeypatch.setattr("pml_ext.losses.adaptive_additive_margin_loss.margin_softmax_loss", None)
    torch.testing.assert_close(streamed(EMB, LABELS), value, rtol=1e-12, atol=0)


def test_memory_reaches_the_walk_and_changes_no_state():
    plain, keeping = (make(class_embeddings=TEXT, chunk_size=2, memory=memory) for memory in (0, 10**4))
    assert keeping.state_dict().keys() == plain.state_dict().keys()
    values = []
    for loss_func, expected in ((plain, 1), (keeping, 3)):  # 9 samples of width 5: one chunk of three fits unasked
        loss_func.set_reducer(DoNothingReducer())
        values.append(loss_func(EMB, LABELS)["loss"]["losses"])
        assert sum(x is not None for x in values[-1].grad_fn.kept) == expected
    grads = [torch.autograd.grad(x.sum(), f.proxies)[0] for x, f in zip(values, (plain, keeping), strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_class_descriptions_are_buffers_and_not_trained():
    loss_func = make(torch.float32, class_embeddings=TEXT)
    assert [name for name, _ in loss_func.named_parameters()] == ["proxies"]
    assert set(loss_func.state_dict()) == {"proxies", "class_embeddings", "class_is_described", "class_settings"}
    assert loss_func.class_embeddings.shape == TEXT.shape
    other = AdaptiveAdditiveMarginLoss(NUM_CLASSES, SIZE, class_embeddings=torch.randn(NUM_CLASSES, 4))
    other.load_state_dict(loss_func.state_dict())
    torch.testing.assert_close(other(EMB.float(), LABELS), loss_func(EMB.float(), LABELS))
    assert set(make(class_distances=1 - torch.eye(NUM_CLASSES)).state_dict()) == {
        "proxies",
        "class_distances",
        "class_is_described",
        "class_settings",
    }
    assert set(make().state_dict()) == {"proxies"}


def test_descriptions_are_copied():
    text = TEXT.clone()
    loss_func = make(class_embeddings=text)
    before = loss_func(EMB, LABELS)
    text.zero_()
    assert loss_func(EMB, LABELS) == before
    distances = (1 - torch.eye(NUM_CLASSES)).double()
    loss_func = make(class_distances=distances, normalize=False)
    before = loss_func(EMB, LABELS)
    distances.mul_(2)
    assert loss_func(EMB, LABELS) == before


def test_numpy_and_integer_descriptions():
    expected = make(class_embeddings=TEXT)(EMB, LABELS)
    assert make(class_embeddings=TEXT.numpy())(EMB, LABELS) == expected
    hops = (torch.arange(NUM_CLASSES)[:, None] - torch.arange(NUM_CLASSES)).abs()
    torch.testing.assert_close(
        make(class_distances=hops)(EMB, LABELS), make(class_distances=hops.double())(EMB, LABELS)
    )


def test_arrays_of_any_layout():
    rows = np.random.default_rng(0).standard_normal((6, 3))
    expected = AdaptiveAdditiveMarginLoss(6, 4, class_embeddings=rows).class_embeddings
    for same in (rows[::-1].copy()[::-1], rows.astype(">f8"), np.asfortranarray(rows)):
        assert torch.equal(AdaptiveAdditiveMarginLoss(6, 4, class_embeddings=same).class_embeddings, expected)
    with pytest.raises(ValueError, match="class_embeddings must hold numbers, got a tensor on the meta device"):
        AdaptiveAdditiveMarginLoss(6, 4, class_embeddings=torch.ones(6, 3, device="meta"))


def test_largest_distance_by_sample(monkeypatch):
    """Above the limit it is that of a sample, the same in every call; below it is exact, whatever the chunks."""
    text = torch.randn(40, 3, dtype=torch.float64)
    rows, _ = class_margins_module.prepare_embeddings(text, 40, "euclidean", True)
    assert torch.cdist(rows, rows).max().item() == pytest.approx(1)
    monkeypatch.setattr(class_margins_module, "_ROWS", 7)
    torch.testing.assert_close(class_margins_module.prepare_embeddings(text, 40, "euclidean", True)[0], rows)
    monkeypatch.setattr(class_margins_module, "_MOST_EXACT", 10)
    sampled, same = (class_margins_module.prepare_embeddings(text, 40, "euclidean", True)[0] for _ in range(2))
    assert torch.equal(sampled, same)
    assert 1 < torch.cdist(sampled, sampled).max() < 5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "lengths", [torch.ones(6), torch.tensor([1.0, 2.0, 3.0, 7.0, 0.3, 1.1])], ids=["equal", "parallel"]
)
def test_equal_descriptions(metric, dtype, lengths):
    """All distances are 0: dividing by the largest would make margins of rounding."""
    if metric != "cosine":
        lengths = torch.ones(6)
    text = lengths[:, None].double() * torch.tensor([1.0, 2.0, 3.0]) / 7
    loss_func = make(class_embeddings=text.to(dtype), class_metric=metric, base_margin=0.2)
    torch.testing.assert_close(loss_func(EMB, LABELS), make(base_margin=0.2)(EMB, LABELS))


def test_distances_with_rounding():
    """1 - T T^T in float32 is not quite >= 0."""
    text = torch.nn.functional.normalize(torch.randn(NUM_CLASSES, 8))
    distances = 1 - text @ text.T
    distances[0, 1] = distances[1, 0] = -1e-7
    margins = make(class_distances=distances).get_margins(torch.arange(NUM_CLASSES))
    assert margins[0, 1] == 0
    assert margins.max() == pytest.approx(0.3)


def test_class_at_distance_zero_from_all_keeps_its_column():
    distances = torch.tensor([[0, 1.0, 0.5], [0, 0, 0], [0.5, 1, 0]])
    loss_func = AdaptiveAdditiveMarginLoss(3, 4, class_distances=distances)
    torch.testing.assert_close(loss_func.get_margins(torch.arange(3)), 0.3 * distances)


@pytest.mark.parametrize("length", [1e-20, 1e15])
def test_length_of_descriptions(length):
    """Cosines do not depend on it."""
    for metric in METRICS:
        expected = make(class_embeddings=TEXT, class_metric=metric).get_margins(torch.arange(NUM_CLASSES))
        scaled = make(torch.float32, class_embeddings=(length * TEXT).float(), class_metric=metric)
        torch.testing.assert_close(
            scaled.get_margins(torch.arange(NUM_CLASSES)), expected.float(), rtol=1e-4, atol=1e-6
        )


def test_close_classes_by_euclidean_distance():
    text = TEXT.clone()
    text[1] = text[0] + 1e-4
    margins = margins_by_loops(text.numpy(), "euclidean", True, 0.3, 0.0, "distance")
    actual = make(torch.float32, class_embeddings=text, class_metric="euclidean").get_margins(torch.tensor([0]))
    assert 0 < margins[0, 1] < 1e-4
    assert actual[0, 1].item() == pytest.approx(margins[0, 1], rel=1e-2)


def test_labels_of_margins_are_checked():
    with pytest.raises(ValueError, match="labels must be < num_classes = 6, got 6"):
        make().get_margins(torch.tensor([6]))
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        make().get_margins(torch.tensor([0.5]))


def test_rounding_on_the_diagonal_of_distances():
    distances = (1 - torch.eye(NUM_CLASSES)).fill_diagonal_(-1e-8)
    torch.testing.assert_close(
        make(class_distances=distances)(EMB, LABELS), make(class_distances=1 - torch.eye(NUM_CLASSES))(EMB, LABELS)
    )


def test_close_classes_keep_their_distance():
    """Descriptions far from the origin, close to each other: float32 still sees the distances."""
    text = 100 + torch.randn(NUM_CLASSES, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for metric in METRICS:
        margins = margins_by_loops(text.numpy(), metric, True, 0.3, 0.0, "distance")
        actual = make(torch.float32, class_embeddings=text, class_metric=metric).get_margins(torch.arange(NUM_CLASSES))
        np.testing.assert_allclose(actual, margins, atol=1e-6)


@pytest.mark.compiles
@pytest.mark.parametrize("num_classes", [5, 2000])
def test_compiles(num_classes):
    """Dense where one chunk holds all classes, an opaque call beyond."""
    torch.compiler.reset()
    loss_func = AdaptiveAdditiveMarginLoss(num_classes, SIZE, class_embeddings=torch.randn(num_classes, 3))
    labels = torch.arange(9) % num_classes
    compiled = torch.compile(loss_func, backend="aot_eager", fullgraph=num_classes == 5)
    emb = EMB.float().requires_grad_()
    results = []
    for f in (loss_func, compiled):
        value = f(emb.repeat(40, 1), labels.repeat(40))
        results.append((value, *torch.autograd.grad(value, [emb, loss_func.proxies])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be an integer >= 1, got 0"),
        ({"embedding_size": 1.5}, ValueError, r"embedding_size must be an integer >= 1, got 1\.5"),
        ({"scale": 0}, ValueError, "scale must be > 0 and finite, got 0"),
        ({"margin_scale": math.inf}, ValueError, "margin_scale must be finite, got inf"),
        ({"base_margin": math.nan}, ValueError, "base_margin must be finite, got nan"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or an integer >= 1, got 0"),
        ({"memory": -1}, ValueError, "memory must be an integer >= 0, in bytes, got -1"),
        ({"direction": "far"}, ValueError, "direction must be one of distance, similarity, got 'far'"),
        ({"class_metric": "l1"}, ValueError, "class_metric must be one of cosine, euclidean, squared_euclidean, got"),
        (
            {"class_embeddings": torch.eye(6), "class_distances": torch.eye(6)},
            ValueError,
            "class_embeddings and class_distances must not both be given",
        ),
        ({"class_embeddings": torch.eye(5)}, ValueError, r"class_embeddings must have shape \(6, E\), got \(5, 5\)"),
        ({"class_embeddings": torch.ones(6)}, ValueError, r"class_embeddings must have shape \(6, E\), got \(6,\)"),
        ({"class_embeddings": torch.ones(6, 0)}, ValueError, r"must have shape \(6, E\), got \(6, 0\)"),
        ({"class_embeddings": "names"}, TypeError, r"class_embeddings must be numbers, got text: .*from_text\(names\)"),
        ({"class_embeddings": ["cat", "dog"]}, TypeError, r"class_embeddings must be numbers, got text: .*from_text"),
        ({"class_embeddings": torch.ones(6, 2).bool()}, TypeError, "class_embeddings must have a floating point or"),
        ({"class_embeddings": torch.full((6, 2), math.inf)}, ValueError, "class_embeddings must be finite, or NaN"),
        ({"class_embeddings": torch.zeros(6, 2)}, ValueError, "class_embeddings must describe a class, got rows of"),
        ({"class_distances": torch.zeros(6, 6)}, ValueError, "class_distances must describe a class, got rows of"),
        ({"class_distances": torch.ones(6, 5)}, ValueError, r"class_distances must have shape \(6, 6\), got \(6, 5\)"),
        ({"class_distances": torch.eye(6) - 1}, ValueError, r"class_distances must be >= 0, got -1\.0"),
        ({"class_distances": torch.ones(6, 6)}, ValueError, "class_distances must be zero on the diagonal"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        AdaptiveAdditiveMarginLoss(**({"num_classes": NUM_CLASSES, "embedding_size": SIZE} | kwargs))


def test_single_nan_among_distances():
    distances = 1 - torch.eye(NUM_CLASSES)
    distances[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"NaN for a whole class .* got NaN in row 2, column 3 alone"):
        AdaptiveAdditiveMarginLoss(NUM_CLASSES, SIZE, class_distances=distances)


def test_bad_input():
    loss_func = make()
    with pytest.raises(ValueError, match="labels are required"):
        loss_func(EMB)
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        loss_func(EMB, LABELS, ref_emb=EMB + 1, ref_labels=LABELS)
    with pytest.raises(ValueError, match="labels must be < num_classes = 6, got 6 at position 8"):
        loss_func(EMB, torch.where(LABELS == 3, 6, LABELS))
    with pytest.raises(ValueError, match=r"shape \(batch_size, embedding_size\) = \(9, 5\), got \(9, 4\)"):
        loss_func.get_logits(EMB[:, :4])


def test_reducers_see_each_sample():
    each = make(reducer=DoNothingReducer())(EMB, LABELS)["loss"]
    assert each["losses"].shape == each["indices"].shape == LABELS.shape
    assert each["divisor"] == 9
    torch.testing.assert_close(make(reducer=DivisorReducer())(EMB, LABELS), each["losses"].mean())


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"class_metric": "cosine"}, {"class_metric": "euclidean"}),
        ({"class_metric": "cosine"}, {"class_metric": "squared_euclidean"}),
        ({"normalize": False}, {"normalize": True}),
    ],
)
def test_a_state_of_other_margins_is_refused(saved, loaded):
    """Buffers mean what the settings say: loaded into others, the margins would be those of neither."""
    state = make(class_embeddings=TEXT, **saved).state_dict()
    loss_func = make(class_embeddings=TEXT.flip(0), **loaded)
    before = {name: x.clone() for name, x in loss_func.state_dict().items()}
    with pytest.raises(RuntimeError, match="class_metric and normalize must be those that the state's margins"):
        loss_func.load_state_dict(state)
    assert all(torch.equal(x, before[name]) for name, x in loss_func.state_dict().items())
    again = make(class_embeddings=TEXT.flip(0), direction="similarity", **saved)  # which changes no buffer
    again.load_state_dict(state)
    assert torch.equal(again.class_embeddings, state["class_embeddings"])


def test_a_distance_matrix_says_whether_it_is_normalized():
    distances = 3 * (1 - torch.eye(NUM_CLASSES))
    state = make(class_distances=distances, normalize=False).state_dict()
    message = r"those that the state's margins were made by, class_distances, normalize=False, got .* normalize=True"
    with pytest.raises(RuntimeError, match=message):
        make(class_distances=distances).load_state_dict(state)
    make(class_distances=distances, normalize=False).load_state_dict(state)


def test_states_of_old_versions_load():
    state = make(class_embeddings=TEXT).state_dict()
    del state["class_settings"]
    loss_func = make(class_embeddings=TEXT.flip(0))
    loss_func.load_state_dict(state)
    assert torch.equal(loss_func.class_embeddings, state["class_embeddings"])


def test_descriptions_that_require_a_gradient_are_refused():
    for name, x in (("class_embeddings", TEXT.clone()), ("class_distances", 1 - torch.eye(NUM_CLASSES))):
        with pytest.raises(TypeError, match=rf"{name} must not require a gradient, .* \.detach\(\)"):
            make(**{name: x.requires_grad_()})
