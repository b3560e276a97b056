"""A paper's training in one line."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pml_ext.modes import in_mode
from pml_ext.recipes.adaptive_margin import ADAPTIVE_MARGIN
from pml_ext.recipes.attention_ensemble import ATTENTION_ENSEMBLE
from pml_ext.recipes.baselines import BASELINES
from pml_ext.recipes.combined import COMBINED
from pml_ext.recipes.intra_batch import INTRA_BATCH
from pml_ext.recipes.mhgl import MHGL
from pml_ext.recipes.parts import Method
from pml_ext.recipes.settings import Settings, settle
from pml_ext.recipes.training_recipe import OPTIMIZERS, Recipe
from pml_ext.trunks.batch_norm import freeze_batch_norm
from pml_ext.trunks.wrappers import backbone_of
from pml_ext.validation import check_count

RECIPES: dict[str, Method] = {
    "mhgl": MHGL,
    "intra_batch": INTRA_BATCH,
    "attention_ensemble": ATTENTION_ENSEMBLE,
    "adaptive_margin": ADAPTIVE_MARGIN,
    "combined": COMBINED,
    **BASELINES,
}
"""The recipes by name, with their settings."""


def recipe(
    name: str,
    num_classes: int,
    embedding_size: int | None = None,
    backbone: str | None = None,
    preset: str = "small",
    class_embeddings: Tensor | None = None,
    **settings: Any,
) -> Recipe:
    """Return network, loss, miner and all else of a training.

    Args:
        name: "mhgl", "intra_batch", "attention_ensemble", "adaptive_margin", "combined"; or a baseline: "contrastive",
            "triplet", "multi_similarity", "proxy_anchor", "cosface", "normalized_softmax", "cross_entropy".
        num_classes: Training classes, >= 2.
        embedding_size: None: as the preset has it.
        backbone: "convnet", a small network of ours; "googlenet" (attention_ensemble); or a timm model.
            None: as the preset has it.
        preset: "paper:cub", "paper:cars", "paper:sop" or "paper:inshop": the paper's settings for that data set, where
            they are known. "small": for images of 28 to 64 pixels, trained from scratch on a CPU.
        class_embeddings: ``(num_classes, E)``, of a second modality; used by "adaptive_margin", and by "combined" with
            ``proxy_loss="adaptive_margin"``; others ignore it.
        **settings: Take the place of the preset's: any name in the recipe's ``notes``. None: the preset's.

    Raises:
        ValueError: If a name, preset or setting is unknown or breaks a rule.

    Examples:
        >>> made = recipe("mhgl", num_classes=10, in_channels=1, image_size=28)
        >>> made.trunk(torch.randn(2, 1, 28, 28)).shape, made.notes["proxy_weight"]
        (torch.Size([2, 64]), '0.03: paper')
        >>> recipe("proxy_anchor", num_classes=10, lr=0.01).optimizer().param_groups[0]["lr"]
        0.01
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    check_count("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    if class_embeddings is not None:
        shape = np.shape(class_embeddings)
        if len(shape) != 2 or shape[0] != num_classes:
            raise ValueError(f"class_embeddings must have shape ({num_classes}, E), got {tuple(shape)}")
    method = RECIPES[name]
    chosen = settle(preset, method.numbers, {"embedding_size": embedding_size, "backbone": backbone} | settings)
    _check(chosen)
    try:
        parts = method.build(chosen, num_classes, class_embeddings)
        _dry_run(parts.trunk, chosen)
    except (AssertionError, RuntimeError) as error:  # of networks that images of this size do not fit
        raise ValueError(
            f"backbone must take images of image_size = {chosen.image_size}, {chosen.backbone!r} does not: {error}"
        ) from error
    if chosen.freeze_batch_norm:
        freeze_batch_norm(backbone_of(parts.trunk) or parts.trunk)
    return Recipe(name, num_classes, chosen, parts.trunk, parts.loss, parts.miner)


@torch.no_grad()
def _dry_run(trunk: nn.Module, s: Settings) -> None:
    with in_mode(trunk):
        trunk(torch.zeros(2, s.in_channels, s.image_size, s.image_size))


def _check(s: Settings) -> None:
    for name in ("embedding_size", "in_channels", "image_size", "batch_size", "samples_per_class", "epochs", "width"):
        check_count(name, s[name])
    if s.chunk_size is not None:
        check_count("chunk_size", s.chunk_size)
    for name in ("lr", "head_lr", "proxy_lr", "clip_value", "refiner_lr"):
        value = s.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
    if s.flip is not None and not isinstance(s.flip, bool):
        raise ValueError(f"flip must be True, False or None, got {s.flip!r}")
    if not isinstance(s.milestones, list | tuple) or not all(isinstance(x, Integral) for x in s.milestones):
        raise ValueError(f"milestones must be a list of epochs, got {s.milestones!r}")
    if s.batch_size % s.samples_per_class or s.batch_size < 2 * s.samples_per_class:
        rule = f"a multiple of samples_per_class = {s.samples_per_class}, at least twice it"
        raise ValueError(f"batch_size must be {rule}, got {s.batch_size}")
    for name, known in (
        ("optimizer", tuple(OPTIMIZERS)),
        ("schedule", ("cosine", "step")),
        ("sampler", ("ShuffledPassSampler", "MPerClassSampler")),
    ):
        if s[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {s[name]!r}")
