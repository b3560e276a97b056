"""What the papers' methods are compared with: losses of PML and of this package behind a plain head."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import OURS, PROXY_ANCHOR, Numbers, Settings

if TYPE_CHECKING:
    from torch import Tensor

_PML = "PML's default"
_OF_CARS196 = "ours: chosen on validation classes of Cars196"


def _plain(numbers: Numbers, make: Callable[[Settings, int], tuple[Any, Any]], loss: str, **presets: Numbers) -> Method:
    def build(settings: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
        from pml_ext.recipes.backbones import pooled_trunk  # on use: torch is slow to load

        return Parts(pooled_trunk(settings), *make(settings, num_classes))

    return Method({"all": numbers} | presets, build, f"plain head; {loss}")


def _contrastive(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pml_ext.losses import ContrastiveLoss  # on use: torch is slow to load

    return ContrastiveLoss(pos_margin=s.pos_margin, neg_margin=s.neg_margin), None


def _triplet(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pytorch_metric_learning import losses, miners  # on use: torch is slow to load

    if s.type_of_triplets not in ("all", "hard", "semihard", "easy"):
        raise ValueError(f"type_of_triplets must be all, hard, semihard or easy, got {s.type_of_triplets!r}")
    return losses.TripletMarginLoss(s.margin), miners.TripletMarginMiner(s.margin, s.type_of_triplets)


def _multi_similarity(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pml_ext.losses import MultiSimilarityLoss  # on use: torch is slow to load

    return MultiSimilarityLoss(s.alpha, s.beta, s.base, epsilon=s.epsilon), None


def _proxy_anchor(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pml_ext.losses import ProxyAnchorLoss  # on use: torch is slow to load

    return ProxyAnchorLoss(num_classes, s.embedding_size, s.margin, s.alpha), None


def _cosface(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pytorch_metric_learning import losses  # on use: torch is slow to load

    return losses.CosFaceLoss(num_classes, s.embedding_size, margin=s.margin, scale=s.scale), None


def _normalized_softmax(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pytorch_metric_learning import losses  # on use: torch is slow to load

    return losses.NormalizedSoftmaxLoss(num_classes, s.embedding_size, temperature=s.temperature), None


def _cross_entropy(s: Settings, num_classes: int) -> tuple[Any, Any]:
    from pml_ext.losses import LabelSmoothingCrossEntropyLoss  # on use: torch is slow to load

    loss = LabelSmoothingCrossEntropyLoss(
        num_classes, s.embedding_size, temperature=s.temperature, label_smoothing=s.label_smoothing
    )
    return loss, None


BASELINES: dict[str, Method] = {
    "contrastive": _plain({"pos_margin": (0.0, _PML), "neg_margin": (1.0, _PML)}, _contrastive, "ContrastiveLoss"),
    "triplet": _plain(
        {"margin": (0.2, OURS), "type_of_triplets": ("semihard", OURS)}, _triplet, "PML's TripletMarginLoss and miner"
    ),
    "multi_similarity": _plain(
        {"alpha": (2, _PML), "beta": (50, _PML), "base": (0.5, _PML), "epsilon": (None, _PML)},
        _multi_similarity,
        "MultiSimilarityLoss",
    ),
    "proxy_anchor": _plain(
        {"margin": (0.1, PROXY_ANCHOR), "alpha": (32, PROXY_ANCHOR)}, _proxy_anchor, "ProxyAnchorLoss"
    ),
    "cosface": _plain(
        {"margin": (0.35, _PML), "scale": (64.0, _PML)},
        _cosface,
        "PML's CosFaceLoss",
        small={"scale": (16.0, OURS)},
        finetune={"scale": (8.0, _OF_CARS196)},
    ),
    "normalized_softmax": _plain(
        {"temperature": (0.05, _PML)},
        _normalized_softmax,
        "PML's NormalizedSoftmaxLoss",
        finetune={"temperature": (0.1, _OF_CARS196)},
    ),
    "cross_entropy": _plain(
        {"temperature": (1.0, OURS), "label_smoothing": (0.0, OURS)}, _cross_entropy, "LabelSmoothingCrossEntropyLoss"
    ),
}
