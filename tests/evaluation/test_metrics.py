import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.utils import accuracy_calculator

from pml_ext.evaluation import METRICS, AccuracyCalculator, retrieval_metrics
from pml_ext.evaluation.ranking import RANKED
from tests.evaluation.reference import values_of_queries

ALL = (*RANKED, "precision_at_k", "recall_at_k", "hit_rate_at_k")
KS = (1, 2, 4, 8)


X, Y = torch.randn(6, 3), [0, 0, 1, 1, 2, 2]
BAD = X.clone()
BAD[4] = math.nan
HUGE = X.clone()
HUGE[2] *= 1e20


def expected(values, average):
    """The averages of the reference's values."""
    names = values[0][1]
    by_class = {}
    for label, of_query in values:
        by_class.setdefault(label, []).append(of_query)
    means = {label: {n: np.mean([v[n] for v in rows]) for n in names} for label, rows in by_class.items()}
    if average == "micro":
        return {n: np.mean([v[n] for _, v in values]) for n in names}
    if average == "macro":
        return {n: np.mean([of_class[n] for of_class in means.values()]) for n in names}
    return {n: {label: of_class[n] for label, of_class in means.items()} for n in names}


def check(metrics, values, num_without, average):
    counts = {"num_queries": len(values), "num_without_match": num_without}
    assert {name: metrics.pop(name) for name in counts} == counts
    right = expected(values, average)
    assert metrics.keys() == right.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(right[name], abs=1e-9), name


