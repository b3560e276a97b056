"""The masks of an ensemble's learners, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pml_ext.extras import comes_with
from pml_ext.visualization.attention import attention_overlay
from pml_ext.visualization.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mask_grid(images: Any, masks: Tensor, alpha: float = 0.7, path: str | Path | None = None) -> "Figure":
    """Draw a row for each image: the image, then each learner's mask on it.

    Masks are averaged over channels. Fresh masks are nearly flat, and so are many trained ones: colors run from the
    smallest to the largest value of a row, so that learners can be compared, and the row's range is written beside it.

    Args:
        images: B images: a tensor ``(B, H, W)``, ``(B, 1, H, W)`` or ``(B, 3, H, W)``, or a sequence of arrays or PIL
            images. Numbers are uint8 or floats in 0 to 1.
        masks: ``(B, M, C, h, w)``, what ``AttentionEnsemble.masks`` returns, or ``(B, M, h, w)``.
        alpha: Share of the colors, 0 to 1.
        path: Where to save the picture; folders are made. None: nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
        ValueError: If a shape or ``alpha`` breaks a rule.
    """
    if masks.ndim not in (4, 5) or not masks.numel():
        raise ValueError(f"masks must have shape (B, M, C, h, w) or (B, M, h, w), got {tuple(masks.shape)}")
    if len(images) != len(masks):
        raise ValueError(f"images and masks must have one length, got {len(images)} and {len(masks)}")
    masks = masks.detach().float().cpu()
    masks = masks.mean(2) if masks.ndim == 5 else masks  # (B, M, h, w)
    low, high = masks.amin((1, 2, 3), keepdim=True), masks.amax((1, 2, 3), keepdim=True)
    scaled = (masks - low) / (high - low).clamp_min(1e-12)

    with comes_with("visualization", "matplotlib", "mask_grid"):
        from matplotlib.figure import Figure  # on use: matplotlib comes with an extra

    rows, learners = masks.shape[:2]
    figure = Figure(figsize=(1.1 * (learners + 1) + 0.4, 1.15 * rows + 0.3), dpi=120, layout="constrained")
    axes = figure.subplots(rows, learners + 1, squeeze=False)
    for row in range(rows):
        axes[row, 0].imshow(attention_overlay(images[row], torch.zeros(1, 1), alpha=0))
        axes[row, 0].set_ylabel(f"{low[row].item():.2f} to {high[row].item():.2f}", fontsize=7)
        for m in range(learners):
            weights = scaled[row, m]
            colors = attention_overlay(images[row], weights, alpha=alpha, brightest=1.0)
            axes[row, m + 1].imshow(colors)
    for column, title in enumerate(["image", *(f"learner {m}" for m in range(learners))]):
        axes[0, column].set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    save_figure(figure, path)
    return figure
