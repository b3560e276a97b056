"""Classify embeddings before and after the samples of a batch have exchanged messages (IBC)."""

from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor, nn

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.children import agreed_size, check_child, check_weights
from pml_ext.losses.label_smoothing_cross_entropy_loss import LabelSmoothingCrossEntropyLoss
from pml_ext.losses.logits import LogitsMixin, logits_of
from pml_ext.pml_internals import reduced_term
from pml_ext.precision import full_precision, full_precision_in_backward, upcast_half
from pml_ext.types import Indices, LossDict
from pml_ext.validation import already_valid, check_batch, check_count, inside_a_loss, scalar, shown, validation_wanted

_OLD_NAMES = {
    "norms.layer_0.": "norm.",
    "refined_losses.layer_0.": "refined_loss.",
    "refined_losses.shared.": "refined_loss.",
}
"""Parts of names in state dicts of version 0.1.0 to today's."""


class IntraBatchLoss(LogitsMixin, BaseLoss):
    r"""Let the embeddings of a batch exchange messages, then classify both the refined and the raw embeddings.

    $$L = w_r \, \mathrm{LS}\big(W_r \, \mathrm{BN}(R(\hat{X})) / T\big) + w_0 \, \mathrm{LS}\big((W_0 X + b) / T\big)$$

    $X$: the embeddings. $\hat{X}$: the same, normalized to length 1. $R$: the refiner, through which each sample's
    gradient depends on the whole batch. LS: cross-entropy with label smoothing. The bias of the batch norm stays 0.
    At test time the loss is gone and the trunk's embeddings are used as they are.

    Give it batches of few classes with many samples each (PML's ``MPerClassSampler``), and its parameters to an
    optimizer.

    Args:
        num_classes: C. May be None if both losses are given.
        embedding_size: D.
        refiner: $R$: a module that takes ``(B, D)`` and has ``out_features``. Default: ``IntraBatchRefiner(D)`` (one
            head for an odd D).
        loss: Takes the place of batch norm, classifier and LS on the refined embeddings: any loss of PML or of this
            package, of the refiner's ``out_features``.
        raw_loss: Takes the place of the raw classifier and its LS: any loss of embeddings of width D.
        temperature: $T$ > 0 of the default losses.
        label_smoothing: Label smoothing of the default losses, 0 to 1, 1 excluded.
        refined_weight: $w_r$ >= 0. With 0 there is no refiner.
        raw_weight: $w_0$ >= 0. With 0 there is no raw loss. One of both must be positive; a positive weight may be
            changed during training.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``. With ``collect_stats``, ``refined_loss_value`` and
            ``raw_loss_value`` are recorded. ``distance`` is refused: it belongs to ``loss`` and ``raw_loss``. Reducers
            get two numbers that are already reduced, and act in the given losses only.

    Attributes:
        refiner: $R$, or None.
        norm: The batch norm on the refined embeddings; none with ``loss``.
        refined_loss: The loss of the refined embeddings, or None.
        raw_loss: The raw loss, or None.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers in 0 to C - 1.
        - output: scalar. To the reducer: ``refined_loss`` and ``raw_loss``, weighted, reduction type "already_reduced".

    In training, a batch of one sample is normalized with the running statistics. In eval mode the loss is
    deterministic: no dropout, running statistics.

    Raises:
        TypeError: If a child is not a PML loss, or the refiner no module.
        ValueError: If an argument breaks a rule, a size contradicts a child, ``ref_emb`` is given, or the loss is not
            on the device of the embeddings.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> emb, labels = torch.randn(8, 16), torch.arange(8) // 4
        >>> bool(IntraBatchLoss(num_classes=10, embedding_size=16)(emb, labels) > 0)
        True
        >>> from pml_ext.losses import HybridLoss
        >>> loss_func = IntraBatchLoss(num_classes=10, embedding_size=16, loss=HybridLoss(10, 16))
        >>> loss_func(emb, labels).shape
        torch.Size([])

    Source:
        Seidenschwarz, Elezi, Leal-Taixe: "Learning Intra-Batch Connections for Deep Metric Learning", ICML 2021, and
        the authors' code. Temperature 0.2, one layer and two heads are those for CUB.
    """

    sub_losses = ("refined_loss", "raw_loss")
    needs_labels = False  # or the losses inside ask for them

    def __init__(
        self,
        num_classes: int | None,
        embedding_size: int,
        refiner: nn.Module | None = None,
        loss: BaseMetricLossFunction | None = None,
        raw_loss: BaseMetricLossFunction | None = None,
        temperature: float = 0.2,
        label_smoothing: float = 0.1,
        refined_weight: float = 1.0,
        raw_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_weights(refined_weight=refined_weight, raw_weight=raw_weight)
        check_count("embedding_size", embedding_size)
        if not refined_weight and not raw_weight:
            raise ValueError("refined_weight or raw_weight must be positive, got 0 for both")
        if kwargs.get("distance") is not None:
            got = type(kwargs["distance"]).__name__
            raise ValueError(f"distance must be given to loss or raw_loss itself, got {got}")
        for name, given, weight in (
            ("refiner", refiner, refined_weight),
            ("loss", loss, refined_weight),
            ("raw_loss", raw_loss, raw_weight),
        ):
            if given is not None and not weight:
                raise ValueError(f"{name} must not be given where its weight is 0, got a {type(given).__name__}")
        if refiner is not None and not isinstance(refiner, nn.Module):
            raise TypeError(f"refiner must be a torch.nn.Module, got {shown(refiner)}")
        super().__init__(**kwargs)
        settings: dict[str, Any] = {"temperature": temperature, "label_smoothing": label_smoothing}
        self.refined_weight, self.raw_weight = refined_weight, raw_weight
        self.norm: nn.Module | None
        self.refined_loss: nn.Module | None
        self.refiner: nn.Module | None
        for name in ("norm", "refined_loss", "refiner"):  # optimizers' states know parameters by this order
            self.register_module(name, None)
        if refined_weight:
            self.refiner = _default_refiner(embedding_size) if refiner is None else refiner
            width = _out_features(self.refiner, embedding_size)
            if loss is None:
                norm = nn.BatchNorm1d(width)
                norm.bias.requires_grad_(False)
                small = partial(nn.init.normal_, std=0.001)
                self.norm = norm
                self.refined_loss = LabelSmoothingCrossEntropyLoss(
                    _known(num_classes), width, bias=False, weight_init_func=small, **settings
                )
            else:
                check_child("loss", loss)
                agreed_size("embedding_size", width, {"loss": loss})
                self.refined_loss = loss
        if raw_weight and raw_loss is None:
            raw_loss = LabelSmoothingCrossEntropyLoss(_known(num_classes), embedding_size, **settings)
        if raw_loss is not None:
            check_child("raw_loss", raw_loss)
            agreed_size("embedding_size", embedding_size, {"raw_loss": raw_loss})
        self.raw_loss = raw_loss
        children = {name: child for name, child in (("loss", loss), ("raw_loss", raw_loss)) if child is not None}
        self.num_classes = agreed_size("num_classes", num_classes, children)
        self.embedding_size = embedding_size
        self.record("refined_weight", "raw_weight", statistics=["refined_loss_value", "raw_loss_value"])

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        values = {"refined_loss": embeddings.sum() * 0, "raw_loss": embeddings.sum() * 0}
        if not len(embeddings):  # batch norm cannot take that; a gradient for each parameter all the same
            values["raw_loss"] = values["raw_loss"] + sum((p.sum() * 0 for p in self.parameters()), torch.zeros(()))
        else:
            with already_valid():
                if self.refiner is not None and self.refined_loss is not None:
                    refined = self.refine(embeddings)
                    if self.norm is not None:
                        refined = _normalize(self.norm, refined)
                    values["refined_loss"] = scalar(self.refined_weight) * self.refined_loss(
                        refined, labels, indices_tuple
                    )
                if self.raw_loss is not None:
                    values["raw_loss"] = scalar(self.raw_weight) * self.raw_loss(embeddings, labels, indices_tuple)
        if self.collect_stats:
            for name, weight in (("refined_loss", self.refined_weight), ("raw_loss", self.raw_weight)):
                setattr(self, f"{name}_value", (values[name] / weight).item() if weight else 0.0)
        return {name: reduced_term(value) for name, value in values.items()}

    def refine(self, embeddings: Tensor) -> Tensor:
        """Return the refined embeddings of a batch, as the refiner gives them.

        Raises:
            TypeError: If the refiner returns something else than a tensor.
            ValueError: If ``refined_weight`` is 0, or the embeddings break a rule.
        """
        if self.refiner is None:
            raise ValueError("refined_weight must be positive for refine, got 0")
        if validation_wanted():
            check_batch(embeddings, embedding_size=self.embedding_size)
        parameter = next(self.refiner.parameters(), embeddings)
        if parameter.device != embeddings.device:
            raise ValueError(
                f"the loss must be on the device of embeddings, {embeddings.device}: call loss_func.to(device), got a "
                f"refiner on {parameter.device}"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "the loss must have parameters of float32 or float64: call loss_func.float() (embeddings may be half), "
                f"got a refiner of {parameter.dtype}"
            )
        with full_precision(embeddings.device):
            unit = nn.functional.normalize(upcast_half(embeddings))
            refined = self.refiner(unit.to(upcast_half(parameter).dtype))
            if isinstance(refined, Tensor) and not inside_a_loss():
                full_precision_in_backward([refined], [embeddings])
        if not isinstance(refined, Tensor):
            raise TypeError(f"refiner must return one tensor, got {type(refined).__name__}")
        return refined

    def _logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits of the raw classifier: they do not depend on the batch."""
        return logits_of(self.raw_loss, embeddings, "raw_loss")

    def load_released(self, state_dict: dict[str, Tensor]) -> None:
        """Load the authors' released weights of refiner, batch norm and classifier (their ``GNNReID``).

        The raw classifier is part of their encoder, and stays as it is.

        Raises:
            RuntimeError: If names or shapes do not fit.
        """
        from pml_ext.trunks import rename_ibc_weights  # on use: timm and torch-geometric

        renamed = {f"refiner.{name}": x for name, x in rename_ibc_weights(state_dict).items()}
        for name, x in state_dict.items():
            if name.startswith(("bottleneck.", "fc.")):  # those of other layers keep their names, and are refused
                renamed[name.replace("bottleneck.0.", "norm.").replace("fc.0.", "refined_loss.")] = x
        own = {name: x for name, x in self.state_dict().items() if name.startswith("raw_loss.")}
        self.load_state_dict(own | renamed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in _OLD_NAMES.items():
            for name in [name for name in state_dict if name.startswith(prefix + old)]:
                state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _default_refiner(embedding_size: int) -> nn.Module:
    from pml_ext.trunks import IntraBatchRefiner  # on use: timm and torch-geometric

    return IntraBatchRefiner(embedding_size, heads=2 if embedding_size % 2 == 0 else 1)


def _out_features(refiner: nn.Module, embedding_size: int) -> int:
    width = getattr(refiner, "out_features", None)
    if not isinstance(width, int):
        raise ValueError(f"refiner must define out_features; {type(refiner).__name__} does not")
    taken = getattr(refiner, "in_features", embedding_size)
    if taken != embedding_size:
        raise ValueError(f"refiner must take embeddings of embedding_size = {embedding_size}, got one for {taken}")
    return width


def _known(num_classes: int | None) -> int:
    if num_classes is None:
        raise ValueError("num_classes must be given unless both loss and raw_loss are, got None")
    return num_classes


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply batch norm; to a single sample, which has no statistics, with the running ones."""
    x = x.to(norm.running_mean.dtype)  # type: ignore[arg-type]
    if norm.training and len(x) == 1:
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)  # type: ignore[arg-type]
    normalized: Tensor = norm(x)
    return normalized
