"""Normalized, temperature-scaled cross entropy of positive pairs without a matrix of all pairs."""

from typing import Any

import torch
from torch import Tensor

from pml_ext.losses.base_pair_loss import BasePairLoss
from pml_ext.losses.log_sum_exp import log_sum_exp_by_row
from pml_ext.pairs import positive_pairs
from pml_ext.pml_internals import pair_term, reduced_term
from pml_ext.streaming.pair_list import list_similarities
from pml_ext.streaming.pair_sums import pair_sums
from pml_ext.streaming.pair_tiles import Pairs
from pml_ext.types import Indices, LossDict
from pml_ext.validation import as_number, check_settings, scalar


class NTXentLoss(BasePairLoss):
    r"""InfoNCE: cross-entropy of each positive pair against the negatives of its anchor.

    $$\ell_{ij} = \log\Big(1 + \sum_{k \in N_i} e^{(s_{ik} - s_{ij}) / \tau}\Big), \quad j \in P_i$$

    $P_i$, $N_i$: positives and negatives of anchor $i$, from the labels or from ``indices_tuple``, in which what is
    named twice counts twice. $s$: similarity (a distance is a negative similarity). Without positive or without
    negative pairs the loss is 0.

    The value is PML's. Differences: with PML's ``CosineSimilarity`` (the default) and ``DotProductSimilarity`` a long
    batch (on a CPU: more than 512 x 512 pairs) is evaluated tile by tile, in memory that grows with the number of
    positive pairs, not with all pairs, and has first derivatives only. PML forms a matrix of positive times negative
    pairs. A tuple with one pair of each kind gives its loss and not 0; a loss above 87, where PML's exponentials
    underflow in float32, goes on growing; ``ref_labels`` may be the object ``labels``.

    Args:
        temperature: $\tau$ > 0, in the units of ``distance``. It may be a parameter; then a matrix of all pairs
            is formed.
        chunk_size: Rows and columns of a tile of similarities. None: as many as stay in the cache; a batch that is one
            tile is evaluated at once.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers >= 0.
        - output: scalar. To the reducer: ``loss``, one for each positive pair, reduction type "pos_pair".

    Raises:
        ValueError: If ``temperature`` is not positive, ``chunk_size`` is < 1, or ``labels`` and ``indices_tuple`` are
            both missing.
        NotImplementedError: If a gradient of the streamed loss is differentiated.

    Examples:
        >>> NTXentLoss(temperature=0.5)(torch.eye(3), torch.tensor([0, 0, 1]))
        tensor(0.6931)

    Source:
        Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS 2016; van den Oord et al.,
        "Representation Learning with Contrastive Predictive Coding", 2018; the name: Chen et al., "A Simple Framework
        for Contrastive Learning of Visual Representations", ICML 2020. As PML, and unlike the latter, other positives
        of the anchor are not in the sum.
    """

    def __init__(self, temperature: float = 0.07, chunk_size: int | None = None, **kwargs: Any) -> None:
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
        of_pairs = self._of_pairs
        if torch.compiler.is_compiling():  # how many pairs there are depends on the labels: not looked into
            of_pairs = torch.compiler.disable(of_pairs)  # type: ignore[no-untyped-call]
        losses, anchors, positives = of_pairs(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if not len(losses):
            return {"loss": reduced_term(embeddings.sum() * 0)}
        return {"loss": pair_term(losses, anchors, positives, positive=True)}

    def _of_pairs(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of all positive pairs, ``(P,)``, and the rows of anchors and positives."""
        temperature = scalar(self.temperature)
        if self._can_stream(embeddings, indices_tuple, ref_emb, temperature):
            found = self._streamed(_sums, embeddings, labels, ref_emb, ref_labels, temperature=temperature)
            anchors, positives, of_positives, of_negatives = found
        else:
            similarity = self._similarity(embeddings, ref_emb)  # (B, R)
            anchors, positives, others, negatives = self._lists(labels, indices_tuple, ref_emb, ref_labels)
            of_positives = similarity[anchors, positives]
            of_negatives = log_sum_exp_by_row(similarity[others, negatives] / temperature, others, len(embeddings))
        exponents = of_negatives[anchors] - of_positives / temperature
        return torch.logaddexp(exponents, exponents.new_zeros(())), anchors, positives


def _sums(pairs: Pairs, temperature: Any, chunk_size: int | None) -> tuple[Tensor, ...]:
    """Return the positive pairs, anchors and others, their similarities, and the log-sum-exps over negatives."""
    scale = 1 / as_number("temperature", temperature)
    of_negatives = pair_sums(pairs, scale, scale, None, chunk_size, "NTXent").negative
    anchors, positives = positive_pairs(pairs.labels, pairs.ref_labels, pairs.own)
    return (
        anchors,
        positives,
        list_similarities(pairs.embeddings, pairs.refs, anchors, positives, pairs.normalize, "NTXent"),
        of_negatives,
    )
