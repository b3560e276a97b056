"""The divergence of an ensemble's learners (ABE) as a regularizer of any PML loss."""

from torch import Tensor

from pml_ext.learners import DivergenceMixin
from pml_ext.pml_internals import Regularizer, values_in
from pml_ext.precision import full_precision, full_precision_in_backward, upcast_half
from pml_ext.types import LossDict
from pml_ext.validation import check_batch, validation_wanted


class DivergenceRegularizer(DivergenceMixin, Regularizer):
    r"""Push the learners' vectors of one image apart.

    The value of ``DivergenceLoss``, for losses that see the whole vector:
    ``ContrastiveLoss(embedding_regularizer=DivergenceRegularizer(num_learners=8))``.

    $$\ell_i = \sum_{p < q} [m - \lVert b_p(x_i) - b_q(x_i) \rVert^2]_+$$

    Args:
        num_learners: M >= 1, the number of slices that an embedding consists of.
        margin: $m$ > 0, a squared distance of unit vectors, 0 to 4. With 1, learners are pushed while their cosine is
            above 0.5.
        **kwargs: Passed to PML's ``BaseRegularizer`` (``reducer``, ...). With ``collect_stats``, ``learner_similarity``
            is the mean cosine between two learners of one sample.

    Shape:
        - embeddings: ``(B, M * d)``, floating point. Output: scalar.

    Raises:
        TypeError: If the embeddings are not a floating point tensor.
        ValueError: If an argument breaks a rule, ``num_learners`` does not divide the width, or the embeddings are not
            finite.

    Examples:
        >>> import torch
        >>> DivergenceRegularizer(num_learners=2)(torch.tensor([[1.0, 0.0, 0.8, 0.6]]))
        tensor(0.6000)

    Source:
        Kim et al., "Attention-based Ensemble for Deep Metric Learning", ECCV 2018; see ``DivergenceLoss``.
    """

    def compute_loss(self, embeddings: Tensor) -> LossDict:
        if validation_wanted():
            check_batch(embeddings)
        with full_precision(embeddings.device):
            terms = self.divergence_terms(upcast_half(embeddings))
            full_precision_in_backward(values_in(terms), [embeddings])
            return terms
