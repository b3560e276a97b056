"""Multi-Similarity loss on masks instead of lists of pairs."""

from typing import Any, Literal

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.log_sum_exp import Term, sum_log1p_sum_exp
from pml_ext.losses.similarity import distance_matrix
from pml_ext.types import Indices, LossDict
from pml_ext.validation import check_settings, validation_enabled


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
        alpha: $\alpha$ > 0, how sharply the positives are weighted.
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
        self.add_to_recordable_attributes(list_of_names=["alpha", "beta", "base"], is_stat=False)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        c_f.labels_or_indices_tuple_required(labels, indices_tuple)
        if not len(embeddings) or not len(ref_emb):
            return self.zero_losses()
        within_batch = ref_emb is embeddings
        mat = distance_matrix(self.distance, embeddings, None if within_batch else ref_emb)  # (B, R)
        if indices_tuple is None:
            not_negative: Tensor = labels[:, None] == ref_labels  # type: ignore[index, assignment]
            not_positive = ~not_negative
            if within_batch:
                not_positive.fill_diagonal_(True)
        else:
            not_positive, not_negative = _masks_from_indices(indices_tuple, mat)
        sign = -1 if self.distance.is_inverted else 1  # a negative's similarity counts up, its distance down
        negative_base = self.base if self.negative_sign == "minus" else -self.base
        alpha, beta = sign * self.alpha, -sign * self.beta
        positives = Term(not_positive, alpha, -alpha * self.base, weight=1 / self.alpha)
        negatives = Term(not_negative, beta, -beta * negative_base, weight=1 / self.beta)
        return {"loss": self.element_losses(sum_log1p_sum_exp(mat, [positives, negatives]))}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_sign={self.negative_sign!r}"

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def _masks_from_indices(indices_tuple: Indices, mat: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is not a positive pair and what is not a negative one, two bool masks like ``mat``."""
    a1, p, a2, n = indices_tuple if len(indices_tuple) == 4 else (*indices_tuple[:2], *indices_tuple[::2])
    not_positive, not_negative = (torch.ones(mat.shape, dtype=torch.bool, device=mat.device) for _ in range(2))
    not_positive[a1, p] = False
    not_negative[a2, n] = False
    if validation_enabled() and not (not_positive | not_negative).all():
        pair = tuple((~not_positive & ~not_negative).nonzero()[0].tolist())
        raise ValueError(f"indices_tuple must hold a pair as positive or as negative, got {pair} as both")
    return not_positive, not_negative
