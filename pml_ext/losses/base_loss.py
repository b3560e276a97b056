"""The base of all losses of the package: what must be true before and around ``compute_loss``."""

from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import MultipleReducers
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from pml_ext.losses.optimizer_watch import OptimizerWatch
from pml_ext.precision import full_precision, upcast_half
from pml_ext.types import Indices
from pml_ext.validation import check_batch, validation_wanted


class BaseLoss(BaseMetricLossFunction):
    """PML's base with checked input and a float32 island.

    Half embeddings (``ref_emb`` too) are raised to float32, with autocast off, so that the loss is float32, the
    gradient half and no parameter changes its dtype; labels and indices of any integer dtype become int64.

    Subclasses implement ``compute_loss`` and set ``num_classes`` and ``embedding_size`` where they know them.
    """

    num_classes: int | None = None
    embedding_size: int | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._optimizer_watch = OptimizerWatch()

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
        if validation_wanted():
            check_batch(embeddings, labels, indices_tuple, ref_emb, ref_labels, self.num_classes, self.embedding_size)
            self._optimizer_watch.look(self)
        with full_precision(embeddings.device):
            self.reset_stats()
            emb = upcast_half(embeddings)
            own_labels, labels = labels, _to_int64(labels, emb)
            indices_tuple = None if indices_tuple is None else tuple(_to_int64(x, emb) for x in indices_tuple)
            if ref_emb is None or (ref_emb is embeddings and (ref_labels is None or ref_labels is own_labels)):
                ref_emb, ref_labels = emb, labels  # PML tells "the batch itself" by identity
            else:
                dtype = torch.promote_types(emb.dtype, upcast_half(ref_emb).dtype)
                # views, or PML would take the same labels for the batch itself and lose the pairs (i, i)
                emb, ref_emb = emb.to(dtype), ref_emb.to(dtype).view_as(ref_emb)
                ref_labels = None if ref_labels is None else _to_int64(ref_labels, emb).view_as(ref_labels)
            c_f.check_shapes(emb, labels)  # also where validation is off or the loss is compiled: shapes cost nothing
            c_f.check_shapes(ref_emb, ref_labels)
            loss_dict = self.compute_loss(emb, labels, indices_tuple, ref_emb, ref_labels)
            self.add_embedding_regularization_to_loss_dict(loss_dict, emb)
            return self.reducer(loss_dict, emb, self.element_labels(labels))

    def element_labels(self, labels: Tensor | None) -> Tensor | None:
        """Return what the indices of "element" losses index: the labels of the batch, unless losses are per class."""
        return labels

    @staticmethod
    def element_losses(losses: Tensor) -> dict[str, Any]:
        """Return what reducers take for the losses of the batch's samples, ``(B,)``; of no samples, 0."""
        if not len(losses):  # the mean of nothing would be NaN
            return BaseLoss.reduced_loss(losses.sum())
        indices = c_f.torch_arange_from_size(losses)
        return {"losses": losses, "indices": indices, "reduction_type": "element", "divisor": len(losses)}

    @staticmethod
    def reduced_loss(value: Tensor) -> dict[str, Any]:
        """Return what reducers take for one number."""
        return {"losses": value, "indices": None, "reduction_type": "already_reduced"}

    def set_reducer(self, reducer: Any) -> None:
        """Set the reducer as PML does, but refuse a ``MultipleReducers`` with keys that are no sub-loss."""
        if isinstance(reducer, MultipleReducers):
            unknown = sorted(set(reducer.reducers) - set(self.sub_loss_names()))
            if unknown:
                names = ", ".join(self.sub_loss_names())
                raise ValueError(f"reducer must have keys among the sub-losses {names}, got {', '.join(unknown)}")
        super().set_reducer(reducer)

    def extra_repr(self) -> str:
        """Show the recordable settings."""
        names = getattr(self, "_record_these", [])
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _to_int64(x: Tensor | None, like: Tensor) -> Any:
    return None if x is None else c_f.to_device(x, like).long()
