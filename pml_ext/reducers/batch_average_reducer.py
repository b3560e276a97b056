"""Sum over all losses, divided by the size of the batch."""

from typing import Any

from pytorch_metric_learning.reducers import BaseReducer
from torch import Tensor

from pml_ext.precision import upcast_half


class BatchAverageReducer(BaseReducer):
    r"""Add up all losses, whatever they belong to, and divide by the number of embeddings.

    $$\frac{1}{N} \sum_{i, j} \ell_{ij}$$

    Some papers define their pair losses in this way. PML's ``MeanReducer`` divides by the number of pairs instead, its
    ``SumReducer`` by nothing. A pair that a miner returns twice counts twice. Half losses are added up in float32.

    Args:
        **kwargs: Passed to PML's ``BaseReducer`` (``collect_stats``).

    Examples:
        >>> import torch
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> emb, labels = torch.eye(3), torch.tensor([0, 0, 0])  # six pairs at distance 2 ** 0.5
        >>> ContrastiveLoss(reducer=BatchAverageReducer())(emb, labels)
        tensor(2.8284)
    """

    def element_reduction(self, losses: Tensor, loss_indices: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        total = upcast_half(losses).sum()  # half could not hold it
        return total / len(embeddings) if len(embeddings) else total

    def pos_pair_reduction(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.element_reduction(*args, **kwargs)

    def neg_pair_reduction(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.element_reduction(*args, **kwargs)

    def triplet_reduction(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.element_reduction(*args, **kwargs)
