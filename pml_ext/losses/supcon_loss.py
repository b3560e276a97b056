"""Supervised contrastive loss without a matrix of all pairs."""

from typing import Any

import torch
from pytorch_metric_learning.reducers import AvgNonZeroReducer
from torch import Tensor

from pml_ext.losses.base_pair_loss import BasePairLoss
from pml_ext.losses.log_sum_exp import log_sum_exp
from pml_ext.pml_internals import element_term, reduced_term
from pml_ext.streaming.pair_sums import pair_sums
from pml_ext.streaming.pair_tiles import Pairs
from pml_ext.types import Indices, LossDict
from pml_ext.validation import as_number, check_settings, scalar


class SupConLoss(BasePairLoss):
    r"""Cross-entropy of an anchor's positives among all its pairs, averaged over the positives.

    $$\ell_i = \log \sum_{j \in P_i \cup N_i} e^{s_{ij} / \tau} - \frac{1}{|P_i|} \sum_{j \in P_i} s_{ij} / \tau$$

    $P_i$, $N_i$: positives and negatives of anchor $i$, from the labels or from ``indices_tuple``. $s$: similarity (a
    distance is a negative similarity). An anchor without positives has loss 0, which the default reducer,
    ``AvgNonZeroReducer``, leaves out. Without any positive or without any negative pair the loss is 0.

    The value is PML's. Differences: with PML's ``CosineSimilarity`` (the default) and ``DotProductSimilarity`` a long
    batch (on a CPU: more than 512 x 512 pairs) is evaluated tile by tile, in memory that does not grow with the square,
    and has first derivatives only; a tuple with one pair of each kind gives its loss and not 0; losses are finite
    where PML's exponentials underflow; ``ref_labels`` may be the object ``labels``.

    Args:
        temperature: $\tau$ > 0, in the units of ``distance``. It may be a parameter; then a matrix of all pairs
            is formed.
        chunk_size: Rows and columns of a tile of similarities. None: as many as stay in the cache; a batch that is one
            tile is evaluated at once, and so is a compiled loss.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers >= 0.
        - output: scalar. To the reducer: ``loss``, ``(B,)``, reduction type "element".

    Raises:
        ValueError: If ``temperature`` is not positive, ``chunk_size`` is < 1, ``labels`` and ``indices_tuple`` are both
            missing, or a pair is both positive and negative.
        NotImplementedError: If a gradient of the streamed loss is differentiated.

    Examples:
        >>> SupConLoss(temperature=0.5)(torch.eye(3), torch.tensor([0, 0, 1]))
        tensor(0.6931)

    Source:
        Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, Eq. 2.
    """

    def __init__(self, temperature: float = 0.1, chunk_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(chunk_size, **kwargs)
        check_settings(positive={"temperature": temperature})
        self.temperature = temperature
        self.record("temperature")

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
        temperature = scalar(self.temperature)
        if self._can_stream(embeddings, indices_tuple, ref_emb, temperature):
            sums = self._streamed(_sums, embeddings, labels, ref_emb, ref_labels, temperature=temperature)
        else:
            similarity = self._similarity(embeddings, ref_emb)  # (B, R)
            positive, negative = self._masks(similarity, labels, indices_tuple, ref_emb, ref_labels)
            exponents = similarity / temperature
            of_positives, of_negatives = (log_sum_exp(exponents, keep) for keep in (positive, negative))
            sums = of_positives, of_negatives, (similarity * positive).sum(1), positive.sum(1)
        of_positives, of_negatives, similarities, count = sums
        own = count > 0
        of_positives = of_positives.masked_fill(~own, 0.0)
        losses = torch.logaddexp(of_negatives - of_positives, of_negatives.new_zeros(()))
        means = similarities / temperature / count.clamp_min(1)
        # one positive is its own mean: a difference of rounding would count with AvgNonZeroReducer
        losses = losses + torch.where(count > 1, of_positives - means, 0.0)
        wanted = own & own.any() & (of_negatives > -torch.inf).any()
        return {"loss": element_term(losses.masked_fill(~wanted, 0.0))}

    def get_default_reducer(self) -> AvgNonZeroReducer:
        return AvgNonZeroReducer()


def _sums(pairs: Pairs, temperature: Any, chunk_size: int | None) -> tuple[Tensor, ...]:
    """Return the log-sum-exps over positives and negatives, the sum of positives' similarities and their number."""
    scale = 1 / as_number("temperature", temperature)
    return pair_sums(pairs, scale, scale, None, chunk_size, "SupCon")