@given(
    st.integers(2, 30), st.integers(1, 4), st.integers(1, 6), st.integers(0, 25),
    st.sampled_from(["micro", "macro", None]), st.integers(0, 10**6), st.booleans(), st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_matches_loops(num_queries, width, num_classes, num_gallery, average, seed, has_ignored, chunk_size):
    """Small integers make many exact ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (num_queries + num_gallery, width), generator=generator).float()
    y = torch.randint(-1, num_classes, (len(x),), generator=generator)
    queries, labels, gallery, gallery_labels = x[:num_queries], y[:num_queries], x[num_queries:], y[num_queries:]
    rest = (gallery, gallery_labels) if num_gallery else ()
    kwargs = {"ignore_label": -1} if has_ignored else {}
    lists = [part.tolist() for part in (labels, *rest)]
    values, num_without = values_of_queries(
        queries, lists[0], *((rest[0], lists[2]) if rest else ()), ignored=-1 if has_ignored else None
    )
    call = dict(metrics=ALL, k=KS, average=average, chunk_size=chunk_size, **kwargs)
    if not values:
        with pytest.raises(ValueError, match="labels must have a match"):
            retrieval_metrics(queries, labels, *rest, **call)
    else:
        check(retrieval_metrics(queries, labels, *rest, **call), values, num_without, average)


def test_by_hand():
    """Classes a and b on a line at 0 1 2.5 | 1.6 4, and c alone at 9.

    Neighbors of 0: 1 1.6 2.5 4; of 1: 1.6 0 2.5 4; of 2.5: 1.6 1 4 0 (1.5 away both, 1 comes first by index);
    of 1.6: 1 2.5 0 4 (0.6, 0.9, 1.6, 2.4); of 4: 2.5 1.6.
    """
    points, labels = torch.tensor([[0.0], [1.0], [2.5], [1.6], [4.0], [9.0]]), list("aaabbc")
    metrics = retrieval_metrics(points, labels, metrics=("precision_at_1", "r_precision", "recall_at_2"), average=None)
    assert metrics == {
        "precision_at_1": {"a": pytest.approx(1 / 3), "b": 0.0},
        "r_precision": {"a": pytest.approx((1 / 2 + 1 / 2 + 1 / 2) / 3), "b": 0.0},
        "recall_at_2": {"a": 1.0, "b": 0.5},
        "num_queries": 5,
        "num_without_match": 1,
    }
    micro = retrieval_metrics(points, labels, metrics=("mean_average_precision_at_r", "mean_reciprocal_rank"))
    # AP@R: 0: (1 + 0) / 2; 1: (0 + 1/2) / 2; 2.5: (0 + 1/2) / 2; 1.6 and 4 of b: 0.
    assert micro["mean_average_precision_at_r"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 5)
    assert micro["mean_reciprocal_rank"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 / 4 + 1 / 2) / 5)


def test_distractors_are_searched_but_never_asked_and_never_right():
    points, labels = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]]), [7, -1, 7, -1, -1]
    junk = retrieval_metrics(points, labels, metrics=("precision_at_1", "recall_at_2"), ignore_label=-1)
    assert junk == {"precision_at_1": 0.0, "recall_at_2": 1.0, "num_queries": 2, "num_without_match": 0}
    assert retrieval_metrics(points, labels, metrics=("precision_at_1",))["num_queries"] == 5
    with pytest.raises(ValueError, match="labels must have a match among the other queries for one query at least"):
        retrieval_metrics(points, [-1] * 5, ignore_label=-1)


@pytest.mark.parametrize("kind", ["random", "tied", "duplicated", "imbalanced"])
@pytest.mark.parametrize("has_gallery", [False, True])
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_values_are_those_of_pml(kind, has_gallery, average, device):
    generator = torch.Generator().manual_seed(5)
    x = torch.nn.functional.normalize(torch.randn(400, 12, generator=generator))
    y = torch.randint(40, (400,), generator=generator)
    if kind == "tied":
        x = (2 * x).round()
    elif kind == "duplicated":
        x[200:] = x[:200].clone()
    elif kind == "imbalanced":
        y = torch.where(torch.rand(400, generator=generator) < 0.6, 0, y)
    args = (x[:150], y[:150], x[150:], y[150:]) if has_gallery else (x, y)
    names = ("precision_at_1", *RANKED, "NMI", "AMI")
    pml = accuracy_calculator.AccuracyCalculator(
        include=names, avg_of_avgs=average == "macro", device=torch.device("cpu")
    )
    metrics = retrieval_metrics(*args, metrics=names, average=average, device=device)
    right = pml.get_accuracy(*args)
    assert 0 < right["mean_average_precision_at_r"] < 1
    assert {name: metrics[name] for name in names} == pytest.approx(right, abs=1e-6)


OFFSETS = [0, 2**24, 2**31, 2**53, 2**63 - 100, -(2**63)]


@pytest.mark.parametrize("offset", OFFSETS)
def test_large_labels_stay_apart(offset):
    x, y = torch.randn(60, 4), torch.arange(60) % 20
    right = retrieval_metrics(x, y)
    assert right["precision_at_1"] < 0.5
    large = [int(label) + offset for label in y]
    assert retrieval_metrics(x, large) == right
    assert retrieval_metrics(x, np.array(large)) == right
    assert retrieval_metrics(x, torch.tensor(large)) == right


def test_averages_of_classes_that_have_no_match():
    x, y = torch.randn(9, 2), [0, 0, 1, 1, 2, 3, 4, 5, 6]
    metrics = retrieval_metrics(x, y, average=None)
    assert set(metrics["r_precision"]) == {0, 1}
    assert metrics["num_without_match"] == 5
    macro = retrieval_metrics(x, y, average="macro")["r_precision"]
    assert macro == pytest.approx(np.mean(list(metrics["r_precision"].values())))


def test_result_is_strict_json():
    metrics = retrieval_metrics(torch.randn(8, 2), np.arange(8) // 2, metrics=(*ALL, "NMI"), k=100)
    loaded = json.loads(json.dumps(metrics, allow_nan=False))
    assert loaded == metrics and loaded["recall_at_100"] == 1.0 and loaded["precision_at_100"] == 0.01
    by_class = retrieval_metrics(torch.randn(8, 2), np.arange(8) // 2, average=None)
    assert json.loads(json.dumps(by_class, allow_nan=False))["r_precision"].keys() == {"0", "1", "2", "3"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x, y = torch.randn(80, 5).to(dtype), torch.arange(80) % 9
    assert retrieval_metrics(x, y, metrics=ALL) == retrieval_metrics(x.float(), y, metrics=ALL)
    assert retrieval_metrics(x, y, x.float(), y)["precision_at_1"] == 1.0


def test_float64_is_not_rounded():
    """Two neighbors that float32 cannot tell apart."""
    x = torch.tensor([[1.0], [2.0 + 1e-12], [0.0]], dtype=torch.float64)
    assert retrieval_metrics(x, [0, 1, 0], metrics=("precision_at_1",))["precision_at_1"] == 1.0
    rounded = retrieval_metrics(x.float(), [0, 1, 0], metrics=("precision_at_1",))
    assert rounded["precision_at_1"] == 0.5  # a tie: by index


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gallery_is_not_rounded_to_the_dtype_of_queries(narrow):
    """Its last row is the nearest, by a difference that only the gallery's dtype holds."""
    wide = torch.float64 if narrow == torch.float32 else torch.float32
    step = 1e-9 if narrow == torch.float32 else 1e-4
    gallery = torch.tensor([[1.0], [1.0 + step], [1.0 + 2 * step]], dtype=wide)
    queries = torch.tensor([[2.0]], dtype=narrow)
    assert retrieval_metrics(queries, [1], gallery, [0, 0, 1])["precision_at_1"] == 1.0
    calculator = AccuracyCalculator(include=("precision_at_1",), device="cpu")
    assert calculator.get_accuracy(queries, [1], gallery, [0, 0, 1]) == {"precision_at_1": 1.0}


def test_distances_that_would_overflow_are_refused():
    """Else an infinite distance would be as far as the query itself, which is left out by one: MAP was 1.25."""
    x = torch.tensor([[1.8e19], [-1.8e19], [1.0], [-1.8e19]])
    with pytest.raises(ValueError, match=r"got 1.8e\+19, distances of which torch.float32 cannot hold, in row 0"):
        retrieval_metrics(x, [0, 1, 0, 1])
    metrics = retrieval_metrics(x / 2, [0, 1, 1, 0], metrics=("mean_average_precision",))
    assert metrics["mean_average_precision"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 3) / 4)


