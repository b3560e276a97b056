"""Multi-Similarity loss on masks instead of lists of pairs."""

from typing import Any, Literal, NamedTuple

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.log_sum_exp import log1p_sum_exp
from pml_ext.losses.similarity import distance_matrix
from pml_ext.pml_internals import element_term, reduced_term
from pml_ext.streaming.gradients import quick_apply
from pml_ext.types import Indices, LossDict
from pml_ext.validation import check_settings, scalar, validation_enabled


class MultiSimilarityLoss(BaseLoss):
    r"""Soft-weighted pairs: log-sum-exp over an anchor's positives and, separately, over its negatives.

    $$\ell_i = \frac1\alpha \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (S_{ij} - \lambda)}\Big)
             + \frac1\beta \log\Big(1 + \sum_{j \in N_i} e^{\beta (S_{ij} - \lambda)}\Big)$$

    $P_i$, $N_i$: positives and negatives of anchor $i$, from the labels or from ``indices_tuple``. $S$: similarity
    (for a distance the signs swap). An anchor without pairs has loss 0 and counts in the mean.

    The value is PML's, from two (B, R) masks. It differs where PML falls short: a tuple with one pair gives its loss
    and not 0; losses are (B,) and not (B, 1), which ``ClassWeightedReducer`` would broadcast; ``ref_labels`` may be
    the object ``labels``.

    Args:
        alpha: $\alpha$ > 0, how sharply the positives are weighted. Like ``beta`` and ``base`` it may be a parameter.
        beta: $\beta$ > 0, how sharply the negatives are weighted.
        base: $\lambda$, in the units of ``distance`` (cosine: -1 to 1).
        negative_sign: "minus" as above; "printed" has $S_{ij} + \lambda$ in the second sum, as MHGL's Eq. 6 prints it.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers >= 0.
        - output: scalar. To the reducer: ``loss``, ``(B,)``, reduction type "element".

    Raises:
        ValueError: If ``alpha`` or ``beta`` is not positive, ``negative_sign`` is unknown, ``labels`` and
            ``indices_tuple`` are both missing, or a pair is both positive and negative.

    Examples:
        >>> MultiSimilarityLoss()(torch.eye(3), torch.tensor([0, 0, 1]))
        tensor(0.4378)

    Source:
        Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019, without
        its pair mining: PML's ``MultiSimilarityMiner`` does that. "printed": Ebrahimpour et al., WACV 2022, Eq. 6.
    """

    needs_labels = False  # or indices_tuple
    takes_refs = True

    def __init__(
        self,
        alpha: float = 2,
        beta: float = 50,
        base: float = 0.5,
        negative_sign: Literal["minus", "printed"] = "minus",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_settings(positive={"alpha": alpha, "beta": beta}, finite={"base": base})
        if negative_sign not in ("minus", "printed"):
            raise ValueError(f"negative_sign must be 'minus' or 'printed', got {negative_sign!r}")
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.negative_sign = negative_sign
        self.record("alpha", "beta", "base")

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        if labels is None and indices_tuple is None:
            raise ValueError("labels or indices_tuple must be given, got None for both")
        if not len(embeddings) or (ref_emb is not None and not len(ref_emb)):
            return {"loss": reduced_term(embeddings.sum() * 0)}
        similarity = distance_matrix(self.distance, embeddings, ref_emb)  # (B, R)
        base = scalar(self.base)
        if not self.distance.is_inverted:  # a distance is a negative similarity, and so is its base
            similarity, base = -similarity, -base
        if indices_tuple is not None:
            positive, negative = _masks_from_indices(indices_tuple, similarity)
        else:
            assert labels is not None
            positive = labels[:, None].eq(labels if ref_labels is None else ref_labels)
            negative = ~positive
            if ref_emb is None:
                positive = positive.fill_diagonal_(False)
        alpha, beta = scalar(self.alpha), scalar(self.beta)
        settings = _Settings(alpha, beta, base, base if self.negative_sign == "minus" else -base)
        return {"loss": element_term(_pair_losses(similarity, positive, negative, settings))}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_sign={self.negative_sign!r}"

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


class _Settings(NamedTuple):
    alpha: Any  # numbers, or tensors of one number
    beta: Any
    positive_base: Any
    negative_base: Any


def _exponents(similarity: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
    return (similarity - s.positive_base).mul_(-s.alpha), (similarity - s.negative_base).mul_(s.beta)


def _pair_losses(similarity: Tensor, positive: Tensor, negative: Tensor, s: _Settings) -> Tensor:
    """Return the equation's value for each anchor, ``(B,)``."""
    wanted = similarity.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if wanted and not any(isinstance(x, Tensor) for x in s):  # which may be learned
        losses: Tensor = _apply_pair_losses(similarity, positive, negative, s)[0]  # the same, in fewer passes
        return losses
    of_positives, of_negatives = -s.alpha * (similarity - s.positive_base), s.beta * (similarity - s.negative_base)
    return log1p_sum_exp(of_positives, positive, 1) / s.alpha + log1p_sum_exp(of_negatives, negative, 1) / s.beta


class _PairLosses(torch.autograd.Function):
    r"""The value with its derivative, a softmax of each sum: $e^x / (1 + \sum e^x)$, less that of the positives."""

    @staticmethod
    def forward(similarity: Tensor, positive: Tensor, negative: Tensor, s: _Settings) -> tuple[Tensor, Tensor]:
        of_positives, of_negatives = _exponents(similarity, s)
        pos, pos_softmax = _log1p_sum_exp_(of_positives, positive)
        neg, neg_softmax = _log1p_sum_exp_(of_negatives, negative)
        return pos.div_(s.alpha).add_(neg, alpha=1 / s.beta), neg_softmax.sub_(pos_softmax)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        similarity, positive, negative, ctx.settings = inputs
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(similarity, positive, negative, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        similarity, positive, negative, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a derivative that can be differentiated again
            of_positives, of_negatives = _exponents(similarity, ctx.settings)
            derivative = _softmax(of_negatives, negative) - _softmax(of_positives, positive)
        return derivative * grad[:, None], None, None, None


_apply_pair_losses = quick_apply(_PairLosses)


def _softmax(exponents: Tensor, keep: Tensor) -> Tensor:
    return (exponents.masked_fill(~keep, -torch.inf) - log1p_sum_exp(exponents, keep, 1)[:, None]).exp()


def _log1p_sum_exp_(exponents: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 + sum of exp(x)) of each row, and exp(x) / (1 + sum of exp(x)) in the memory of the exponents."""
    x = exponents.masked_fill_(~keep, -torch.inf)
    largest = x.amax(1, keepdim=True).clamp_min_(0)  # of 0 and the exponents, since 1 = exp(0)
    rest = x.sub_(largest).exp_().sum(1, keepdim=True).add_(torch.expm1(-largest))  # the sum, with its 1, is 1 + rest
    softmax = x.div_(rest + 1)
    return rest.log1p_().add_(largest).squeeze(1), softmax


def _masks_from_indices(indices_tuple: Indices, mat: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs are positive and which negative, two bool masks like ``mat``."""
    a1, p, a2, n = indices_tuple if len(indices_tuple) == 4 else (*indices_tuple[:2], *indices_tuple[::2])
    positive, negative = (torch.zeros(mat.shape, dtype=torch.bool, device=mat.device) for _ in range(2))
    positive[a1, p] = True
    negative[a2, n] = True
    if validation_enabled() and (positive & negative).any():
        pair = tuple((positive & negative).nonzero()[0].tolist())
        raise ValueError(f"indices_tuple must hold a pair as positive or as negative, got {pair} as both")
    return positive, negative
