"""What to start with: a pair loss and proxy losses, for one head or for four learners."""

import warnings
from typing import TYPE_CHECKING

from pml_ext.recipes.attention_ensemble import ATTENTION_ENSEMBLE
from pml_ext.recipes.parts import Method, Parts
from pml_ext.recipes.settings import OURS, Numbers, Settings

if TYPE_CHECKING:
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from torch import Tensor, nn

_HELD_OUT = "ours: chosen on training classes that were held out, see How the default was chosen"
_CHOSEN = "ours: chosen on validation classes, see the pages of results"


def _build(s: Settings, num_classes: int, class_embeddings: "Tensor | None") -> Parts:
    """Return the parts.

    ``masks``: one for each learner, as in ABE, where the network can be cut in two; otherwise plain heads.
    ``anchor_weight``: of Proxy-Anchor beside the softmax. The softmax compares all proxies for each sample,
    Proxy-Anchor all samples of the batch for each proxy. ``epsilon``: pairs that are farther than that from the hardest
    pair of the other kind do not count, so that the pair loss ends where a class is apart from all others.
    """
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss  # on use: torch is slow to load

    from pml_ext import losses  # on use: torch is slow to load

    size = s.embedding_size // s.num_learners

    def hybrid() -> "BaseMetricLossFunction":
        proxies: BaseMetricLossFunction = NormalizedSoftmaxLoss(num_classes, size, temperature=s.temperature)
        if s.anchor_weight:
            anchors = losses.ProxyAnchorLoss(num_classes, size)
            proxies = losses.HybridLoss(
                pair_loss=anchors, proxy_loss=proxies, pair_weight=s.anchor_weight, proxy_weight=1.0
            )
        return losses.HybridLoss(
            pair_loss=losses.MultiSimilarityLoss(base=s.base, epsilon=s.epsilon),
            proxy_loss=proxies,
            pair_weight=s.pair_weight,
            proxy_weight=s.proxy_weight,
        )

    loss = losses.EnsembleLoss(hybrid, s.num_learners, s.divergence_weight) if s.num_learners > 1 else hybrid()
    trunk, settled = _trunk(s)
    return Parts(trunk, loss, settled=settled)


def _trunk(s: Settings) -> "tuple[nn.Module, Numbers]":
    """Return the network, and ``masks`` where it cannot have them."""
    from pml_ext.recipes.backbones import attention_ensemble, pooled_trunk  # on use: torch is slow to load

    why = "one learner" if s.num_learners == 1 else "a network of yours" if s.module is not None else ""
    heads = why or not s.masks  # a module gives a map, which cannot be cut
    if heads and s.backbone == "googlenet":
        rule = "of several learners with masks for the backbone 'googlenet'"
        raise ValueError(f"num_learners must be {rule}, got {s.num_learners} and masks = {s.masks}")
    if s.masks and why and s.notes["masks"].endswith(": given"):
        raise ValueError(f"masks must be False for {why}, got True")
    if heads:
        return pooled_trunk(s, s.num_learners), {"masks": (False, f"none for {why}")} if s.masks else {}
    try:
        return attention_ensemble(s, s.num_learners), {}
    except ValueError as error:
        if s.split is not None or s.backbone == "googlenet":  # which has no heads, either
            raise
        trunk = pooled_trunk(s, s.num_learners)  # which raises what is wrong with other settings
        warnings.warn(f"masks are left out, this network cannot have them: {error}", UserWarning, stacklevel=4)
        return trunk, {"masks": (False, "left out, see the warning")}


RECOMMENDED = Method(
    numbers={
        "all": {
            "num_learners": (4, OURS),
            "masks": (True, "ours: as in ABE; only for networks that can be cut, others get plain heads"),
            "split": ATTENTION_ENSEMBLE.numbers["all"]["split"],
            "divergence_weight": (0.1, _CHOSEN),
            "base": (0.5, "default of HybridLoss, chosen on validation classes"),
            "epsilon": (None, "ours: all pairs"),
            "pair_weight": (1.0, OURS),
            "proxy_weight": (1.0, _CHOSEN),
            "anchor_weight": (0.0, "ours: not tried from scratch"),
            "temperature": (0.1, _CHOSEN),
        },
        "paper": {
            "num_learners": (1, "ours: as in the preset finetune"),
            "pool_type": ("avg+max", "ours: as in the preset finetune"),
            "epsilon": (0.1, "ours: as in the preset finetune"),
            "pair_weight": (10.0, "ours: as in the preset finetune"),
            "anchor_weight": (0.3, "ours: as in the preset finetune"),
        },
        "small": {
            "embedding_size": (256, "ours: 64 for each learner; 16 are too few on CIFAR-100"),
            "pool_type": ("avg+max", "ours: it finds objects before changing backgrounds, see Retrieval"),
            "lr": (3e-3, _CHOSEN),
            "proxy_weight": (0.1, _CHOSEN),
        },
        "finetune": {
            "embedding_size": (256, _CHOSEN),
            "num_learners": (1, "ours: four heads are within the spread on validation classes of Cars196"),
            "masks": (False, "ours: heads of four learners are as good on validation classes of Cars196, and faster"),
            "split": ATTENTION_ENSEMBLE.numbers["finetune"]["split"],
            "epsilon": (0.1, _HELD_OUT),
            "pair_weight": (10.0, _HELD_OUT),
            "anchor_weight": (0.3, _HELD_OUT),
            "pool_type": ("avg+max", _CHOSEN),
        },
    },
    build=_build,
    summary="plain head, or four learners with masks; Multi-Similarity, softmax, and finetuned also Proxy-Anchor",
)
