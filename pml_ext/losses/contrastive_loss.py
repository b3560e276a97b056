"""Contrastive loss without a matrix of all pairs."""

from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import AvgNonZeroReducer
from torch import Tensor

from pml_ext.losses.base_pair_loss import BasePairLoss
from pml_ext.losses.similarity import distance_matrix
from pml_ext.pml_internals import pair_term, reduced_term
from pml_ext.streaming.pair_hinges import HingeSums, pair_hinges
from pml_ext.streaming.pair_tiles import Pairs
from pml_ext.types import Indices, LossDict
from pml_ext.validation import as_number, check_settings, scalar


class ContrastiveLoss(BasePairLoss):
    r"""Contrastive loss: pull positive pairs together to one margin, push negative pairs apart to another.

    $$\ell^+_{ij} = \max(0, d_{ij} - m_+),\ j \in P_i \qquad \ell^-_{ij} = \max(0, m_- - d_{ij}),\ j \in N_i$$

    $P_i$, $N_i$: positives and negatives of anchor $i$, from the labels or from ``indices_tuple``, in which what is
    named twice counts twice. $d$: distance, by default PML's ``LpDistance``, Euclidean between unit vectors; for
    a similarity the signs swap, and the margins are similarities. The default reducer, ``AvgNonZeroReducer``, takes the
    mean of the losses that are not 0, for positive and for negative pairs separately; the two means are added.

    The value is PML's. Differences: with PML's ``LpDistance(p=2)``, of ``power`` 1 or 2, ``CosineSimilarity`` or
    ``DotProductSimilarity`` and its ``AvgNonZeroReducer``, ``MeanReducer`` or ``SumReducer`` a long batch (on a CPU:
    more than 512 x 512 pairs) is evaluated tile by tile, in memory that does not grow with the square, and has first
    derivatives only. Distances near 0 are then exact, where PML's matrix cancels: in float32 PML gives copies of a
    vector a distance above 0 and counts them. A tuple with one pair gives its loss, not 0;
    ``ref_labels`` may be the object ``labels``.

    Args:
        pos_margin: $m_+$, in the units of ``distance``. Like ``neg_margin`` it may be a parameter; all pairs are looked
            at at once then. For similarities, 1 and 0 are usual.
        neg_margin: $m_-$, in the same units as ``pos_margin``.
        chunk_size: Rows and columns of a tile of distances. None: as many as stay in the cache; a batch that is one
            tile is evaluated at once, and so is a compiled loss.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers >= 0.
        - output: scalar. To the reducer: ``pos_loss`` and ``neg_loss``, one for each pair, reduction types "pos_pair"
          and "neg_pair"; in tiles both already reduced.

    Raises:
        ValueError: If a margin is not finite, ``chunk_size`` is < 1, or ``labels`` and ``indices_tuple`` are both
            missing.
        NotImplementedError: If a gradient of the streamed loss is differentiated.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> ContrastiveLoss(neg_margin=2)(embeddings, torch.tensor([0, 0, 1]))
        tensor(2.6508)

    Source:
        Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006. As PML, and unlike its
        Eq. 4, hinges are not squared.
    """

    sub_losses = ("pos_loss", "neg_loss")
    streams_euclidean = True

    def __init__(
        self, pos_margin: float = 0, neg_margin: float = 1, chunk_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(chunk_size, **kwargs)
        check_settings({}, {"pos_margin": pos_margin, "neg_margin": neg_margin})
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin
        self.record("pos_margin", "neg_margin")

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
            return {name: reduced_term(embeddings.sum() * 0) for name in self.sub_losses}
        pos_margin, neg_margin = scalar(self.pos_margin), scalar(self.neg_margin)
        if self.reduces_by_sums() and self._can_stream(embeddings, indices_tuple, ref_emb, pos_margin, neg_margin):
            settings = {"pos_margin": pos_margin, "neg_margin": neg_margin}
            settings["power"] = None if self.distance.is_inverted else self.distance.power
            sums = self._streamed(_sums, embeddings, labels, ref_emb, ref_labels, **settings)
            pos = self.reduce_sum("pos_loss", sums.positive, sums.positive_active, sums.positive_number)
            neg = self.reduce_sum("neg_loss", sums.negative, sums.negative_active, sums.negative_number)
            return {"pos_loss": reduced_term(pos), "neg_loss": reduced_term(neg)}
        matrix = distance_matrix(self.distance, embeddings, ref_emb)  # (B, R)
        of_pairs = self._of_pairs
        if torch.compiler.is_compiling():  # how many pairs there are depends on the labels: not looked into
            of_pairs = torch.compiler.disable(of_pairs)  # type: ignore[no-untyped-call]
        pairs = self._lists(labels, indices_tuple, ref_emb, ref_labels)
        return of_pairs(matrix, pairs, pos_margin, neg_margin)

    def _of_pairs(self, matrix: Tensor, pairs: tuple[Tensor, ...], pos_margin: Any, neg_margin: Any) -> LossDict:
        """Return the losses of all pairs, given the distances, ``(B, R)``."""
        anchors, positives, others, negatives = pairs
        pos = self.distance.margin(matrix[anchors, positives], pos_margin).relu()
        neg = self.distance.margin(neg_margin, matrix[others, negatives]).relu()
        terms = {"pos_loss": (pos, anchors, positives, True), "neg_loss": (neg, others, negatives, False)}
        return {name: pair_term(*term) for name, term in terms.items()}

    def get_default_distance(self) -> LpDistance:
        return LpDistance()

    def get_default_reducer(self) -> AvgNonZeroReducer:
        return AvgNonZeroReducer()


def _sums(pairs: Pairs, pos_margin: Any, neg_margin: Any, power: int | None, chunk_size: int | None) -> HingeSums:
    """Return the sums of both kinds of losses and how many there are."""
    margins = as_number("pos_margin", pos_margin), as_number("neg_margin", neg_margin)
    return pair_hinges(pairs, *margins, power, chunk_size, "Contrastive")
