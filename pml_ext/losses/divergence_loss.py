"""Keep the learners of an ensemble different (ABE)."""

from torch import Tensor

from pml_ext.learners import DivergenceMixin
from pml_ext.losses.base_loss import BaseLoss
from pml_ext.types import Indices, LossDict


class DivergenceLoss(DivergenceMixin, BaseLoss):
    r"""Push the learners' vectors of one image apart with a hinge loss.

    $$\ell_i = \sum_{p < q} [m - \lVert b_p(x_i) - b_q(x_i) \rVert^2]_+$$

    $b_p(x_i)$: slice p of embedding i, normalized here. Only learners of one sample are compared; labels play no part.
    The gradient at coincident learners is zero, so they must differ at the start. A slice of zeros has no direction and
    counts as orthogonal to all others.

    Args:
        num_learners: M >= 1, the number of slices that an embedding consists of. With 1 there is no pair: loss 0.
        margin: $m$ > 0, a squared distance of unit vectors, 0 to 4. With 1, learners are pushed while their cosine is
            above 0.5.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``. With ``collect_stats``, ``learner_similarity`` is the mean
            cosine between two learners of one sample. ``distance`` is not used.

    Shape:
        - embeddings: ``(B, M * d)``, floating point. labels and indices_tuple: accepted and ignored.
        - output: scalar. To the reducer: ``loss``, ``(B,)``, reduction type "element".

    Raises:
        ValueError: If an argument breaks a rule, ``num_learners`` does not divide the width, or ``ref_emb`` is given.

    Examples:
        >>> import torch
        >>> DivergenceLoss(num_learners=2)(torch.tensor([[1.0, 0.0, 0.8, 0.6], [1.0, 0.0, 0.0, 1.0]]))
        tensor(0.3000)

    Source:
        Kim, Goyal, Chawla, Lee, Kwon: "Attention-based Ensemble for Deep Metric Learning", ECCV 2018. Margin 1 is the
        paper's. Whether it counts pairs once or twice, and how it normalizes over the batch, we do not know: here each
        pair counts once, and the reducer averages over the batch.
    """

    needs_labels = False

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        return self.divergence_terms(embeddings)
