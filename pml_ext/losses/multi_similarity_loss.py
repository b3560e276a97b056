"""Multi-Similarity loss on tiles or masks instead of lists of pairs."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pml_ext.losses.base_pair_loss import BasePairLoss
from pml_ext.losses.log_sum_exp import log1p_sum_exp
from pml_ext.pml_internals import element_term, reduced_term
from pml_ext.streaming.gradients import quick_apply
from pml_ext.streaming.multi_similarity import multi_similarity_loss
from pml_ext.streaming.pair_tiles import Pairs
from pml_ext.types import Indices, LossDict
from pml_ext.validation import as_number, check_settings, scalar


class MultiSimilarityLoss(BasePairLoss):
    r"""Weigh pairs softly: log-sum-exp over an anchor's positives and, separately, over its negatives.

    $$\ell_i = \frac1\alpha \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (S_{ij} - \lambda)}\Big)
             + \frac1\beta \log\Big(1 + \sum_{j \in N_i} e^{\beta (S_{ij} - \lambda)}\Big)$$

    $P_i$, $N_i$: positives and negatives of anchor $i$, from the labels or from ``indices_tuple``. $S$: similarity
    (for a distance the signs swap). An anchor without pairs has loss 0 and counts in the mean.

    The value is PML's. With PML's ``CosineSimilarity`` (the default) and ``DotProductSimilarity`` a long batch (on a
    CPU: more than 512 x 512 pairs) is evaluated tile by tile, in memory that does not grow with the square, and has
    first derivatives only. Short ones, pairs from ``indices_tuple`` and compiled losses take two (B, R) masks. It
    differs where PML falls short: a tuple with one pair gives its loss and not 0; losses are (B,) and not (B, 1), which
    ``ClassWeightedReducer`` would broadcast; losses below about 1e-8 are not rounded to 0, so
    ``AvgNonZeroReducer`` counts them; ``ref_labels`` may be the object ``labels``.

    Args:
        alpha: $\alpha$ > 0, how sharply the positives are weighted. Like ``beta`` and ``base`` it may be a parameter;
            then all pairs are evaluated at once.
        beta: $\beta$ > 0, how sharply the negatives are weighted.
        base: $\lambda$, in the units of ``distance`` (cosine: -1 to 1).
        negative_sign: "minus" as above; "printed" has $S_{ij} + \lambda$ in the second sum, as MHGL's Eq. 6 prints it.
        epsilon: Mine as PML's ``MultiSimilarityMiner(epsilon)`` with the same ``distance`` does, without a list of
            pairs: positives with $S - \epsilon$ below the anchor's most similar negative and negatives with $S +
            \epsilon$ above its least similar positive count. An ``indices_tuple`` is mined in the same way, as if its
            pairs were all. None: all pairs count.
        chunk_size: Rows and columns of a tile of similarities. None: as many as stay in the cache; a batch that is one
            tile is evaluated at once, and so is a compiled loss.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers >= 0.
        - output: scalar. To the reducer: ``loss``, ``(B,)``, reduction type "element".

    Raises:
        TypeError: If ``epsilon`` is not a number.
        ValueError: If ``alpha`` or ``beta`` is not positive, ``epsilon`` not finite, ``negative_sign`` unknown,
            ``chunk_size`` < 1, ``labels`` and ``indices_tuple`` are both missing, or a pair is both positive and
            negative.
        NotImplementedError: If a gradient of the streamed loss is differentiated.

    Examples:
        >>> MultiSimilarityLoss()(torch.eye(3), torch.tensor([0, 0, 1]))
        tensor(0.4378)

    Source:
        Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019; its
        pair mining is ``epsilon``, 0.1 there. "printed": Ebrahimpour et al., WACV 2022, Eq. 6.
    """

    def __init__(
        self,
        alpha: float = 2,
        beta: float = 50,
        base: float = 0.5,
        negative_sign: Literal["minus", "printed"] = "minus",
        epsilon: float | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(chunk_size, **kwargs)
        check_settings(positive={"alpha": alpha, "beta": beta}, finite={"base": base})
        if epsilon is not None:
            epsilon = as_number("epsilon", epsilon)
            check_settings({}, {"epsilon": epsilon})
        if negative_sign not in ("minus", "printed"):
            raise ValueError(f"negative_sign must be 'minus' or 'printed', got {negative_sign!r}")
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.negative_sign = negative_sign
        self.epsilon = epsilon
        self.record("alpha", "beta", "base")

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        self._check_pairs(labels, indices_tuple)
        if not len(embeddings) or (ref_emb is not None and not len(ref_emb)):
            return {"loss": reduced_term(embeddings.sum() * 0)}
        alpha, beta, base = scalar(self.alpha), scalar(self.beta), scalar(self.base)
        if self._can_stream(embeddings, indices_tuple, ref_emb, alpha, beta, base):
            numbers = {"alpha": alpha, "beta": beta, "base": base, "epsilon": self.epsilon}
            numbers["negative_base"] = base if self.negative_sign == "minus" else -base
            losses = self._streamed(_walk, embeddings, labels, ref_emb, ref_labels, **numbers)
            return {"loss": element_term(losses)}
        similarity = self._similarity(embeddings, ref_emb)  # (B, R)
        positive, negative = self._masks(similarity, labels, indices_tuple, ref_emb, ref_labels)
        if self.epsilon is not None:
            positive, negative = _mined(similarity.detach(), positive, negative, self.epsilon)
        if not self.distance.is_inverted:  # as the distance, so its base
            base = -base
        settings = _Settings(alpha, beta, base, base if self.negative_sign == "minus" else -base)
        return {"loss": element_term(_pair_losses(similarity, positive, negative, settings))}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_sign={self.negative_sign!r}, epsilon={self.epsilon}"


def _walk(pairs: Pairs, **settings: Any) -> Tensor:
    x, labels, refs, ref_labels, own, normalize = pairs
    return multi_similarity_loss(x, labels, refs, ref_labels, own=own, normalize=normalize, **settings)


class _Settings(NamedTuple):
    alpha: Any  # numbers, or tensors of one number
    beta: Any
    positive_base: Any
    negative_base: Any


def _mined(similarity: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the pairs that ``MultiSimilarityMiner(epsilon)`` finds among these."""
    hardest_negative = similarity.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
    hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
    return positive & (similarity - epsilon < hardest_negative), negative & (similarity + epsilon > hardest_positive)


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