@pytest.mark.parametrize("k", [np.int64(3), torch.tensor(3), np.array([3]), torch.tensor([3]), range(3, 4)], ids=repr)
def test_kinds_of_k(k):
    names = list(retrieval_metrics(X, Y, metrics=iter(["recall_at_k"]), k=k))
    assert names[0] == "recall_at_3" and len(names) == 3


def test_k_may_be_huge():
    metrics = retrieval_metrics(X, Y, metrics=("precision_at_k", "recall_at_k"), k=10**20)
    assert metrics[f"recall_at_{10**20}"] == 1.0 and metrics[f"precision_at_{10**20}"] == pytest.approx(1e-20)


@pytest.mark.parametrize(
    "form", ["reversed", "other byte order", "read only", "columns of a larger one", "with a graph"]
)
def test_forms_of_embeddings(form):
    x, y = torch.randn(30, 6), torch.arange(30) % 7
    right = retrieval_metrics(x, y)
    array = x.numpy()
    if form == "reversed":
        array = array[::-1].copy()[::-1]
    elif form == "other byte order":
        array = array.astype(">f4")
    elif form == "read only":
        array.setflags(write=False)
    elif form == "columns of a larger one":
        array = torch.cat([x, x], 1)[:, :6]
        assert not array.is_contiguous()
    else:
        array = x.clone().requires_grad_()
    assert retrieval_metrics(array, y) == right


def test_names_of_metrics():
    x, y = torch.randn(8, 2), [0, 1] * 4
    assert list(retrieval_metrics(x, y)) == [*METRICS, "num_queries", "num_without_match"]
    names = list(retrieval_metrics(x, y, metrics=("recall_at_k", "precision_at_3", "recall_at_2"), k=(4, 2)))
    assert names[:3] == ["recall_at_4", "recall_at_2", "precision_at_3"] and len(names) == 5


