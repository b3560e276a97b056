"""PML's SelfSupervisedLoss, which tells what it takes."""

from typing import Any

from pytorch_metric_learning import losses


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """Compare two views of each sample, without labels.

    PML's class, which takes the ``MultiSimilarityLoss`` of this package too. Losses with proxies are refused: the
    labels made here are positions in the batch, so that a proxy would stand for another sample in every batch.

    Args:
        loss: ``MultiSimilarityLoss``, or a loss that PML's class takes.
        symmetric: Whether views of both kinds are anchors.

    Shape:
        - embeddings, ref_emb: ``(B, D)``, the two views in one order.
        - output: scalar.

    Raises:
        TypeError: If ``loss`` is not a supported one.

    Examples:
        >>> import torch
        >>> from pml_ext.losses import MultiSimilarityLoss
        >>> SelfSupervisedLoss(MultiSimilarityLoss())(torch.eye(3), torch.eye(3).roll(1, 0))
        tensor(1.1566)

    Source:
        pytorch-metric-learning.
    """

    def __init__(self, loss: Any, symmetric: bool = True, **kwargs: Any) -> None:
        super().__init__(loss, symmetric=symmetric, **kwargs)

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        if loss_name not in cls.supported_losses():
            raise TypeError(f"loss must be one of {', '.join(cls.supported_losses())}, got {loss_name}")
