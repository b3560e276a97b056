"""A paper's training in one line."""

import os
import warnings
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pml_ext.modes import in_mode
from pml_ext.recipes.methods import RECIPES
from pml_ext.recipes.networks import matched_state
from pml_ext.recipes.parts import Parts
from pml_ext.recipes.pixel_scaling import with_pixel_scaling
from pml_ext.recipes.run_checkpoint import chosen_checkpoint
from pml_ext.recipes.settings import Settings, settle
from pml_ext.recipes.training_recipe import OPTIMIZERS, Recipe
from pml_ext.trunks.batch_norm import freeze_batch_norm, has_batch_norm
from pml_ext.trunks.frozen_stages import freeze_stages
from pml_ext.trunks.wrappers import backbone_of, unwrapped
from pml_ext.validation import check_count


def recipe(
    name: str,
    num_classes: int,
    embedding_size: int | None = None,
    backbone: str | nn.Module | None = None,
    preset: str = "small",
    class_embeddings: Tensor | None = None,
    **settings: Any,
) -> Recipe:
    """Return network, loss, miner and everything else that a training needs.

    Args:
        name: "recommended"; of the papers "mhgl", "intra_batch", "attention_ensemble", "adaptive_margin", "combined";
            of plain losses "contrastive", "triplet", "multi_similarity", "proxy_anchor", "cosface",
            "normalized_softmax", "cross_entropy".
        num_classes: Training classes, >= 2.
        embedding_size: None: as the preset has it.
        backbone: "convnet", a small network of ours; a timm model; "googlenet", for learners with masks and
            ``pool_type="avg"`` only; or a network of yours, which returns what the recipe's trunk expects. None: as the
            preset has it.
        preset: "small": images of 28 to 64 pixels, trained from scratch on a CPU. "finetune": photographs, with a
            pretrained network, on a CPU or a small GPU. "paper:cub", "paper:cars", "paper:sop" or "paper:inshop": the
            paper's settings for that data set, where they are known.
        class_embeddings: ``(num_classes, E)``, of a second modality; used by "adaptive_margin", and by "combined" with
            ``proxy_loss="adaptive_margin"``; others ignore it.
        **settings: Replace those of the preset: any name in the recipe's ``notes``. None is a value of
            those that may have none, such as ``augmentation``, ``resize``, ``clip_value`` and ``weights``. Among them:
            ``weights``, for the backbone: a file (``.pth`` or ``.safetensors``, of timm or torchvision), "installed"
            (extra ``pretrained``) or a state dict; or, for the whole network, the folder of a run of the same recipe.

    Raises:
        FileNotFoundError: If there is not a file or run of this name in ``weights``.
        ImportError: If the package of installed weights is not there.
        OSError: If weights cannot be downloaded.
        ValueError: If a name, preset or setting is unknown or breaks a rule, or weights do not fit.

    Examples:
        >>> made = recipe("recommended", num_classes=10, in_channels=1, image_size=28)
        >>> made.trunk(torch.randn(2, 1, 28, 28)).shape, made.notes["num_learners"]
        (torch.Size([2, 256]), '4: our choice')
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
    if isinstance(settings.get("weights"), os.PathLike):
        settings["weights"] = os.fspath(settings["weights"])
    module = backbone if isinstance(backbone, nn.Module) else None
    named = backbone if module is None else "module"
    named_here = {"embedding_size": embedding_size, "backbone": named}
    given = {name: value for name, value in named_here.items() if value is not None} | settings
    chosen = settle(preset, method.numbers, given)
    if module is not None:
        chosen = chosen.replaced("pretrained", False, "given")
    chosen.module = module
    _check(chosen)
    run = _run_of(chosen.weights)
    chosen = with_pixel_scaling(chosen, run)
    built = chosen if run is None else chosen.replaced("weights", None, "given")
    try:
        parts = method.build(built, num_classes, class_embeddings)
        usual = settle(preset, method.numbers, {})
        unread = (*built.unread(), *_unread_common(built, parts))
        idle = [name for name in unread if given.get(name) is not None and not np.array_equal(built[name], usual[name])]
        if idle:
            settings_are = "settings have" if len(idle) > 1 else "setting has"
            warnings.warn(f"the {settings_are} no effect here: {', '.join(idle)}", UserWarning, stacklevel=2)
        for setting, (value, why) in parts.settled.items():
            chosen = chosen.replaced(setting, value, why)
        _dry_run(parts.trunk, chosen)
    except (AssertionError, RuntimeError) as error:  # of networks that images of this size do not fit
        raise ValueError(
            f"backbone must take images of image_size = {chosen.image_size}, {chosen.backbone!r} does not: {error}"
        ) from error
    if run is not None:
        rule = f"weights must be those of the same network, got {run}"
        unwrapped(parts.trunk).load_state_dict(matched_state(parts.trunk, chosen_checkpoint(run)[1]["trunk"], rule))
    if chosen.channels_last:
        parts.trunk.to(memory_format=torch.channels_last)
    if chosen.frozen_stages:
        freeze_stages(parts.trunk, chosen.backbone, chosen.frozen_stages)
    if chosen.freeze_batch_norm:
        backbone_or_all = backbone_of(parts.trunk) or parts.trunk
        if has_batch_norm(backbone_or_all):
            freeze_batch_norm(backbone_or_all)
        else:
            if chosen.notes["freeze_batch_norm"].endswith(": given"):
                warnings.warn(
                    "freeze_batch_norm is left out, this network has no batch norm", UserWarning, stacklevel=2
                )
            chosen = chosen.replaced("freeze_batch_norm", False, "this network has no batch norm")
    return Recipe(name, num_classes, chosen, parts.trunk, parts.loss, parts.miner)


def _unread_common(s: Settings, parts: Parts) -> list[str]:
    """Return the names of those settings of all recipes that nothing reads with the others as they are."""
    read = {
        "width": s.backbone == "convnet",
        "crop_scale": s.augmentation == "crop",
        "proxy_lr": next(parts.loss.parameters(), None) is not None,
        "milestones": s.schedule == "step",
        "gamma": s.schedule == "step",
    }
    return [name for name, is_read in read.items() if not is_read]


def _run_of(weights: Any) -> Path | None:
    """Return the folder of a run, if weights are one."""
    return Path(weights) if isinstance(weights, str | os.PathLike) and Path(weights).is_dir() else None


@torch.no_grad()
def _dry_run(trunk: nn.Module, s: Settings) -> None:
    with in_mode(trunk):
        trunk(torch.zeros(2, s.in_channels, s.image_size, s.image_size))


def _check(s: Settings) -> None:
    if isinstance(s.frozen_stages, bool) or not isinstance(s.frozen_stages, Integral) or s.frozen_stages < 0:
        raise ValueError(f"frozen_stages must be an integer >= 0, got {s.frozen_stages!r}")
    if s.freeze_batch_norm not in (True, False):
        raise ValueError(f"freeze_batch_norm must be True or False, got {s.freeze_batch_norm!r}")
    for name in ("channels_last", "masks"):
        if not isinstance(s.get(name, True), bool):
            raise ValueError(f"{name} must be True or False, got {s[name]!r}")
    if isinstance(s.crop_scale, bool) or not isinstance(s.crop_scale, int | float) or not 0 < s.crop_scale <= 1:
        raise ValueError(f"crop_scale must lie in (0, 1], got {s.crop_scale!r}")
    if isinstance(s.warmup_epochs, bool) or not isinstance(s.warmup_epochs, Integral) or s.warmup_epochs < 0:
        raise ValueError(f"warmup_epochs must be an integer >= 0, got {s.warmup_epochs!r}")
    for name in ("embedding_size", "in_channels", "image_size", "batch_size", "samples_per_class", "epochs", "width"):
        check_count(name, s[name])
    for name in ("chunk_size", "num_learners"):
        if s.get(name) is not None:
            check_count(name, s[name])
    for name in ("lr", "head_lr", "proxy_lr", "clip_value", "refiner_lr", "gamma", "temperature"):
        value = s.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
    if s.flip is not None and not isinstance(s.flip, bool):
        raise ValueError(f"flip must be True, False or None, got {s.flip!r}")
    anchors = s.get("anchor_weight", 0.0)
    if isinstance(anchors, bool) or not isinstance(anchors, int | float) or anchors < 0:
        raise ValueError(f"anchor_weight must be a number >= 0, got {anchors!r}")
    split = s.get("split")
    if split is not None and (isinstance(split, bool) or not isinstance(split, str | int)):
        raise ValueError(f"split must be a module's name, a reduction or None, got {split!r}")
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
