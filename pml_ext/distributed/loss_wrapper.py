"""The loss of the batch of all ranks, with exact gradients."""

import zlib
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pml_ext.distributed.collectives import (
    Group,
    all_reduce,
    broadcast,
    draw_seed,
    gather_numbers,
    gather_rows,
    ranks_of,
    shared_random_state,
    world_size,
)
from pml_ext.distributed.gathered_batch import Gathered, Part, agree, checksum, confirm, gather, on_all_ranks
from pml_ext.distributed.miner_wrapper import SAME_LABELS, convert, input_error, without_itself
from pml_ext.distributed.settings import check_same_settings
from pml_ext.distributed.sharding import whole_batch
from pml_ext.pairs import own_rows_at
from pml_ext.pml_internals import PmlCrossBatchMemory
from pml_ext.streaming.gradients import first_derivative_only
from pml_ext.types import Indices
from pml_ext.validation import (
    check_enqueue_mask,
    check_indices_tuple,
    is_batch_itself,
    is_same,
    validation_enabled,
    without_refs_to_itself,
)


class DistributedLossWrapper(nn.Module):
    r"""Compute a loss on the batch of all ranks, as a single process with the whole batch would.

    A drop-in for PML's class, right for every loss of PML and of this package. The model belongs in
    ``DistributedDataParallel`` (DDP), which takes the mean of its gradients over ranks; the loss does not need to, and
    may.

    - ``efficient=False``: each rank gathers all rows, in rank order, and evaluates the whole loss. The value, the
      gradients of the model behind DDP and the gradients of the loss's parameters are those of one process.
    - ``efficient=True``: each rank compares its own rows with all rows, of which the others carry no gradient; loss and
      gradients, those of parameters included, are the sums over ranks. That is PML's definition; it is not the gradient
      of one process, and losses without ``ref_emb`` refuse it.

    In PML's class the value and the gradients of parameters come out world size times too large, ranks order the rows
    differently, and parameters start differently on each rank. Here parameters and buffers are those of the first rank
    from the start; the loss runs under one random state, so that dropout, random miners and batch norms agree on all
    ranks; ranks may have different numbers of rows; and bad input on one rank raises on all of them.
    Losses whose classes are split over ranks (``process_group``) need this wrapper. Each call takes one number from the
    main random generator.

    Args:
        loss: A loss of PML or of this package, or a ``CrossBatchMemory``. Its ``miner``, if it has one, sees the batch
            of all ranks.
        efficient: See above.
        process_group: The ranks. None: all.

    Shape:
        - embeddings: ``(B, D)``, the rows of this rank. labels: ``(B,)``. indices_tuple: what
          ``DistributedMinerWrapper`` (PML's or that of this package) returns, the same pairs on all ranks.
        - output: scalar.

    In one process, the wrapper returns the value of the loss itself.

    Raises:
        TypeError: If ``loss`` is not a PML loss.
        ValueError: If ``loss`` is a ``CrossBatchMemory`` and ``efficient`` is True; this or another rank is given bad
            input, ranks differ in width or dtype, or what was mined differs between ranks.
        RuntimeError: If a rank does not answer within the process group's timeout. The message names the collective.

    Examples:
        >>> from pml_ext.losses import HybridLoss
        >>> loss_func = DistributedLossWrapper(HybridLoss(num_classes=4, embedding_size=8))
        >>> bool(loss_func(torch.randn(8, 8), torch.arange(8) // 2) > 0)
        True

    Source:
        pytorch-metric-learning. The gradient of own rows is multiplied by the world size, which DDP's mean divides by;
        the loss itself is not.
    """

    def __init__(self, loss: Any, efficient: bool = False, process_group: Group = None) -> None:
        super().__init__()
        if not isinstance(loss, BaseMetricLossFunction | PmlCrossBatchMemory):
            raise TypeError(f"loss must be a BaseMetricLossFunction or CrossBatchMemory, got {type(loss).__name__}")
        if efficient and isinstance(loss, PmlCrossBatchMemory):
            raise ValueError("efficient must be False for CrossBatchMemory, which is not supported with it, got True")
        self.loss = loss
        self.efficient = efficient
        self.process_group = process_group
        self.synchronized = False
        self._settings_compared = False
        self._synchronize()

    def __call__(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Any:
        """Call the wrapper with its hooks, which may replace tensors: what is the batch itself, is known before."""
        refs: tuple[Tensor | None, ...] = ref_emb, ref_labels
        if not isinstance(self.loss, PmlCrossBatchMemory):  # which refuses references
            refs = without_refs_to_itself(embeddings, labels, ref_emb, ref_labels) or (None, None)
        return super().__call__(embeddings, labels, indices_tuple, *refs, enqueue_mask)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the batch of all ranks.

        Args:
            embeddings: The rows of this rank.
            labels: The labels of these rows.
            indices_tuple: Rows of the batch of all ranks, own rows first.
            ref_emb: The references of this rank.
            ref_labels: The labels of these references.
            enqueue_mask: For ``CrossBatchMemory``.
        """
        memory = isinstance(self.loss, PmlCrossBatchMemory)
        error = self._check(embeddings, labels, indices_tuple, ref_emb, ref_labels, enqueue_mask)
        ranks = ranks_of(self.process_group)
        if world_size(self.process_group) == 1:
            if memory and ref_emb is not None and error is not None:
                raise error
            with whole_batch(ranks, self.process_group):
                if memory:
                    return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
                return self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        self._synchronize()
        if not self._settings_compared:
            check_same_settings("loss", self, self.process_group)
            self._settings_compared = True
        if is_batch_itself(embeddings, labels, ref_emb, ref_labels):
            ref_emb = ref_labels = None
        parts = [Part(embeddings, labels), None if ref_emb is None else Part(ref_emb, ref_labels)]
        given = {
            "indices_tuple must be given": indices_tuple is not None and not self.efficient,
            "enqueue_mask must be given": enqueue_mask is not None,
            SAME_LABELS: ref_emb is not None and is_same(ref_labels, labels),
            "embeddings must require a gradient": self._has_split_classes()
            and error is None
            and embeddings.requires_grad,
        }
        sizes, seed = agree(parts, error, draw_seed(), self.process_group, given)
        factor = len(ranks)  # DDP's mean over ranks divides by it
        batch = gather(parts[0], sizes[0], self.process_group, factor, "embeddings")  # type: ignore[arg-type]
        refs = None
        if parts[1] is not None:
            refs = gather(parts[1], sizes[1], self.process_group, factor, "ref_emb")
            if is_same(ref_labels, labels):  # PML takes one object for one set of labels
                refs = refs._replace(labels=batch.labels)
        with (
            shared_random_state(seed, embeddings.device),
            whole_batch(None if self.efficient else ranks, self.process_group),
        ):
            if memory:
                mask = self._gather_mask(enqueue_mask, batch)
                return self._on_all_ranks(batch.embeddings, batch.labels, None, mask)
            if self.efficient:
                return self._sum_of_ranks(parts[0], batch, refs, indices_tuple)  # type: ignore[arg-type]
            if indices_tuple is not None:
                indices_tuple = self._same_on_all_ranks(indices_tuple, batch, batch if refs is None else refs)
            if refs is None:
                return self._on_all_ranks(batch.embeddings, batch.labels, indices_tuple)
            return self._on_all_ranks(batch.embeddings, batch.labels, indices_tuple, refs.embeddings, refs.labels)

    def _on_all_ranks(self, *arguments: Any) -> Tensor:
        """Return the loss, if no rank has failed inside it."""
        return on_all_ranks(lambda: self.loss(*arguments), self.loss, self.process_group)

    def _sum_of_ranks(
        self, part: Part, batch: Gathered, refs: Gathered | None, indices_tuple: Indices | None
    ) -> Tensor:
        """Return the sum over ranks of the loss of own rows against all rows."""
        parameters = dict(self.loss.named_parameters())
        zero, *shared = _SumGradients.apply(self.process_group, *parameters.values())
        replaced = dict(zip(parameters, shared, strict=True))
        of_own_rows = partial(self._of_own_rows, part, batch, refs, indices_tuple, replaced)
        loss = on_all_ranks(of_own_rows, self.loss, self.process_group)
        total = all_reduce(loss, self.process_group, "the losses")
        return total + (loss - loss.detach()) + zero.to(loss)  # in this order all ranks have the same value, to the bit

    def _of_own_rows(
        self,
        part: Part,
        batch: Gathered,
        refs: Gathered | None,
        indices_tuple: Indices | None,
        parameters: dict[str, Tensor],
    ) -> Tensor:
        """Return the loss of own rows against all rows."""
        ref_rows, ref_labels = (batch if refs is None else refs).own_first()
        own = (ref_rows if refs is None else batch.own_first()[0])[: len(part.embeddings)]
        labels = None if part.labels is None else part.labels.to(own.device)
        places = None
        if indices_tuple is None:
            if refs is None and labels is not None and getattr(self.loss, "leaves_out_own", False):
                places = torch.arange(len(own), device=own.device)  # without a list of all pairs
            else:
                indices_tuple = _all_pairs(labels, ref_labels)
        with own_rows_at(places):
            loss: Tensor = torch.func.functional_call(
                self.loss, parameters, (own, labels, indices_tuple, ref_rows, ref_labels)
            )
        return loss

    def _same_on_all_ranks(self, indices_tuple: Indices, batch: Gathered, refs: Gathered) -> Indices:
        """Return a tuple with its rows in rank order, if all ranks have the same."""
        error, number = None, 0
        try:
            if validation_enabled():
                check_indices_tuple(indices_tuple, sum(batch.sizes), sum(refs.sizes))
            indices_tuple = convert(indices_tuple, batch, refs, "to_rank_order")
            number = checksum(indices_tuple)
        except Exception as failed:  # what fails here, fails on this rank alone
            error = failed
        if len(set(confirm(error, number, self.process_group))) > 1:
            raise ValueError(
                "indices_tuple must be the same on all ranks, got others on some: mine in the batch of all ranks with "
                "DistributedMinerWrapper"
            )
        return indices_tuple

    def _synchronize(self) -> None:
        """Take over the parameters and buffers of the first rank, once there are ranks."""
        if self.synchronized or world_size(self.process_group) == 1:
            return
        tensors = [*self.loss.parameters(), *self.loss.buffers()]
        shapes = repr([(tuple(x.shape), str(x.dtype)) for x in tensors])
        checksums = gather_numbers([zlib.crc32(shapes.encode())], self.process_group)
        if len({row[0] for row in checksums}) > 1:
            raise ValueError(
                f"loss must have parameters of the same shapes on all ranks (num_classes?), got {shapes} here"
            )
        broadcast([x for x in tensors if not isinstance(x, DTensor)], self.process_group)
        self.synchronized = True

    def _has_split_classes(self) -> bool:
        return any(isinstance(p, DTensor) for p in self.loss.parameters())

    def _check(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        enqueue_mask: Tensor | None,
    ) -> Exception | None:
        """Return what is wrong with this rank's input."""
        inner = self.loss
        if isinstance(self.loss, PmlCrossBatchMemory):
            inner = self.loss.loss
            if ref_emb is not None or ref_labels is not None:
                return ValueError("ref_emb must not be given with CrossBatchMemory, which has references of its own")
            if indices_tuple is not None and world_size(self.process_group) > 1:
                return ValueError("indices_tuple must not be given with CrossBatchMemory: give the miner to the memory")
        num_classes, width = (getattr(inner, name, None) or None for name in ("num_classes", "embedding_size"))
        error = input_error(embeddings, labels, ref_emb, ref_labels, num_classes, width)
        if error is None and enqueue_mask is not None:
            try:
                check_enqueue_mask(enqueue_mask, len(embeddings))
            except (TypeError, ValueError) as mask_error:
                return mask_error
        return error

    def _gather_mask(self, enqueue_mask: Tensor | None, batch: Gathered) -> Tensor | None:
        if enqueue_mask is None:
            return None
        mask = enqueue_mask.to(batch.embeddings.device)
        return torch.cat(gather_rows(mask, batch.sizes, self.process_group, "enqueue_mask"))


def _all_pairs(labels: Tensor | None, ref_labels: Tensor | None) -> Indices:
    """Return all positive and negative pairs but those of a row with itself; own rows come first in the references.

    Raises:
        ValueError: If there are no labels.
    """
    if labels is None or ref_labels is None:
        raise ValueError("labels must be given with efficient=True unless indices_tuple is, got None")
    same = labels[:, None] == ref_labels
    (a1, p), (a2, n) = same.nonzero(as_tuple=True), (~same).nonzero(as_tuple=True)
    return without_itself((a1, p, a2, n))


class _SumGradients(torch.autograd.Function):
    """Hand over parameters; their gradients are summed over ranks. The zero makes every rank take part in that."""

    @staticmethod
    def forward(ctx: Any, group: Group, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        zero = torch.zeros((), requires_grad=True)
        return zero, *(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = tuple(all_reduce(grad, ctx.group, "the gradients of the loss's parameters") for grad in grads)
        return None, *first_derivative_only("A loss with efficient=True", summed, grads)
