"""Mean and standard deviation that pixels are scaled by: those that a backbone's weights were trained with."""

from pathlib import Path

import timm

from pml_ext.recipes.run_config import read_config
from pml_ext.recipes.settings import HALVES, IMAGENET, OURS, WANTED, Settings


def with_pixel_scaling(settings: Settings, run: Path | None = None) -> Settings:
    """Return settings whose ``pixel_mean`` and ``pixel_std`` are numbers, one for each channel.

    Weights that were trained before want the scaling that they were trained with. Without, color images are scaled
    as for ImageNet in the presets of papers; all else to -1 to 1.

    Args:
        settings: Settings of a recipe.
        run: Folder of a run that the weights come from.
    """
    mean, std = IMAGENET if settings.preset.startswith("paper:") and settings.in_channels == 3 else HALVES
    source = "usual in the field" if mean is IMAGENET[0] else OURS
    if settings.pretrained or settings.weights is not None:
        config = timm.get_pretrained_cfg(settings.backbone) if timm.is_model(settings.backbone) else None
        if config is not None:
            (mean, std), source = (list(config.mean), list(config.std)), WANTED
        elif settings.backbone == "googlenet":  # torchvision's
            (mean, std), source = IMAGENET, WANTED
    if run is not None:
        config = read_config(run)["settings"]
        (mean, std), source = (config["pixel_mean"], config["pixel_std"]), "as in the run of the weights"
    elif settings.in_channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    for name, numbers in (("pixel_mean", mean), ("pixel_std", std)):
        if settings[name] is None:
            settings = settings.replaced(name, numbers, source)
    return settings
