"""PML's CrossBatchMemory, opened to the losses of this package."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pml_ext.losses.children import compared_losses
from pml_ext.losses.ensemble_loss import EnsembleLoss
from pml_ext.losses.hybrid_loss import HybridLoss
from pml_ext.losses.optimizer_watch import OptimizerWatch
from pml_ext.pairs import joined, own_rows_at, without_pairs
from pml_ext.pml_internals import PmlCrossBatchMemory, clear_statistics, values_in
from pml_ext.precision import full_precision, full_precision_in_backward, upcast_half
from pml_ext.refused import unchanged_where_refused
from pml_ext.types import Indices
from pml_ext.validation import (
    already_valid,
    check_batch,
    check_enqueue_mask,
    check_indices_tuple,
    check_miner,
    check_module,
    validation_wanted,
)


class CrossBatchMemory(PmlCrossBatchMemory):
    """PML's cross-batch memory: compare each batch with the embeddings of earlier batches too.

    It differs from PML's class as follows. It takes a ``HybridLoss`` whose pair part is a loss that PML accepts: the
    pair part sees the memory, the proxy part the batch. It takes an ``EnsembleLoss`` of such losses, whose divergence
    sees the batch. The state dict holds the position in the queue; without it, as in PML's, a loaded memory counts as
    empty. No sample is compared with itself, not even in a batch of one row. Bad input is refused before it enters the
    memory, which stays in float32 or wider. Without a miner, ``MultiSimilarityLoss``, ``SupConLoss``, ``NTXentLoss``
    and ``ContrastiveLoss`` of this package, also inside composites, need no list of all pairs, nor a matrix of them: a
    memory may hold millions.
    Where ``enqueue_mask`` lets nothing in, the memory stays as it is (PML's counts as full from then on).

    Args:
        loss: ``HybridLoss``, ``EnsembleLoss``, ``MultiSimilarityLoss``, or a loss that PML's class takes.
        embedding_size: Width of the embeddings.
        memory_size: Number of embeddings kept, at least as many as enter at once.
        miner: Mines between batch and memory. None: the miner of a ``HybridLoss`` or
            ``EnsembleLoss``, else all pairs.

    Shape:
        - embeddings: ``(B, embedding_size)``. labels: ``(B,)``. enqueue_mask: ``(B,)``, bool, or None.
        - output: scalar.

    Raises:
        TypeError: If ``loss`` is not a supported one, or ``enqueue_mask`` not bool.
        ValueError: If ``embedding_size`` is not that of the loss, or a learner of an ``EnsembleLoss`` has a miner of
            its own; for bad embeddings or labels, as in every loss, a mask of the wrong shape, ``indices_tuple``
            beside a mask, or more rows than the memory holds.

    Examples:
        >>> import torch
        >>> from pml_ext.losses import HybridLoss
        >>> loss_func = CrossBatchMemory(HybridLoss(num_classes=10, embedding_size=64), embedding_size=64)
        >>> for _ in range(2):
        ...     loss = loss_func(torch.randn(8, 64), torch.arange(8) // 2)
        >>> loss_func.queue_idx
        16

    Source:
        Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, through PML's implementation.
    """

    embedding_memory: Tensor
    label_memory: Tensor
    queue_idx: int
    has_been_filled: bool
    _overwritten: tuple[Tensor, Tensor, Tensor] | None = None  # rows, and what was there before the latest batch

    def __init__(
        self, loss: Any, embedding_size: int, memory_size: int = 1024, miner: Any = None, **kwargs: Any
    ) -> None:
        check_module("loss", loss, "MultiSimilarityLoss()")
        check_miner(miner)
        if isinstance(loss, HybridLoss | EnsembleLoss):
            for name, child in compared_losses(loss):
                if isinstance(child, HybridLoss | EnsembleLoss):
                    if child.miner is not None:
                        raise ValueError(f"miner must be given to the memory: {name} would not use its own there")
                elif type(child).__name__ not in PmlCrossBatchMemory.supported_losses():
                    raise TypeError(f"{name} must be one that supports ref_emb, got {type(child).__name__}")
            miner = loss.miner if miner is None else miner
        known = getattr(loss, "embedding_size", None) or embedding_size
        if known != embedding_size:
            raise ValueError(f"embedding_size must be that of the loss, {known}, got {embedding_size}")
        super().__init__(loss, embedding_size, memory_size=memory_size, miner=miner, **kwargs)
        self._optimizer_watch = OptimizerWatch()  # the loss's own does not look where its input is not checked

    @staticmethod
    def supported_losses() -> list[str]:
        return [*PmlCrossBatchMemory.supported_losses(), "EnsembleLoss", "HybridLoss"]

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
        """Return the loss of a batch against the memory, which the batch (or its ``enqueue_mask`` part) has entered.

        With a mask, the rows that enter are not compared, only compared with. ``indices_tuple`` adds pairs or triplets
        to those that are found here; its positives and negatives index the memory.
        """
        if labels is None:
            raise ValueError("labels are required for this loss function, got None")
        wanted = validation_wanted()
        if wanted:
            self._check(embeddings, labels, indices_tuple, enqueue_mask)
        if indices_tuple is not None and enqueue_mask is not None:
            raise ValueError("indices_tuple and enqueue_mask are mutually exclusive, got both")
        if not len(embeddings):
            return (upcast_half(embeddings) * 0).sum()
        given = self, upcast_half(embeddings), labels.long(), indices_tuple, enqueue_mask
        if torch.compiler.is_compiling():  # one call, outside any with: a graph would hold for one position alone
            select: Any = torch.compiler.disable(_select_for_any_length)  # type: ignore[no-untyped-call]
            return self._compare(embeddings, select(*given))
        listed = bool(self.miner) or indices_tuple is not None or not getattr(self.loss, "leaves_out_own", False)
        with unchanged_where_refused(self):
            compared = _select(*given, listed)
            own = None if listed or enqueue_mask is not None else self.curr_batch_idx
            with own_rows_at(own):  # without a list of all pairs
                loss = self._compare(embeddings, compared)
        if wanted:
            self._optimizer_watch.look(self)
        return loss

    def _compare(self, embeddings: Tensor, compared: tuple[Any, ...]) -> Tensor:
        with already_valid(), full_precision(embeddings.device):
            loss: Tensor = self.loss(*compared)
            full_precision_in_backward(values_in(loss), [embeddings])
        return loss

    def _check(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Indices | None, enqueue_mask: Tensor | None
    ) -> None:
        num_classes = getattr(self.loss, "num_classes", None) or None
        check_batch(embeddings, labels, num_classes=num_classes, embedding_size=self.embedding_size)
        entering = len(embeddings)
        if enqueue_mask is not None:
            check_enqueue_mask(enqueue_mask, len(embeddings))
            entering = int(enqueue_mask.sum())
        if entering > self.memory_size:
            raise ValueError(f"at most memory_size = {self.memory_size} embeddings may enter at once, got {entering}")
        if indices_tuple is not None:
            in_memory = self.memory_size if self.has_been_filled else min(self.memory_size, self.queue_idx + entering)
            check_indices_tuple(indices_tuple, len(embeddings), in_memory)

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        if not batch_size:  # PML takes a position that has not moved for a full memory
            return
        if not torch.compiler.is_compiling():
            rows = torch.arange(self.queue_idx, self.queue_idx + batch_size, device=labels.device) % self.memory_size
            self._overwritten = rows, self.embedding_memory[rows], self.label_memory[rows]
        super().add_to_memory(embeddings, labels, batch_size)

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        memory_embeddings: Tensor,
        memory_labels: Tensor,
        indices_tuple: Indices | None,
        without_itself: bool,
    ) -> Indices:
        """Return what is compared. PML leaves each sample's pair with itself in where the batch is one row."""
        mined: Indices = super().create_indices_tuple(embeddings, labels, memory_embeddings, memory_labels, None, False)
        if without_itself:
            mined = without_pairs(mined, self.curr_batch_idx)
        return mined if indices_tuple is None else joined(mined, indices_tuple)

    def saved_state(self) -> Callable[[], None]:
        """Return a function that takes back what a call has done to the memory."""
        memories = self.embedding_memory, self.label_memory
        position = self.queue_idx, self.has_been_filled
        self._overwritten = None

        def restore() -> None:
            if self._overwritten is not None:
                rows, *old = self._overwritten
                for memory, now, x in zip(memories, (self.embedding_memory, self.label_memory), old, strict=True):
                    if now is memory:  # else a memory of another dtype has taken its place
                        memory[rows] = x
            self.embedding_memory, self.label_memory = memories
            self.queue_idx, self.has_been_filled = position

        return restore

    def get_extra_state(self) -> Tensor:
        """Return the position in the queue and whether it has been filled once, as a tensor for the state dict."""
        return torch.tensor([self.queue_idx, int(self.has_been_filled)])

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the position in the queue from a state dict."""
        position = int(state[0])
        if not 0 <= position < self.memory_size:
            raise ValueError(f"queue_idx must be 0 to memory_size - 1 = {self.memory_size - 1}, got {position}")
        self.queue_idx, self.has_been_filled = position, bool(state[1])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Load memory, labels and position together; where they are missing or do not fit, all stay as they were."""
        position = f"{prefix}_extra_state"
        own = {f"{prefix}{name}": getattr(self, name) for name in ("embedding_memory", "label_memory")}
        given = [name for name in own if name in state_dict]
        fitting = [name for name in given if getattr(state_dict[name], "shape", None) == own[name].shape]
        if len(given) == 1:
            lists[-1].append(f"{' and '.join(own)} must be loaded together, got {given[0]} alone")
        if len(fitting) == 2:
            state_dict.setdefault(position, torch.tensor([0, 0]))  # PML's state dict has none
        else:
            state_dict = {name: x for name, x in state_dict.items() if name not in fitting}
            state_dict[position] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def _select(
    memory: CrossBatchMemory,
    embeddings: Tensor,
    labels: Tensor,
    indices_tuple: Indices | None,
    enqueue_mask: Tensor | None,
    listed: bool = True,
) -> tuple[Any, ...]:
    """Let the batch enter the memory, and return what the loss is to compare, as PML's forward does.

    Args:
        memory: The memory.
        embeddings: The batch.
        labels: Labels of the batch.
        indices_tuple: Pairs to add.
        enqueue_mask: What enters.
        listed: Whether to list the pairs. Otherwise the loss takes all.
    """
    clear_statistics(memory)
    device = embeddings.device
    labels = labels.to(device)
    memory.embedding_memory = memory.embedding_memory.to(device, embeddings.dtype)
    memory.label_memory = memory.label_memory.to(device)
    entering, entering_labels = embeddings, labels
    if enqueue_mask is not None:
        entering, entering_labels = embeddings[enqueue_mask], labels[enqueue_mask]
        embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
    memory.add_to_memory(entering, entering_labels, len(entering))
    length = memory.memory_size if memory.has_been_filled else memory.queue_idx
    refs = memory.embedding_memory[:length], memory.label_memory[:length]
    if not listed:
        return embeddings, labels, None, *refs
    with already_valid(), full_precision(device):
        mined = memory.create_indices_tuple(embeddings, labels, *refs, indices_tuple, enqueue_mask is None)
    return embeddings, labels, mined, *refs


def _select_for_any_length(*args: Any) -> tuple[Any, ...]:
    """Do as ``_select``; the first memory, which is as long as its batch, is not to bind the two lengths together."""
    compared = _select(*args)
    for x in compared[-2:]:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return compared
