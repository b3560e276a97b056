"""Pairs of samples, as PML's losses and miners hand them on."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from pml_ext.precision import full_precision
from pml_ext.types import Indices
from pml_ext.validation import check_values

__all__ = ["pairs_from_multilabel"]

Rule = Literal["any", "all"]
_told = threading.local()  # which torch.compile reads, with a guard; a ContextVar it does not before PyTorch 2.14


def pairs_from_multilabel(labels: Tensor, rule: Rule = "any") -> Indices:
    """Return all positive and all negative pairs of samples that have several classes each.

    Losses that compare samples take them as ``indices_tuple``, with ``labels=None``. Losses with proxies have no
    multi-label form.

    Args:
        labels: ``(B, C)``, multi-hot: a number > 0, or True, where a sample has a class; else 0 or False.
        rule: "any": samples with a class in common are positives, all others negatives. "all": samples with the same
            classes are positives, those without a common one negatives; samples that share some classes form no pair. A
            sample without a class is in no positive pair.

    Returns:
        ``(a1, p, a2, n)``, int64: anchors and positives, anchors and negatives, in both directions. No sample is its
        own positive or negative.

    Raises:
        TypeError: If ``labels`` are not a dense tensor of numbers or bool.
        ValueError: If their shape or ``rule`` is invalid, or a number is negative or NaN.

    Examples:
        >>> multi_hot = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]])
        >>> pairs_from_multilabel(multi_hot)
        (tensor([0, 1]), tensor([1, 0]), tensor([0, 1, 2, 2]), tensor([2, 2, 0, 1]))
        >>> from pml_ext.losses import MultiSimilarityLoss
        >>> MultiSimilarityLoss()(torch.eye(3), None, pairs_from_multilabel(multi_hot))
        tensor(0.4378)
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.is_complex() or labels.layout != torch.strided:
        raise TypeError(f"labels must be a dense tensor of numbers or bool, got {labels.dtype}, {labels.layout}")
    check_values("labels", labels)
    if labels.ndim != 2:
        raise ValueError(f"labels must be multi-hot, of shape (batch_size, num_classes), got {tuple(labels.shape)}")
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    wide = labels.double()
    if not bool((wide >= 0).all()):  # -1 says in many data sets that nothing is known
        raise ValueError("labels must be multi-hot, numbers >= 0, got a negative number or NaN")
    has = (wide > 0).float()
    with full_precision(labels.device):  # bfloat16 cannot count beyond 256
        common = has @ has.T  # how many classes two samples share
    positive, negative = common > 0, common == 0
    if rule == "all":
        count = has.sum(1)
        positive &= (common == count) & (common == count[:, None])
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    (a1, p), (a2, n) = ((x & ~itself).nonzero(as_tuple=True) for x in (positive, negative))
    return a1, p, a2, n


def positive_pairs(labels: Tensor, ref_labels: Tensor | None, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the anchors and positives of all pairs of one label, in the order of anchors, without a matrix of pairs.

    Args:
        labels: ``(B,)``, int64.
        ref_labels: ``(R,)``, int64. None: of the batch itself, in which no sample is its own positive.
        own: ``(B,)``, where in the references each sample itself lies. None: nowhere.
    """
    if ref_labels is None:
        ref_labels, own = labels, torch.arange(len(labels), device=labels.device)
    in_order, order = ref_labels.sort(stable=True)
    first, last = (torch.searchsorted(in_order, labels, right=right) for right in (False, True))
    anchors = torch.repeat_interleave(last - first)
    within = torch.arange(len(anchors), device=anchors.device) + (last - (last - first).cumsum(0))[anchors]
    positives = order[within]
    if own is not None:
        keep = own[anchors] != positives
        anchors, positives = anchors[keep], positives[keep]
    return anchors, positives


def joined(first: Indices, second: Indices) -> Indices:
    """Return the pairs or triplets of two tuples, in the form of the first.

    Of pairs, triplets are made by joining positive and negative pairs of one anchor; each triplet is a positive and a
    negative pair.
    """
    if len(first) == 4 and len(second) == 3:
        second = second[0], second[1], second[0], second[2]
    elif len(first) == 3 and len(second) == 4:
        a1, p, a2, n = second
        positive, negative = (a1[:, None] == a2).nonzero(as_tuple=True)
        second = a1[positive], p[positive], n[negative]
    together = [torch.cat([x, y.to(x.device, torch.int64)]) for x, y in zip(first, second, strict=True)]
    return tuple(together)  # type: ignore[return-value]


def without_pairs(indices_tuple: Indices, own: Tensor) -> Indices:
    """Return pairs or triplets without those in which a sample is its own positive.

    A sample is never its own negative.

    Args:
        indices_tuple: Anchors count the batch, positives and negatives the references.
        own: ``(B,)``, where in the references each sample of the batch lies.
    """
    anchors, positives, *rest = indices_tuple
    keep = own[anchors] != positives
    if len(indices_tuple) == 3:
        return anchors[keep], positives[keep], rest[0][keep]
    return anchors[keep], positives[keep], rest[0], rest[1]


@contextmanager
def own_rows_at(places: Tensor | None) -> Iterator[None]:
    """Tell the losses called inside where in the references the samples themselves lie: these are no pairs.

    It spares a list of all other pairs. For losses with ``leaves_out_own``.

    Args:
        places: ``(B,)``, int64, rows of ``ref_emb``. None: nowhere.
    """
    before = own_places()
    _told.places = places
    try:
        yield
    finally:
        _told.places = before


def own_places() -> Tensor | None:
    """Return where in the references the samples themselves lie, ``(B,)``, None for nowhere."""
    places: Tensor | None = getattr(_told, "places", None)
    return places
