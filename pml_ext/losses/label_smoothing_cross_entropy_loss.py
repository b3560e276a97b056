"""A linear classifier's cross-entropy with temperature and label smoothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.logits import LogitsMixin
from pml_ext.losses.sample_weights import sample_weights
from pml_ext.pml_internals import RegularizedWeights, element_term
from pml_ext.precision import widen
from pml_ext.types import Indices, LossDict
from pml_ext.validation import as_number, check_count, check_settings, scalar


class LabelSmoothingCrossEntropyLoss(RegularizedWeights, LogitsMixin, BaseLoss):
    r"""Classify embeddings by a linear map, with label smoothing.

    $$\ell_i = -w_i \sum_c t_{ic} \log \mathrm{softmax}_c\big((W x_i + b) / T\big), \qquad
    t_{ic} = (1 - \epsilon) [c = y_i] + \epsilon / C$$

    $w_i$: share of sample i in ``indices_tuple``, 1 without a miner. The embeddings are taken as they are, not
    normalized. For classes without a bias and with normalization see ``AdaptiveAdditiveMarginLoss``.

    Args:
        num_classes: C >= 1.
        embedding_size: D >= 1.
        temperature: $T$ > 0. Small: sharp. May be a parameter.
        label_smoothing: $\epsilon$, 0 to 1, 1 excluded.
        bias: Whether there is $b$; it starts at zero.
        **kwargs: Passed to PML's mixin and base: ``weight_init_func`` (default: that of ``torch.nn.Linear``),
            ``weight_regularizer``, ``reducer``, ... ``distance`` is not used.

    Attributes:
        weight: $W$, ``(num_classes, embedding_size)``.
        bias: $b$, ``(num_classes,)``, or None.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers in 0 to C - 1.
        - output: scalar. To the reducer: ``loss``, ``(B,)``, reduction type "element".

    Raises:
        TypeError: If ``temperature`` is not a number, or ``label_smoothing`` none or one that requires a gradient.
        ValueError: If an argument breaks a rule, ``labels`` are missing or ``ref_emb`` is given.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> loss_func = LabelSmoothingCrossEntropyLoss(num_classes=10, embedding_size=8, temperature=0.2)
        >>> bool(loss_func(torch.randn(4, 8), torch.arange(4)) > 0)
        True

    Source:
        The loss of Seidenschwarz et al., ICML 2021 (temperature 0.1 to 0.6, smoothing 0.1), which is
        ``torch.nn.functional.cross_entropy`` on scaled logits.
    """

    num_classes: int
    embedding_size: int

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 1.0,
        label_smoothing: float = 0.1,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_classes", num_classes), ("embedding_size", embedding_size)):
            check_count(name, value)
        check_settings({"temperature": temperature})
        label_smoothing = as_number("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in 0 to 1, 1 excluded, got {label_smoothing}")
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.weight = torch.nn.Parameter(torch.empty(num_classes, embedding_size))
        self.bias = torch.nn.Parameter(torch.empty(num_classes)) if bias else None
        self.reset_parameters()
        self.record("num_classes", "embedding_size", "temperature", "label_smoothing")

    def reset_parameters(self) -> None:
        """Draw the weight by ``weight_init_func``; the bias becomes zero."""
        with torch.no_grad():
            self.weight_init_func(self.weight)
            if self.bias is not None:
                self.bias.zero_()

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        logits = self._logits(embeddings, centered=True)
        losses = torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=as_number("label_smoothing", self.label_smoothing)
        )
        if indices_tuple is not None:
            losses = losses * sample_weights(indices_tuple, len(labels), losses.dtype)
        terms: LossDict = {"loss": element_term(losses)}
        if self.weight_regularizer is not None:
            self.regularize_weights(terms, widen(self.weight.to(logits.device), logits.dtype))
        return terms

    def _logits(self, embeddings: Tensor, centered: bool = False) -> Tensor:
        """Return the logits divided by the temperature; centered: less what the mean class has.

        Softmax does not see that, nor do gradients; where it is huge, rounding would swallow what classes differ in.
        """
        dtype = torch.promote_types(self.weight.dtype, embeddings.dtype)  # moved where used, and never cast
        weight = widen(self.weight.to(embeddings.device), dtype)
        bias = None if self.bias is None else self.bias.to(embeddings.device, dtype)
        if centered:
            weight = weight - weight.detach().mean(0)
            bias = None if bias is None else bias - bias.detach().mean()
        return torch.nn.functional.linear(widen(embeddings, dtype), weight, bias) / scalar(self.temperature)

    def get_default_weight_init_func(self) -> Callable[[Tensor], Tensor]:
        return partial(torch.nn.init.kaiming_uniform_, a=5**0.5)
