"""Global and local heads with second-order attention, and a hybrid of pair and proxy loss (MHGL, WACV 2022)."""

from typing import TYPE_CHECKING

from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import PAPER, Settings

if TYPE_CHECKING:
    from torch import Tensor

_OF_LOSS = "default of HybridLoss, chosen on validation classes"


def _build(s: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
    """``levels``: "both", or "global" for one head; ``attention``: "printed", "solar", "normalized" or "none"."""
    from pml_ext.losses import HybridLoss, MultiSimilarityLoss  # on use: torch is slow to load
    from pml_ext.recipes.backbones import global_local_trunk, pooled_trunk  # on use: torch is slow to load

    if s.levels not in ("both", "global"):
        raise ValueError(f"levels must be 'both' or 'global', got {s.levels!r}")
    attention = None if s.attention == "none" else s.attention
    trunk = global_local_trunk(s, attention) if s.levels == "both" else pooled_trunk(s, attention=attention)
    loss = HybridLoss(
        num_classes,
        s.embedding_size,
        pair_loss=MultiSimilarityLoss(base=s.base, negative_sign=s.negative_sign),
        pair_weight=s.pair_weight,
        proxy_weight=s.proxy_weight,
    )
    return Parts(trunk, loss)


MHGL = Method(
    numbers={
        "all": {
            "levels": ("both", PAPER),
            "attention": ("printed", PAPER),
            "pool_type": ("avg+max", PAPER),
            "base": (0.5, _OF_LOSS),
            "negative_sign": ("minus", "Multi-Similarity paper; MHGL's Eq. 6 prints the other one, 'printed'"),
            "pair_weight": (1.0, PAPER),
            "proxy_weight": (0.03, PAPER),
        },
        "small": {"attention": ("normalized", "ours: with 'solar', training can stand still, see Retrieval")},
        "finetune": {
            "attention": ("normalized", "ours, as in the preset small"),
            "proxy_weight": (0.3, "ours: chosen on validation classes of Cars196"),
        },
        "paper": {
            "base": (1.0, PAPER),
            "backbone": ("resnet50", PAPER),
            "embedding_size": (512, PAPER),
            "optimizer": ("AdamW", PAPER),
            "epochs": (20, PAPER),
            "lr": (1e-4, PAPER),
            "proxy_lr": (1e-2, PAPER),
        },
    },
    build=_build,
    summary="global and local head, second-order attention; HybridLoss",
)
