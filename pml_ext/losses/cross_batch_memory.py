"""PML's CrossBatchMemory, opened to the losses of this package."""

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from pml_ext.losses.hybrid_loss import HybridLoss
from pml_ext.precision import raise_half
from pml_ext.types import Indices
from pml_ext.validation import check_batch, validation_wanted


class CrossBatchMemory(losses.CrossBatchMemory):
    """Compare each batch with the embeddings of earlier batches too.

    PML's class with three changes. It takes ``HybridLoss`` where the pair part is a loss that PML admits; the pair
    part sees the memory, the proxy part the batch. The state dict holds the position in the queue (PML's does not, and
    a loaded memory counts as empty). Bad input is refused before it enters the memory, which stays float32 or better.

    Args:
        loss: ``HybridLoss``, ``MultiSimilarityLoss``, or a loss that PML's class takes.
        embedding_size: Width of the embeddings.
        memory_size: Number of embeddings kept, at least the batch size.
        miner: Mines between batch and memory. None: all pairs.

    Shape:
        - embeddings: ``(B, embedding_size)``. labels: ``(B,)``. enqueue_mask: ``(B,)``, bool, or None.
        - output: scalar.

    Raises:
        TypeError: If ``loss`` is not a supported one.
        ValueError: For bad embeddings or labels, as in every loss.

    Examples:
        >>> loss_func = CrossBatchMemory(HybridLoss(num_classes=10, embedding_size=64), embedding_size=64)
        >>> for _ in range(2):
        ...     loss = loss_func(torch.randn(8, 64), torch.arange(8) // 2)
        >>> loss_func.queue_idx
        16

    Source:
        Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, through PML's implementation.
    """

    def __init__(self, loss: Any, embedding_size: int, memory_size: int = 1024, miner: Any = None, **kwargs: Any):
        if isinstance(loss, HybridLoss):
            self.check_loss_support(type(loss.pair_loss).__name__)
        super().__init__(loss, embedding_size, memory_size=memory_size, miner=miner, **kwargs)

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), "HybridLoss"]

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        if loss_name not in cls.supported_losses():
            raise TypeError(f"loss must be one of {', '.join(cls.supported_losses())}, got {loss_name}")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch against the memory, which the batch (or its ``enqueue_mask`` part) has entered."""
        c_f.labels_required(labels)
        if validation_wanted():
            num_classes = getattr(self.loss, "num_classes", None)
            check_batch(embeddings, labels, num_classes=num_classes, embedding_size=self.embedding_size)
        loss: Tensor = super().forward(raise_half(embeddings), labels, indices_tuple, enqueue_mask)
        return loss

    def get_extra_state(self) -> Tensor:
        """Return the position in the queue and whether it has been filled once, as a tensor for the state dict."""
        return torch.tensor([self.queue_idx, int(self.has_been_filled)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the position in the queue from a state dict."""
        self.queue_idx, self.has_been_filled = int(state[0]), bool(state[1])
