import torch

from ..utils import common_functions as c_f
from .base_metric_loss_function import BaseMetricLossFunction


class DivergenceLoss(BaseMetricLossFunction):
    """
    The divergence loss of Attention-based Ensemble for Deep Metric Learning, ECCV 2018.
    It pushes the learners of an ensemble apart, whose vectors lie side by side
    in one embedding. Learners of different samples are not compared.
    Args:
        num_learners: The number of slices that an embedding consists of.
        margin: A squared distance of unit vectors, between 0 and 4.
                Two learners of a sample are pushed while they are nearer than that.
    """

    def __init__(self, num_learners, margin=1, **kwargs):
        if "distance" in kwargs:
            raise ValueError("DivergenceLoss compares learners and takes no distance")
        super().__init__(**kwargs)
        if num_learners < 1:
            raise ValueError("num_learners must be >= 1, got {}".format(num_learners))
        if margin <= 0:
            raise ValueError("margin must be > 0, got {}".format(margin))
        self.num_learners = num_learners
        self.margin = margin
        self.num_pairs = num_learners * (num_learners - 1) // 2
        self.add_to_recordable_attributes(
            list_of_names=["num_learners", "margin"], is_stat=False
        )
        self.add_to_recordable_attributes(name="learner_similarity", is_stat=True)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        c_f.indices_tuple_not_supported(indices_tuple)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        cosines = self.learner_cosines(embeddings)
        self.set_stats(cosines)
        # the squared distance of unit vectors is 2 - 2 * cosine
        losses = torch.nn.functional.relu(self.margin - 2 + 2 * cosines)
        losses = torch.sum(torch.triu(losses, diagonal=1), dim=(1, 2))
        return {
            "loss": {
                "losses": losses,
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
        }

    def learner_cosines(self, embeddings):
        if embeddings.size(1) % self.num_learners != 0:
            raise ValueError(
                "num_learners = {} must divide the embedding size {}".format(
                    self.num_learners, embeddings.size(1)
                )
            )
        learners = embeddings.reshape(embeddings.size(0), self.num_learners, -1)
        norms = torch.norm(learners, dim=2, keepdim=True)
        # a learner of zeros has no direction, and should get no infinite gradient
        inverse = 1 / torch.clamp(norms, min=c_f.small_val(norms.dtype))
        learners = learners * torch.where(norms > 0, inverse, torch.zeros_like(norms))
        return torch.bmm(learners, learners.transpose(1, 2))

    def set_stats(self, cosines):
        if self.collect_stats:
            with torch.no_grad():
                total = torch.sum(torch.triu(cosines, diagonal=1)).item()
                num_compared = cosines.size(0) * self.num_pairs
                self.learner_similarity = total / max(num_compared, 1)
