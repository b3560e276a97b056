"""The losses that the contract is checked for: a new loss is one line."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pml_ext.losses import AdaptiveAdditiveMarginLoss, HybridLoss, MultiSimilarityLoss, ProxyAnchorLoss

NUM_CLASSES, SIZE = 5, 6
LABELS = torch.tensor([4, 4, 1, 1, 1, 0, 0, 4, 3, 0, 2, 2])


class Case(NamedTuple):
    """How to make a loss for NUM_CLASSES and SIZE, and what it can do."""

    make: Callable[..., Any]
    refs: bool  # takes ref_emb
    wrapper_refs: bool  # CrossBatchMemory takes it
    per_class: bool = False  # its "element" losses are per class
    reduced: bool = False  # its losses are already reduced: reducers see one number for each sub-loss


CASES = {
    "MultiSimilarityLoss": Case(MultiSimilarityLoss, refs=True, wrapper_refs=True),
    "ProxyAnchorLoss": Case(lambda **kw: ProxyAnchorLoss(NUM_CLASSES, SIZE, **kw), False, False, per_class=True),
    "AdaptiveAdditiveMarginLoss": Case(
        lambda **kw: AdaptiveAdditiveMarginLoss(
            NUM_CLASSES, SIZE, class_embeddings=torch.randn(NUM_CLASSES, 4), base_margin=0.1, **kw
        ),
        refs=False,
        wrapper_refs=False,
    ),
    "HybridLoss": Case(lambda **kw: HybridLoss(NUM_CLASSES, SIZE, **kw), True, True, reduced=True),
}


def make(case: Case, **kwargs: Any) -> Any:
    """Return the loss with the same parameters in every call."""
    torch.manual_seed(7)
    return case.make(**kwargs)


def embeddings(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return a leaf of shape (12, SIZE) that requires grad."""
    emb = torch.randn(len(LABELS), SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return emb.to(dtype).requires_grad_()
