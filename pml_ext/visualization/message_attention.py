"""Draw the attention inside a batch."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pml_ext.extras import comes_with
from pml_ext.visualization.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def batch_attention(weights: Tensor, labels: Tensor, path: str | Path | None = None) -> "Figure":
    """Draw the attention between the samples of a batch, classes sorted: rows receive, columns send.

    A panel for each head, and one for the mean over heads where there are several. White lines part the classes. The
    title tells how much of a row goes to the sample itself, to others of its class and to other classes; what is
    missing from 1 goes to the null message.

    Args:
        weights: ``(B, B)`` or ``(h, B, B)``, >= 0: one layer of ``IntraBatchRefiner.attention_weights``.
        labels: ``(B,)``, integers.
        path: Where to save the picture; folders are made. None: nowhere.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
        ValueError: If the shapes do not fit together.
    """
    weights = weights[None] if weights.ndim == 2 else weights
    if weights.ndim != 3 or weights.shape[1:] != (len(labels), len(labels)) or not weights.numel():
        rule = f"(h, {len(labels)}, {len(labels)}) for {len(labels)} labels"
        raise ValueError(f"weights must have shape {rule}, got {tuple(weights.shape)}")
    labels = torch.as_tensor(labels).cpu()
    order = labels.argsort(stable=True)
    weights, labels = weights.detach().float().cpu()[:, order][:, :, order], labels[order]
    panels = {f"head {i}": one for i, one in enumerate(weights)}
    if len(weights) > 1:
        panels = {"mean": weights.mean(0)} | panels
    ends = torch.unique_consecutive(labels, return_counts=True)[1].cumsum(0)[:-1]

    with comes_with("visualization", "matplotlib", "batch_attention"):
        from matplotlib.figure import Figure  # on use: matplotlib comes with an extra

    figure = Figure(figsize=(3.2 * len(panels) + 0.6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    highest = max(panel.max().item() for panel in panels.values())
    same = labels[:, None] == labels
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        picture = axis.imshow(panel.numpy(), cmap="magma", vmin=0, vmax=highest)
        for end in ends.tolist():
            axis.axhline(end - 0.5, color="white", linewidth=0.4)
            axis.axvline(end - 0.5, color="white", linewidth=0.4)
        own = panel.diagonal().mean().item()
        mates = (panel * same).sum(1).mean().item() - own
        others = (panel * ~same).sum(1).mean().item()
        axis.set_title(f"{name}\nitself {own:.2f}, class {mates:.2f}, others {others:.2f}", fontsize=8)
        axis.set(xticks=[], yticks=[])
    axes[0].set(xlabel="sender", ylabel="receiver")
    figure.colorbar(picture, ax=list(axes), shrink=0.8)
    save_figure(figure, path)
    return figure
