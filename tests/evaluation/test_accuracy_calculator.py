import logging

import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils import accuracy_calculator
from torch import nn

from pml_ext.evaluation import AccuracyCalculator

CPU = torch.device("cpu")
X = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(30, (90,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"avg_of_avgs": True},
        {"return_per_class": True},
        {"k": "max_bin_count"},
        {"k": 5, "exclude": ("r_precision", "mean_average_precision_at_r")},
        {"include": ("NMI", "mean_reciprocal_rank", "precision_at_1")},
    ],
    ids=str,
)
@pytest.mark.parametrize("reference", ["none", "other", "with the queries"])
def test_values_are_those_of_pml(settings, reference):
    args = {
        "none": (X, Y),
        "other": (X[:40], Y[:40], X[40:], Y[40:]),
        "with the queries": (X[:40], Y[:40], X, Y, True),
    }[reference]
    right = accuracy_calculator.AccuracyCalculator(device=CPU, **settings).get_accuracy(*args)
    ours = AccuracyCalculator(device=CPU, **settings).get_accuracy(*args)
    assert list(ours) == [name for name in right if name in ours] and ours.keys() == right.keys()
    for name, value in right.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
    if not settings:
        assert 0 < right["mean_average_precision"] < 1


def test_r_precision_does_not_depend_on_k():
    names = ("r_precision", "mean_average_precision_at_r")
    right = AccuracyCalculator(include=names, device=CPU).get_accuracy(X, Y)
    assert AccuracyCalculator(include=names, k=1, device=CPU).get_accuracy(X, Y) == right


def test_names_of_a_call():
    calculator = AccuracyCalculator(exclude=("NMI", "AMI"), device=CPU)
    assert set(calculator.get_accuracy(X, Y, include=("precision_at_1",))) == {"precision_at_1"}
    assert set(calculator.get_accuracy(X, Y, exclude=("precision_at_1",))) == {
        "r_precision", "mean_average_precision_at_r", "mean_average_precision", "mean_reciprocal_rank"
    }  # fmt: skip


def test_large_labels_stay_apart():
    calculator = AccuracyCalculator(include=("precision_at_1",), device=CPU)
    right = calculator.get_accuracy(X, Y)
    assert 0 < right["precision_at_1"] < 0.5
    assert calculator.get_accuracy(X, Y + 2**31) == right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_clusters_of_any_dtype(dtype):
    """k-means gets float32, as PML gives it; NumPy has no bfloat16."""
    calculator = AccuracyCalculator(include=("NMI",), device="cpu")
    x = X.bfloat16().to(dtype)
    assert calculator.get_accuracy(x, Y) == pytest.approx(calculator.get_accuracy(x.float(), Y), abs=1e-9)


class _Data(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return X[self.rows[i]], Y[self.rows[i]] + 2**40


@pytest.mark.parametrize("splits", [None, [("query", ["gallery"]), ("gallery", ["gallery"])]])
def test_in_a_tester_of_pml(splits, caplog):
    caplog.set_level(logging.CRITICAL)
    calculator = AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), device=CPU)
    tester = GlobalEmbeddingSpaceTester(
        normalize_embeddings=False, data_device=CPU, dataloader_num_workers=0, accuracy_calculator=calculator
    )
    data = {"query": _Data(range(40)), "gallery": _Data(range(40, 90))}
    accuracies = tester.test(data, 0, nn.Identity(), splits_to_eval=splits)
    alone = {"query": (X[:40], Y[:40]), "gallery": (X[40:], Y[40:])}
    right = calculator.get_accuracy(*alone["gallery"])
    assert accuracies["gallery"]["precision_at_1_level0"] == right["precision_at_1"]
    right = calculator.get_accuracy(*alone["query"], *(alone["gallery"] if splits else ()))
    assert accuracies["query"]["mean_average_precision_at_r_level0"] == right["mean_average_precision_at_r"]


def test_bad_arguments():
    calculator = AccuracyCalculator(device=CPU)
    with pytest.raises(ValueError, match="query must be finite, got nan"):
        calculator.get_accuracy(X * torch.nan, Y)
    with pytest.raises(ValueError, match="reference must begin with the rows of query"):
        calculator.get_accuracy(X[:5], Y[:5], X[5:], Y[5:], ref_includes_query=True)
    with pytest.raises(ValueError, match="reference must begin with the rows of query"):
        calculator.get_accuracy(X, Y, X[:5], Y[:5], ref_includes_query=True)
    with pytest.raises(ValueError, match="reference_labels must come with reference, got reference alone"):
        calculator.get_accuracy(X, Y, X)  # would be compared with the labels of queries
    with pytest.raises(ValueError, match="reference must come with reference_labels"):
        calculator.get_accuracy(X, Y, None, Y)
    with pytest.raises(ValueError, match=r"query_labels must have shape \(90,\), one for each row, got \(90, 1\)"):
        calculator.get_accuracy(X, Y[:, None])
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1, got 0"):
        AccuracyCalculator(chunk_size=0)
    with pytest.raises(ValueError, match="Primary metrics"):
        AccuracyCalculator(include=("recall",))

    class WithOwn(AccuracyCalculator):
        def calculate_precision_at_7(self, knn_labels, **kwargs):
            return 0.0

    with pytest.raises(TypeError, match=r"a subclass must not add metrics, .* got precision_at_7"):
        WithOwn(device=CPU)
