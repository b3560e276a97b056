"""Losses: subclasses of PML's, for its miners, reducers, wrappers and trainers."""

from pml_ext.losses.adaptive_additive_margin_loss import AdaptiveAdditiveMarginLoss
from pml_ext.losses.contrastive_loss import ContrastiveLoss
from pml_ext.losses.cross_batch_memory import CrossBatchMemory
from pml_ext.losses.divergence_loss import DivergenceLoss
from pml_ext.losses.ensemble_loss import EnsembleLoss
from pml_ext.losses.hybrid_loss import HybridLoss
from pml_ext.losses.intra_batch_loss import IntraBatchLoss
from pml_ext.losses.label_smoothing_cross_entropy_loss import LabelSmoothingCrossEntropyLoss
from pml_ext.losses.multi_similarity_loss import MultiSimilarityLoss
from pml_ext.losses.ntxent_loss import NTXentLoss
from pml_ext.losses.proxy_anchor_loss import ProxyAnchorLoss
from pml_ext.losses.self_supervised_loss import SelfSupervisedLoss
from pml_ext.losses.supcon_loss import SupConLoss

__all__ = [
    "AdaptiveAdditiveMarginLoss",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "DivergenceLoss",
    "EnsembleLoss",
    "HybridLoss",
    "IntraBatchLoss",
    "LabelSmoothingCrossEntropyLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "ProxyAnchorLoss",
    "SelfSupervisedLoss",
    "SupConLoss",
]
