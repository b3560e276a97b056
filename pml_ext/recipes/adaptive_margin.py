"""A margin for each pair of classes, from a second modality (AAML, 2020; a reconstruction)."""

from typing import TYPE_CHECKING

from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import OURS, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from pml_ext.losses import AdaptiveAdditiveMarginLoss

_UNKNOWN = "ours: the paper's is unknown"


def make_adaptive_loss(
    s: Settings, num_classes: int, size: int, class_embeddings: "Tensor | None"
) -> "AdaptiveAdditiveMarginLoss":
    """Return the loss; with ``margin_scale=0`` its margin is the constant ``base_margin``."""
    from pml_ext.losses import AdaptiveAdditiveMarginLoss  # on use: torch is slow to load

    if class_embeddings is None and s.margin_scale:
        raise ValueError("class_embeddings must be given for adaptive margins (or margin_scale=0), got None")
    return AdaptiveAdditiveMarginLoss(
        num_classes,
        size,
        class_embeddings=class_embeddings,
        margin_scale=s.margin_scale,
        base_margin=s.base_margin,
        direction=s.direction,
        scale=s.scale,
    )


def _build(s: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
    from pml_ext.recipes.backbones import pooled_trunk  # on use: torch is slow to load

    return Parts(pooled_trunk(s), make_adaptive_loss(s, num_classes, s.embedding_size, class_embeddings))


ADAPTIVE_MARGIN = Method(
    numbers={
        "all": {
            "margin_scale": (0.3, _UNKNOWN),
            "base_margin": (0.0, _UNKNOWN),
            "direction": ("distance", _UNKNOWN),
            "scale": (16.0, _UNKNOWN),
        },
        "paper": {"epochs": (40, OURS)},
    },
    build=_build,
    summary="plain head; AdaptiveAdditiveMarginLoss (needs class embeddings)",
)
