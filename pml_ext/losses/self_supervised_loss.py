"""PML's SelfSupervisedLoss, which tells what it takes."""

from typing import Any

from torch import Tensor

from pml_ext.losses.ensemble_loss import EnsembleLoss
from pml_ext.pml_internals import PmlSelfSupervisedLoss, values_in
from pml_ext.precision import full_precision, full_precision_in_backward, upcast_half
from pml_ext.validation import check_embeddings, check_module, check_values


class SelfSupervisedLoss(PmlSelfSupervisedLoss):
    """Compare two views of each sample, without labels.

    PML's class, which takes the ``MultiSimilarityLoss`` of this package and an ``EnsembleLoss`` of such losses too.
    Losses with proxies are refused: the labels made here are positions in the batch, so a proxy would stand for
    another sample in every batch.

    Args:
        loss: ``MultiSimilarityLoss``, ``EnsembleLoss``, or a loss that PML's class takes.
        symmetric: Whether views of both kinds are anchors.

    Shape:
        - embeddings, ref_emb: ``(B, D)``, the two views in one order.
        - output: scalar.

    Raises:
        TypeError: If ``loss`` is not a supported one, or a view is not a tensor of floating point.
        ValueError: If a view does not have two dimensions, or the views differ in shape.

    Examples:
        >>> import torch
        >>> from pml_ext.losses import MultiSimilarityLoss
        >>> SelfSupervisedLoss(MultiSimilarityLoss())(torch.eye(3), torch.eye(3).roll(1, 0))
        tensor(1.1566)

    Source:
        pytorch-metric-learning.
    """

    def __init__(self, loss: Any, symmetric: bool = True, **kwargs: Any) -> None:
        check_module("loss", loss, "NTXentLoss()")
        super().__init__(loss, symmetric=symmetric, **kwargs)
        children = loss.compares_with_refs() if isinstance(loss, EnsembleLoss) else {}
        for name, child in children.items():
            if type(child).__name__ not in PmlSelfSupervisedLoss.supported_losses():
                raise TypeError(f"loss.{name} must be one that takes two views, got {type(child).__name__}")

    @staticmethod
    def supported_losses() -> list[str]:
        return [*PmlSelfSupervisedLoss.supported_losses(), "EnsembleLoss"]

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Return the loss of two views, row by row."""
        for name, x in (("embeddings", embeddings), ("ref_emb", ref_emb)):
            check_embeddings(name, x)
            check_values(name, x)
        if ref_emb.shape != embeddings.shape:
            shapes = f"{tuple(embeddings.shape)}, got {tuple(ref_emb.shape)}"
            raise ValueError(f"ref_emb must have the shape of embeddings, {shapes}")
        with full_precision(embeddings.device):  # autocast on a CPU joins no float16
            # by name: torch.compile fails on super() inside with
            forward: Any = PmlSelfSupervisedLoss.forward
            loss: Tensor = forward(self, upcast_half(embeddings), upcast_half(ref_emb))
            full_precision_in_backward(values_in(loss), [embeddings, ref_emb])
        return loss

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        if loss_name not in cls.supported_losses():
            raise TypeError(f"loss must be one of {', '.join(cls.supported_losses())}, got {loss_name}")
