"""Attention on top of the image."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.extras import comes_with


def attention_overlay(
    image: Any, attention: Tensor, alpha: float = 0.5, cmap: str = "inferno", brightest: float | None = None
) -> Any:
    """Return the image with a map of weights laid over it in colours.

    Args:
        image: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``, uint8 or floats in 0 to 1, or a PIL image.
        attention: ``(h, w)``, of any size, >= 0.
        alpha: Share of the colours, 0 to 1.
        cmap: Name of a matplotlib colour map.
        brightest: Value of the brightest colour, > 0. None: the largest of ``attention``.

    Returns:
        A numpy array ``(H, W, 3)``, uint8.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
        ValueError: If a shape, ``alpha`` or ``brightest`` breaks a rule.
    """
    with comes_with("visualization", "matplotlib", "attention_overlay"):
        import matplotlib

    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0 to 1, got {alpha}")
    if brightest is not None and not brightest > 0:
        raise ValueError(f"brightest must be > 0, got {brightest}")
    if attention.ndim != 2 or not attention.numel():
        raise ValueError(f"attention must have shape (h, w), got {tuple(attention.shape)}")
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image))
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or len(image) not in (1, 3):
        raise ValueError(f"image must have shape (H, W), (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    weights = attention.detach().float().cpu()[None, None]
    weights = torch.nn.functional.interpolate(weights, image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    if brightest is None:
        brightest = max(weights.max().item(), 1e-12)
    colors = matplotlib.colormaps[cmap]((weights / brightest).numpy())[..., :3]
    mixed = (1 - alpha) * image.expand(3, -1, -1).permute(1, 2, 0).numpy() + alpha * colors
    return (255 * mixed.clip(0, 1)).round().astype("uint8")