def test_progress(capsys):
    retrieval_metrics(torch.randn(8, 2), [0, 1] * 4, progress=True)
    assert "searching" in capsys.readouterr().err


OTHERS = {"gallery": X, "gallery_labels": Y}


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((BAD, Y), {}, ValueError, "embeddings must be finite, got nan in row 4; 1 of 6 rows: 4"),
        ((X / 0, Y), {}, ValueError, r"finite, got -?inf in row 0; 6 of 6 rows: 0, 1, 2, 3, 4, \.\.\."),
        ((HUGE, Y), {}, ValueError, r"got .*e\+\d\d, distances of which torch.float32 cannot hold"),
        ((np.ma.masked_array(X, X[3, 1] == X), Y), {}, ValueError, "embeddings must be finite, got nan in row 3"),
        ((X.to_sparse(), Y), {}, ValueError, "embeddings must hold a number at each place, .* torch.sparse_coo"),
        ((X.to("meta"), Y), {}, ValueError, "embeddings must hold a number at each place, .* on meta"),
        ((X, Y, BAD, Y), {}, ValueError, "gallery must be finite, got nan in row 4"),
        ((X, Y, X[:, :2], Y), {}, ValueError, r"gallery must have shape \(N, 3\), got \(6, 2\)"),
        ((X[0], Y), {}, ValueError, r"embeddings must have shape \(N, D\), got \(3,\)"),
        ((X[:0], []), {}, ValueError, r"embeddings must have at least one row and one column, got shape \(0, 3\)"),
        ((X, Y, X[:0], []), {}, ValueError, r"gallery must have at least one row"),
        ((X.long(), Y), {}, TypeError, "embeddings must be a tensor or an array with a floating .*got torch.int64"),
        (([[1.0]], [0]), {}, TypeError, "embeddings must be a tensor or an array .*got list"),
        ((X, Y[:5]), {}, ValueError, "labels must have one entry for each of 6 rows, got 5"),
        ((X, Y, X, Y[:5]), {}, ValueError, "gallery_labels must have one entry for each of 6 rows, got 5"),
        ((X, Y, X), {}, ValueError, "gallery_labels must come with gallery, got gallery alone"),
        ((X, Y), {"gallery_labels": Y}, ValueError, "gallery must come with gallery_labels, got gallery_labels alone"),
        ((X, range(6)), {}, ValueError, "a match among the other queries .*, got none for 6 queries"),
        ((X, Y, X, [9] * 6), {}, ValueError, "labels must have a match in the gallery for one query at least"),
        ((X, Y), {"metrics": ("map",)}, ValueError, "metrics must be precision_at_k, .*, got 'map'"),
        ((X, Y), {"metrics": ("recall_at_0",)}, ValueError, "metrics must be"),
        ((X, Y), {"metrics": "r_precision"}, ValueError, "metrics must be a sequence of names, .*'r_precision'"),
        ((X, Y), {"metrics": ()}, ValueError, r"metrics must be a sequence of names, at least one, got \[\]"),
        ((X, Y), {"k": 0}, ValueError, "k must be an integer >= 1, got 0"),
        ((X, Y), {"k": 3.0}, ValueError, "k must be an integer >= 1, got 3.0"),
        ((X, Y), {"metrics": None}, ValueError, "metrics must be a sequence of names, at least one, got None"),
        ((X, Y), {"k": ()}, ValueError, r"k must be an integer or a sequence .*got \(\)"),
        ((X, Y), {"average": "weighted"}, ValueError, "average must be 'micro', 'macro' or None, got 'weighted'"),
        ((X, Y), {"average": None, "metrics": ("NMI",)}, ValueError, "average must be 'micro' or 'macro' for NMI"),
        ((X, Y), {"chunk_size": 0}, ValueError, "chunk_size must be an integer >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        retrieval_metrics(*args, **kwargs)
