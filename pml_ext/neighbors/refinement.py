"""Embeddings refined by messages from their neighbors, at test time."""

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor, nn
from tqdm import tqdm

from pml_ext.modes import in_mode
from pml_ext.neighbors.reciprocal import neighbor_groups
from pml_ext.neighbors.similarity import unit_embeddings
from pml_ext.validation import check_batch, check_count


@torch.no_grad()
def refine_with_neighbors(
    refiner: nn.Module, embeddings: Tensor, k1: int = 30, size: int = 8, progress: bool = False
) -> Tensor:
    r"""Refine each embedding by messages from its neighbors in the gallery, without labels.

    Each item forms a small batch with its k-reciprocal neighbors, as in re-ranking: items among each other's ``k1``
    nearest; together with the round(k1 / 2)-reciprocal neighbors of each of them, where more than two thirds of those
    are among its own. The nearest ``size`` of them are taken, filled up with plain neighbors if there are fewer; the
    item itself is always one of them. The refined embedding of the item is kept.

    This costs all similarities of the gallery and a pass of the refiner over ``size`` times as many embeddings, and the
    embedding of an item then depends on what else is in the gallery: an index must be built anew when items are added.
    Results that use it must say so.

    Args:
        refiner: An ``IntraBatchRefiner``, or a module that takes embeddings and ``batch``. Used in eval mode, on its
            own device.
        embeddings: ``(N, D)``, floating point, finite; normalized here, as ``IntraBatchLoss`` does.
        k1: Length of the lists of neighbors, >= 1.
        size: Items in a small batch, the item included, >= 1.
        progress: Whether to show a progress bar.

    Returns:
        ``(N, D)``, or ``(N, L * D)`` for a refiner with output "cat".

    Raises:
        TypeError: If ``embeddings`` are not floating point, or ``refiner`` is a loss or no module.
        ValueError: If an argument breaks a rule.

    Examples:
        >>> from pml_ext.trunks import IntraBatchRefiner
        >>> _ = torch.manual_seed(0)
        >>> refine_with_neighbors(IntraBatchRefiner(embedding_size=8), torch.randn(100, 8)).shape
        torch.Size([100, 8])

    Source:
        The optional test mode of Seidenschwarz et al., ICML 2021, by the authors' code (k1 = 30, 8 items); neighbors
        as in Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
    """
    check_batch(embeddings)
    for name, value in (("k1", k1), ("size", size)):
        check_count(name, value)
    if not isinstance(refiner, nn.Module) or isinstance(refiner, BaseMetricLossFunction):
        raise TypeError(f"refiner must be a module such as IntraBatchRefiner, got {type(refiner).__name__}")
    if not len(embeddings):
        return embeddings.new_empty(0, getattr(refiner, "out_features", embeddings.shape[1]))
    unit, parts = unit_embeddings(embeddings), []
    groups = neighbor_groups(unit, k1, size)  # (N, size), the item first
    like = next(refiner.parameters(), unit)
    with in_mode(refiner):
        for group in tqdm(torch.split(groups, max(1, 8192 // size)), desc="refining", disable=not progress):
            batch = torch.arange(len(group), device=unit.device).repeat_interleave(group.shape[1])
            refined = refiner(unit[group.flatten()].to(like), batch=batch.to(like.device))
            parts.append(refined[:: group.shape[1]].to(embeddings))
    return torch.cat(parts)
