"""Pairs of samples with several classes, and tuples put together."""

import itertools

import pytest
import torch
from pytorch_metric_learning import losses

from pml_ext.losses import MultiSimilarityLoss
from pml_ext.pairs import joined, pairs_from_multilabel
from tests.pml_internals import lmu

CLASSES = [{0, 1}, {0}, {1, 2}, {0, 1}, {3}, set()]
LABELS = torch.tensor([[int(c in own) for c in range(4)] for own in CLASSES])
EMB = torch.randn(len(CLASSES), 5, generator=torch.Generator().manual_seed(0))


def pairs_by_hand(rule):
    """Return positive and negative pairs by Python's sets."""
    positive, negative = set(), set()
    for i, j in itertools.permutations(range(len(CLASSES)), 2):
        common = CLASSES[i] & CLASSES[j]
        if common and (rule == "any" or CLASSES[i] == CLASSES[j]):
            positive.add((i, j))
        if not common:
            negative.add((i, j))
    return positive, negative


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("rule", ["any", "all"])
def test_pairs_are_those_of_sets(rule, dtype):
    a1, p, a2, n = pairs_from_multilabel(LABELS.to(dtype), rule)
    positive, negative = pairs_by_hand(rule)
    assert len(a1) == len(positive) and len(a2) == len(negative)
    assert set(zip(a1.tolist(), p.tolist(), strict=True)) == positive
    assert set(zip(a2.tolist(), n.tolist(), strict=True)) == negative


@pytest.mark.parametrize("rule", ["any", "all"])
def test_one_class_each_is_what_labels_give(rule):
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    pairs = pairs_from_multilabel(torch.nn.functional.one_hot(labels), rule)
    assert all(torch.equal(a, b) for a, b in zip(pairs, lmu.get_all_pairs_indices(labels), strict=True))
    for loss_func in (MultiSimilarityLoss(), losses.MultiSimilarityLoss(), losses.ContrastiveLoss()):
        torch.testing.assert_close(loss_func(EMB, None, pairs), loss_func(EMB, labels))


def test_bad_input():
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        pairs_from_multilabel([[1, 0]])
    with pytest.raises(ValueError, match=r"labels must be multi-hot, .* got \(3,\)"):
        pairs_from_multilabel(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="rule must be one of any, all, got 'most'"):
        pairs_from_multilabel(LABELS, "most")


def test_the_error_of_multi_hot_labels_leads_here():
    for labels in (LABELS, LABELS.bool(), LABELS.float()):
        with pytest.raises(ValueError, match=r"\(6, 4\): several classes .*=pml_ext\.pairs\.pairs_from_multilabel"):
            MultiSimilarityLoss()(EMB, labels)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 4), (4, 3), (4, 4)])
def test_tuples_are_joined_as_in_pml(first, second):
    pairs = tuple(torch.tensor(x) for x in ([0, 1, 1], [1, 0, 2], [0, 0, 1, 3], [4, 5, 4, 0]))
    triplets = tuple(torch.tensor(x) for x in ([0, 2], [1, 3], [4, 5]))
    one, two = (pairs if n == 4 else triplets for n in (first, second))
    convert = lmu.convert_to_pairs if first == 4 else lmu.convert_to_triplets
    expected = [torch.cat([x, y]) for x, y in zip(one, convert(two, None), strict=True)]
    for x, y in zip(joined(one, two), expected, strict=True):
        assert torch.equal(x, y)


def test_counts_beyond_the_digits_of_bfloat16():
    """300 classes each: where autocast counts, 299 common ones are all."""
    labels = torch.zeros(3, 400)
    labels[:2, :300] = 1
    labels[2, 1:301] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a1, p, a2, _ = pairs_from_multilabel(labels, "all")
    assert list(zip(a1.tolist(), p.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert not len(a2)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS - 1, ValueError, "labels must be multi-hot, numbers >= 0, got a negative number or NaN"),
        (LABELS / 0, ValueError, "labels must be multi-hot, numbers >= 0, got a negative number or NaN"),
        (LABELS * 1j, TypeError, "labels must be a dense tensor of numbers or bool, got torch.complex64"),
        (LABELS.to_sparse(), TypeError, "labels must be a dense tensor of numbers or bool, got .*sparse_coo"),
        (LABELS.to("meta"), ValueError, "labels must hold numbers, got a tensor on the meta device"),
    ],
)
def test_what_is_not_multi_hot(labels, error, message):
    with pytest.raises(error, match=message):
        pairs_from_multilabel(labels)
