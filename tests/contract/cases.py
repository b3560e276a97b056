"""The losses that the contract is checked for: a new loss is one line."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pml_ext.losses import (
    AdaptiveAdditiveMarginLoss,
    CrossBatchMemory,
    DivergenceLoss,
    EnsembleLoss,
    HybridLoss,
    IntraBatchLoss,
    LabelSmoothingCrossEntropyLoss,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
    SelfSupervisedLoss,
)
from pml_ext.trunks import IntraBatchRefiner

NUM_CLASSES, SIZE = 5, 6
LABELS = torch.tensor([4, 4, 1, 1, 1, 0, 0, 4, 3, 0, 2, 2])


# What a case refuses, in the words of the table's columns (tests/contract/battery.py)
REDUCED = frozenset(
    {"Mean-, Sum-, AvgNonZero-, DivisorReducer", "ThresholdReducer", "ClassWeightedReducer", "PerAnchorReducer"}
)
UNKNOWN_TO_PML = frozenset({"PML's CrossBatchMemory", "PML's SelfSupervisedLoss"})  # which admit classes by name
WITH_PARAMETERS = UNKNOWN_TO_PML | {"our SelfSupervisedLoss", "PML's DistributedLossWrapper"}
WITHOUT_PAIRS = frozenset({"ref_emb", "our CrossBatchMemory"})
PROXIES_ALONE = WITH_PARAMETERS | WITHOUT_PAIRS
OF_LOSSES = REDUCED | UNKNOWN_TO_PML | {"weight regularizers", "other distances"}  # which go to the losses inside
NOT_MINED = frozenset({"triplet miners", "pair miners"})
STREAMED = frozenset({"double backward"})


class Case(NamedTuple):
    """How to make a loss for NUM_CLASSES and SIZE, and what it can do."""

    make: Callable[..., Any]
    refuses: frozenset[str] = frozenset()  # columns
    per_class: bool = False  # its "element" losses are per class
    batch_norm: bool = False  # eval mode is another loss
    without_pairs: Callable[[Any, torch.Tensor], torch.Tensor] | None = None  # what is left when nothing is mined

    @property
    def refs(self) -> bool:
        """Whether it takes ref_emb."""
        return "ref_emb" not in self.refuses

    @property
    def uses_labels(self) -> bool:
        """Otherwise labels and indices_tuple are ignored."""
        return "pair miners" not in self.refuses


def make_margin_loss(embedding_size: int = SIZE, **kwargs: Any) -> AdaptiveAdditiveMarginLoss:
    descriptions = torch.randn(NUM_CLASSES, 4)
    return AdaptiveAdditiveMarginLoss(
        NUM_CLASSES, embedding_size, class_embeddings=descriptions, base_margin=0.1, **kwargs
    )


def make_intra_batch_loss(**kwargs: Any) -> IntraBatchLoss:
    return IntraBatchLoss(NUM_CLASSES, SIZE, IntraBatchRefiner(SIZE, dropout=0.0), **kwargs)


CASES = {
    "MultiSimilarityLoss": Case(MultiSimilarityLoss, frozenset({"weight regularizers"})),
    "ProxyAnchorLoss": Case(
        lambda **kw: ProxyAnchorLoss(NUM_CLASSES, SIZE, **kw), PROXIES_ALONE | STREAMED, per_class=True
    ),
    "AdaptiveAdditiveMarginLoss": Case(make_margin_loss, PROXIES_ALONE | {"double backward"}),
    "HybridLoss": Case(
        lambda **kw: HybridLoss(NUM_CLASSES, SIZE, **kw),
        WITH_PARAMETERS | REDUCED | STREAMED,
        without_pairs=lambda loss_func, emb: loss_func.proxy_weight * loss_func.proxy_loss(emb, LABELS),
    ),
    "DivergenceLoss": Case(
        lambda **kw: DivergenceLoss(3, margin=4.0, **kw),
        NOT_MINED
        | UNKNOWN_TO_PML
        | WITHOUT_PAIRS
        | {"our SelfSupervisedLoss", "weight regularizers", "other distances"},
    ),
    "EnsembleLoss": Case(
        lambda **kw: EnsembleLoss(MultiSimilarityLoss(), 2, divergence_weight=0.1, divergence_margin=4.0, **kw),
        OF_LOSSES,
        without_pairs=lambda loss_func, emb: 0.1 * loss_func.divergence(emb),
    ),
    "EnsembleLoss of HybridLoss": Case(
        lambda **kw: EnsembleLoss(HybridLoss(NUM_CLASSES, SIZE // 2), 2, divergence_weight=0.5, **kw),
        OF_LOSSES | WITH_PARAMETERS | STREAMED,
        without_pairs=lambda loss_func, emb: (
            0.5 * loss_func.divergence(emb)
            + sum(
                0.03 * child.proxy_loss(own, LABELS)
                for child, own in zip(loss_func.losses.values(), emb.chunk(2, 1), strict=True)
            )
        ),
    ),
    "EnsembleLoss of AdaptiveAdditiveMarginLoss": Case(
        lambda **kw: EnsembleLoss(lambda: make_margin_loss(SIZE // 2), 2, divergence_weight=0.5, **kw),
        OF_LOSSES | PROXIES_ALONE | {"double backward"},
    ),
    "LabelSmoothingCrossEntropyLoss": Case(
        lambda **kw: LabelSmoothingCrossEntropyLoss(NUM_CLASSES, SIZE, **kw), PROXIES_ALONE | {"other distances"}
    ),
    "IntraBatchLoss": Case(make_intra_batch_loss, OF_LOSSES | PROXIES_ALONE | {"double backward"}, batch_norm=True),
    "IntraBatchLoss of HybridLoss": Case(
        lambda **kw: make_intra_batch_loss(loss=HybridLoss(NUM_CLASSES, SIZE), **kw),
        OF_LOSSES | PROXIES_ALONE | STREAMED,
        without_pairs=lambda loss_func, emb: (
            0.03 * loss_func.refined_loss.proxy_loss(loss_func.refine(emb), LABELS) + loss_func.raw_loss(emb, LABELS)
        ),
    ),
}
WRAPPED = {
    "CrossBatchMemory of HybridLoss": Case(
        lambda **kw: CrossBatchMemory(HybridLoss(NUM_CLASSES, SIZE, **kw), SIZE, memory_size=64),
        PROXIES_ALONE | REDUCED | {"fullgraph=True", "double backward"},  # the queue is not compiled
    ),
    "SelfSupervisedLoss of MultiSimilarityLoss": Case(
        lambda **kw: SelfSupervisedLoss(MultiSimilarityLoss(**kw)),
        NOT_MINED
        | PROXIES_ALONE
        | {"weight regularizers", "MultipleLosses", "our DistributedLossWrapper"}
        | {"MetricLossOnly", "TrainWithClassifier"},
    ),
}


def make(case: Case, **kwargs: Any) -> Any:
    """Return the loss with the same parameters in every call."""
    torch.manual_seed(7)
    return case.make(**kwargs)


def trained(loss_func: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that an optimizer changes, by name."""
    return {name: p for name, p in loss_func.named_parameters() if p.requires_grad}


def embeddings(dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return a leaf of shape (12, SIZE) that requires grad."""
    emb = torch.randn(len(LABELS), SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return emb.to(dtype).requires_grad_()


def grads_of(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a loss, None for an input that it does not depend on."""
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def mean_of(x: torch.Tensor) -> torch.Tensor:
    """Return the mean, 0 of nothing."""
    return x.mean() if len(x) else x.sum()
