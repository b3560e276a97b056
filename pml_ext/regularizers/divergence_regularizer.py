"""The divergence of an ensemble's learners (ABE) as a regularizer of any PML loss."""

from typing import Any

from pytorch_metric_learning.regularizers import BaseRegularizer
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from pml_ext.learners import PairReduction, check_divergence_settings, divergence, learner_similarity
from pml_ext.precision import full_precision, upcast_half
from pml_ext.types import LossDict


class DivergenceRegularizer(BaseRegularizer):
    r"""Push the learners' vectors of one image apart.

    The value of ``DivergenceLoss``, for losses that see the whole vector:
    ``ContrastiveLoss(embedding_regularizer=DivergenceRegularizer(num_learners=8))``.

    $$\ell_i = \sum_{p < q} [m - \lVert b_p(x_i) - b_q(x_i) \rVert^2]_+$$

    Args:
        num_learners: M >= 1, the number of slices that an embedding consists of.
        margin: $m$ > 0, a squared distance of unit vectors, 0 to 4. With 1, learners are pushed while their cosine is
            above 0.5.
        reduction_over_pairs: "sum" over the M (M - 1) / 2 pairs of a sample, or their "mean".
        **kwargs: Passed to PML's ``BaseRegularizer`` (``reducer``, ...). With ``collect_stats``, ``learner_similarity``
            is the mean cosine between two learners of one sample.

    Shape:
        - embeddings: ``(B, M * d)``, floating point. Output: scalar.

    Raises:
        ValueError: If an argument breaks a rule, or ``num_learners`` does not divide the width.

    Examples:
        >>> import torch
        >>> DivergenceRegularizer(num_learners=2)(torch.tensor([[1.0, 0.0, 0.8, 0.6]]))
        tensor(0.6000)

    Source:
        Kim et al., "Attention-based Ensemble for Deep Metric Learning", ECCV 2018; see ``DivergenceLoss``.
    """

    def __init__(
        self,
        num_learners: int,
        margin: float = 1.0,
        reduction_over_pairs: PairReduction = "sum",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_divergence_settings(num_learners, margin, reduction_over_pairs)
        self.num_learners = num_learners
        self.margin = margin
        self.reduction_over_pairs = reduction_over_pairs
        self.add_to_recordable_attributes(list_of_names=["num_learners", "margin"], is_stat=False)
        self.add_to_recordable_attributes(name="learner_similarity", is_stat=True)

    def compute_loss(self, embeddings: Tensor) -> LossDict:
        if not len(embeddings):
            return {"loss": {"losses": 0, "indices": None, "reduction_type": "already_reduced"}}
        with full_precision(embeddings.device):
            losses = divergence(upcast_half(embeddings), self.num_learners, self.margin, self.reduction_over_pairs)
        if self.collect_stats:
            self.learner_similarity = learner_similarity(embeddings, self.num_learners)
        return {
            "loss": {
                "losses": losses,
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
                "divisor": len(embeddings),
            }
        }
