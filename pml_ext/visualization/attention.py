"""Attention on top of the image."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.extras import comes_with
from pml_ext.visualization.thumbnails import as_image


def attention_overlay(
    image: Any, attention: Tensor, alpha: float = 0.5, cmap: str = "inferno", brightest: float | None = None
) -> Any:
    """Return the image with a map of weights laid over it in colors.

    Args:
        image: A tensor ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``, an array ``(H, W)`` or ``(H, W, 3)``, a PIL image or
            a path. Numbers are uint8 or floats in 0 to 1.
        attention: ``(h, w)``, of any size, >= 0.
        alpha: Share of the colors, 0 to 1.
        cmap: Name of a matplotlib color map.
        brightest: Value of the brightest color, > 0. None: the largest of ``attention``.

    Returns:
        A numpy array ``(H, W, 3)``, uint8.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
        TypeError: If ``image`` is of no known kind or dtype.
        ValueError: If a shape, a value of the image, ``alpha`` or ``brightest`` breaks a rule.
    """
    with comes_with("visualization", "matplotlib", "attention_overlay"):
        import matplotlib  # on use: it comes with an extra

    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0 to 1, got {alpha}")
    if brightest is not None and not brightest > 0:
        raise ValueError(f"brightest must be > 0, got {brightest}")
    if attention.ndim != 2 or not attention.numel():
        raise ValueError(f"attention must have shape (h, w), got {tuple(attention.shape)}")
    pixels = np.asarray(as_image(image, "image")) / 255  # (H, W, 3)
    weights = attention.detach().float().cpu()[None, None]
    weights = torch.nn.functional.interpolate(weights, pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    if brightest is None:
        brightest = max(weights.max().item(), 1e-12)
    colors = matplotlib.colormaps[cmap]((weights / brightest).numpy())[..., :3]
    mixed = (1 - alpha) * pixels + alpha * colors
    return (255 * mixed.clip(0, 1)).round().astype("uint8")
