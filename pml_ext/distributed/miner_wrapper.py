"""Mining in the batch of all ranks."""

from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from pml_ext.distributed.collectives import Group, draw_seed, shared_random_state, world_size
from pml_ext.distributed.gathered_batch import Gathered, Part, agree, gather, on_all_ranks
from pml_ext.distributed.settings import check_same_settings
from pml_ext.refused import unchanged_where_refused
from pml_ext.types import Indices
from pml_ext.validation import (
    check_batch,
    check_integers,
    is_batch_itself,
    is_same,
    validation_enabled,
    without_refs_to_itself,
)

SAME_LABELS = "ref_labels must be the object labels"


class DistributedMinerWrapper(nn.Module):
    """Mine in the batch of all ranks.

    PML's class, with these changes: all ranks mine in the rows in rank order and under one random state, and so find
    the same; ranks may have different numbers of rows. What is returned counts rows as PML does: own rows first, then
    those of the other ranks in their order. Both ``DistributedLossWrapper`` expect that.

    Args:
        miner: Any miner of PML.
        efficient: The same as in the ``DistributedLossWrapper`` that gets the result. True: anchors are own rows only.
        process_group: The ranks. None: all.

    Shape:
        - embeddings: ``(B, D)`` of this rank. Output: indices into the batch of all ranks.

    Raises:
        TypeError: If ``miner`` is not a PML miner.
        ValueError: If this or another rank is given bad input, or another fails.
        RuntimeError: If a rank does not answer in time.

    Examples:
        >>> from pytorch_metric_learning.miners import BatchHardMiner
        >>> miner = DistributedMinerWrapper(BatchHardMiner())  # in one process: the miner itself
        >>> [len(x) for x in miner(torch.eye(4), torch.tensor([0, 0, 1, 1]))]
        [4, 4, 4]

    Source:
        pytorch-metric-learning.
    """

    def __init__(self, miner: Any, efficient: bool = False, process_group: Group = None) -> None:
        super().__init__()
        if not isinstance(miner, BaseMiner):
            raise TypeError(f"miner must be a BaseMiner, got {type(miner).__name__}")
        self.miner = miner
        self.efficient = efficient
        self.process_group = process_group
        self._settings_compared = False

    def __call__(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Any:
        """Call the wrapper with its hooks, which may replace tensors: what is the batch itself, is known before."""
        refs = without_refs_to_itself(embeddings, labels, ref_emb, ref_labels)
        return super().__call__(embeddings, labels, *refs)

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Indices:
        """Return what is mined in the batch of all ranks."""
        if world_size(self.process_group) == 1:
            with unchanged_where_refused(self.miner):
                mined: Indices = self.miner(embeddings, labels, ref_emb, ref_labels)
            return mined
        if not self._settings_compared:
            check_same_settings("miner", self, self.process_group)
            self._settings_compared = True
        if is_batch_itself(embeddings, labels, ref_emb, ref_labels):
            ref_emb = ref_labels = None
        parts = [Part(embeddings, labels), None if ref_emb is None else Part(ref_emb, ref_labels)]
        error = input_error(embeddings, labels, ref_emb, ref_labels)
        given = {SAME_LABELS: ref_emb is not None and is_same(ref_labels, labels)}
        sizes, seed = agree(parts, error, draw_seed(), self.process_group, given)
        with torch.no_grad():
            batch = gather(parts[0], sizes[0], self.process_group, 1, "embeddings")  # type: ignore[arg-type]
            refs = batch if parts[1] is None else gather(parts[1], sizes[1], self.process_group, 1, "ref_emb")
            if parts[1] is not None and is_same(ref_labels, labels):  # PML takes one object for one set of labels
                refs = refs._replace(labels=batch.labels)
        with shared_random_state(seed, embeddings.device):
            return on_all_ranks(partial(self._mine, embeddings, labels, batch, refs), self.miner, self.process_group)

    def _mine(self, embeddings: Tensor, labels: Tensor, batch: Gathered, refs: Gathered) -> Indices:
        """Return what is mined, own rows first."""
        if self.efficient:
            return without_itself(self.miner(embeddings, labels.to(embeddings.device), *refs.own_first()))
        compared = () if refs is batch else (refs.embeddings, refs.labels)
        return convert(self.miner(batch.embeddings, batch.labels, *compared), batch, refs, "to_own_first")


def input_error(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    num_classes: int | None = None,
    embedding_size: int | None = None,
) -> Exception | None:
    """Return what is wrong with this rank's input; labels may be negative where there is no ``num_classes``."""
    if not validation_enabled():
        return None
    try:
        if num_classes is None:
            for name, x in (("labels", labels), ("ref_labels", ref_labels)):
                if isinstance(x, Tensor) and x.ndim == 1:  # else refused below
                    check_integers(name, x)
            labels, ref_labels = (
                x.long().clamp_min(0) if isinstance(x, Tensor) and x.ndim == 1 else x for x in (labels, ref_labels)
            )
        check_batch(embeddings, labels, None, ref_emb, ref_labels, num_classes, embedding_size)
    except Exception as error:  # of whatever kind: the other ranks are to hear of it
        return error
    return None


def without_itself(indices_tuple: Indices) -> Indices:
    """Return pairs or triplets without those in which a row is its own positive; own rows come first in the references.

    A row is never its own negative.
    """
    anchors, positives, *rest = indices_tuple
    keep = anchors != positives
    if len(indices_tuple) == 3:
        return anchors[keep], positives[keep], rest[0][keep]
    return anchors[keep], positives[keep], rest[0], rest[1]


def convert(indices_tuple: Indices, batch: Gathered, refs: Gathered, direction: str) -> Indices:
    """Return a tuple with its rows counted in the other order: ``to_own_first`` or ``to_rank_order``."""
    anchors = (0,) if len(indices_tuple) == 3 else (0, 2)
    return tuple(getattr(batch if i in anchors else refs, direction)(x.long()) for i, x in enumerate(indices_tuple))
