"""The base of all losses of the package: what must be true before and around ``compute_loss``."""

from typing import Any

import torch
from torch import Tensor

from pml_ext.losses.optimizer_watch import OptimizerWatch
from pml_ext.pml_internals import LossFunction, values_in
from pml_ext.precision import full_precision, full_precision_in_backward, upcast_half, widen
from pml_ext.refused import unchanged_where_refused
from pml_ext.types import Indices
from pml_ext.validation import (
    check_batch,
    check_lengths,
    inside_a_loss,
    is_batch_itself,
    validation_wanted,
    without_refs_to_itself,
)


class BaseLoss(LossFunction):
    """PML's base with checked input and a float32 island.

    Half embeddings (``ref_emb`` too) are raised to float32, with autocast off, so that the loss is float32, the
    gradient half and no parameter changes its dtype; labels and indices of any integer dtype become int64.

    Subclasses implement ``compute_loss``, whose ``ref_emb`` is None for the batch itself, and set ``num_classes`` and
    ``embedding_size`` where they know them.

    Attributes:
        needs_labels: Whether labels must be given.
        takes_refs: Whether ``ref_emb`` may be.
        leaves_out_own: Whether, given places of its samples in ``ref_emb`` by ``pml_ext.pairs.own_rows_at``, the loss
            compares no sample with itself. Others need a list of all pairs but these.
    """

    num_classes: int | None = None
    embedding_size: int | None = None
    needs_labels = True
    takes_refs = False
    leaves_out_own = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optimizer_watch = OptimizerWatch()

    def __call__(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Call the loss with its hooks, which may replace tensors: what is the batch itself, is known before."""
        refs = without_refs_to_itself(embeddings, labels, ref_emb, ref_labels)
        return super().__call__(embeddings, labels, indices_tuple, *refs)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the reduced loss of a batch.

        Args:
            embeddings: ``(B, D)``, floating point, finite.
            labels: ``(B,)``, integers >= 0, on any device. Pair losses do without where ``indices_tuple`` is given.
            indices_tuple: What a miner returned: (a, p, n) or (a1, p, a2, n), positives and negatives being indices
                into ``ref_emb`` where that is given.
            ref_emb: ``(R, D)``, the embeddings to compare with. None, or the very object ``embeddings`` with its own
                labels: the batch itself, in which nothing is compared with itself.
            ref_labels: ``(R,)``, the labels of ``ref_emb``. May be the object ``labels`` (two views of one batch).

        Returns:
            A scalar, float32 (float64 for float64), or a dictionary under ``DoNothingReducer``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If a shape or value breaks a rule. The message names argument, rule and value.
        """
        wanted = validation_wanted()
        if wanted:
            check_batch(embeddings, labels, indices_tuple, ref_emb, ref_labels, self.num_classes, self.embedding_size)
        if labels is None and self.needs_labels:
            raise ValueError("labels are required for this loss function, got None")
        with full_precision(embeddings.device), unchanged_where_refused(self):
            self.clear_statistics()
            ref_before = ref_emb
            emb, own_labels = upcast_half(embeddings), _to_int64(labels, embeddings)
            indices_tuple = None if indices_tuple is None else tuple(_to_int64(x, emb) for x in indices_tuple)
            check_lengths(emb, own_labels)  # also where validation is off or the loss is compiled: shapes cost nothing
            if is_batch_itself(embeddings, labels, ref_emb, ref_labels):
                ref_emb = ref_labels = None
            elif not self.takes_refs:
                raise ValueError("ref_emb is not supported: this loss compares the batch with nothing else")
            else:
                emb, ref_emb, ref_labels = _with_refs(emb, ref_emb, ref_labels)
            terms = self.compute_loss(emb, own_labels, indices_tuple, ref_emb, ref_labels)
            value = self.reduce_terms(terms, emb, self.element_labels(own_labels))
            if not inside_a_loss():  # which hooks the whole graph
                full_precision_in_backward(values_in(value), (embeddings, ref_before))
        if wanted:
            self._optimizer_watch.look(self)
        return value

    def element_labels(self, labels: Tensor | None) -> Tensor | None:
        """Return what the indices of "element" losses index: the labels of the batch, unless losses are per class."""
        return labels


def _to_int64(x: Tensor | None, like: Tensor) -> Any:
    return None if x is None else x.to(like.device, torch.int64)


def _with_refs(emb: Tensor, ref_emb: Any, ref_labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return embeddings and references of one dtype, and the labels of the references.

    The labels as a view: PML's losses take the same object for that of the batch itself, and lose the pairs (i, i).
    """
    dtype = torch.promote_types(emb.dtype, upcast_half(ref_emb).dtype)
    ref_labels = _to_int64(ref_labels, emb)
    check_lengths(ref_emb, ref_labels, "ref_labels")
    return widen(emb, dtype), widen(ref_emb, dtype), None if ref_labels is None else ref_labels.view_as(ref_labels)
