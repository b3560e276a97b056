"""The ideas of the four papers in one training, each of which can be turned off."""

from typing import TYPE_CHECKING

from pml_ext.recipes.adaptive_margin import ADAPTIVE_MARGIN, make_adaptive_loss
from pml_ext.recipes.attention_ensemble import ATTENTION_ENSEMBLE
from pml_ext.recipes.intra_batch import INTRA_BATCH, make_refiner
from pml_ext.recipes.mhgl import MHGL
from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import OURS, Settings

if TYPE_CHECKING:
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from torch import Tensor


def _build(s: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
    """A pair loss and a proxy loss for each learner, and a refiner with a classifier on the whole vector.

    ``num_learners=1``: no ensemble. ``proxy_loss``: "adaptive_margin" or "proxy_anchor". ``refined_weight=0``: no
    refiner.
    """
    from pml_ext import losses  # on use: torch is slow to load
    from pml_ext.recipes import backbones  # on use: torch is slow to load

    if s.proxy_loss not in ("proxy_anchor", "adaptive_margin"):
        raise ValueError(f"proxy_loss must be 'proxy_anchor' or 'adaptive_margin', got {s.proxy_loss!r}")
    if s.num_learners > 1 and s.levels == "both":
        raise ValueError("levels must be 'global' for an ensemble, whose learners share one map, got 'both'")
    attention = None if s.attention == "none" else s.attention
    if s.num_learners > 1 and s.masks and attention is not None:
        raise ValueError(f"attention must be 'none' for learners with masks, got {attention!r}")
    size = s.embedding_size // s.num_learners

    def hybrid() -> "BaseMetricLossFunction":
        if s.proxy_loss == "adaptive_margin":
            proxy: BaseMetricLossFunction = make_adaptive_loss(s, num_classes, size, class_embeddings)
        else:
            proxy = losses.ProxyAnchorLoss(num_classes, size)
        return losses.HybridLoss(
            pair_loss=losses.MultiSimilarityLoss(base=s.base, negative_sign=s.negative_sign),
            proxy_loss=proxy,
            pair_weight=s.pair_weight,
            proxy_weight=s.proxy_weight,
        )

    if s.num_learners > 1:
        trunk = (
            backbones.attention_ensemble(s, s.num_learners)
            if s.masks
            else backbones.pooled_trunk(s, s.num_learners, attention)
        )
        loss: BaseMetricLossFunction = losses.EnsembleLoss(
            hybrid, s.num_learners, s.divergence_weight, s.divergence_margin
        )
    else:
        both = s.levels == "both"
        trunk = backbones.global_local_trunk(s, attention) if both else backbones.pooled_trunk(s, attention=attention)
        loss = hybrid()
    if s.refined_weight:
        loss = losses.IntraBatchLoss(
            num_classes,
            s.embedding_size,
            refiner=make_refiner(s),
            raw_loss=loss,
            temperature=s.temperature,
            label_smoothing=s.label_smoothing,
            refined_weight=s.refined_weight,
        )
    return Parts(trunk, loss)


_OF_PARTS = [MHGL, ATTENTION_ENSEMBLE, INTRA_BATCH, ADAPTIVE_MARGIN]
_ALL = {name: number for part in reversed(_OF_PARTS) for name, number in part.numbers["all"].items()}

COMBINED = Method(
    numbers={
        "all": {name: number for name, number in _ALL.items() if name not in ("learner_loss", "raw_weight")}
        | {
            "levels": ("global", OURS),
            "attention": ("none", OURS),
            "pool_type": ("avg", OURS),
            "num_learners": (1, OURS),
            "proxy_loss": ("proxy_anchor", OURS),
            "refiner_lr": (2e-3, OURS),
        },
        "finetune": {"split": ATTENTION_ENSEMBLE.numbers["finetune"]["split"]},
        "paper": {"refiner_lr": (1.5636637e-4, "authors' code of IBC, for CUB")},
    },
    build=_build,
    summary="any of them; pair and proxy loss, margins, learners, messages, each of which can be turned off",
)
