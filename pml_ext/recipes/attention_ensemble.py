"""Learners with attention masks that a divergence loss keeps different (ABE, ECCV 2018)."""

from typing import TYPE_CHECKING

from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import OURS, PAPER, Settings

if TYPE_CHECKING:
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from torch import Tensor


def _build(s: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
    """``masks=False``: plain linear heads on the same backbone. ``learner_loss``: "contrastive", "multi_similarity"."""
    from pml_ext.losses import EnsembleLoss, MultiSimilarityLoss  # on use: torch is slow to load
    from pml_ext.recipes.backbones import attention_ensemble, pooled_trunk  # on use: torch is slow to load

    if s.learner_loss not in ("contrastive", "multi_similarity"):
        raise ValueError(f"learner_loss must be 'contrastive' or 'multi_similarity', got {s.learner_loss!r}")
    trunk = attention_ensemble(s, s.num_learners) if s.masks else pooled_trunk(s, s.num_learners)
    loss: BaseMetricLossFunction
    if s.learner_loss == "contrastive":
        loss = EnsembleLoss.paper(
            s.num_learners, divergence_weight=s.divergence_weight, divergence_margin=s.divergence_margin
        )
    else:
        loss = EnsembleLoss(MultiSimilarityLoss(base=s.base), s.num_learners, s.divergence_weight, s.divergence_margin)
    return Parts(trunk, loss)


ATTENTION_ENSEMBLE = Method(
    numbers={
        "all": {
            "num_learners": (8, PAPER),
            "masks": (True, PAPER),
            "split": (None, "as AttentionEnsemble.from_backbone: an eighth of the resolution"),
            "learner_loss": ("contrastive", PAPER),
            "base": (0.5, "PML's default, for multi_similarity only"),
            "divergence_weight": (1.0, PAPER),
            "divergence_margin": (1.0, PAPER),
        },
        "finetune": {
            "split": ("blocks.5", "ours: learners share all but the last stage of the network"),
            "num_learners": (4, OURS),
            "embedding_size": (256, "ours: few dimensions for each learner cost retrieval on CIFAR-100"),
            "learner_loss": ("multi_similarity", OURS),
        },
        "small": {"num_learners": (4, OURS), "learner_loss": ("multi_similarity", OURS)},
        "paper": {
            "backbone": ("googlenet", PAPER),
            "pretrained": (True, PAPER),
            "embedding_size": (512, PAPER),
            "image_size": (224, PAPER),
            "resize": (256, PAPER),
            "augmentation": ("square", PAPER),
            "flip": (True, PAPER),
            "batch_size": (64, PAPER),
            "samples_per_class": (2, "ours: the paper's pairs, whose composition is unclear"),
            "optimizer": ("SGD", PAPER),
            "lr": (1e-3, "ours: the paper's is unknown"),
            "weight_decay": (1e-4, "ours: the paper's is unknown"),
            "epochs": (40, "ours: the paper's is unknown"),
            "schedule": ("step", OURS),
            "warmup_epochs": (0, OURS),
            "clip_value": (None, OURS),
            "freeze_batch_norm": (False, OURS),
        },
    },
    build=_build,
    summary="learners with a mask each on one network; EnsembleLoss",
)
