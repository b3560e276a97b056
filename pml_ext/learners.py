"""The slices of an ensemble's embedding: one (B, M * d) tensor holds M learners' vectors side by side."""

from typing import Any

import torch
from torch import Tensor

from pml_ext.pml_internals import element_term
from pml_ext.precision import upcast_half
from pml_ext.types import LossDict
from pml_ext.validation import check_count, check_embeddings, check_settings, check_values, scalar

__all__ = ["learner_similarity", "split_learners"]


def split_learners(embeddings: Tensor, num_learners: int, name: str = "embeddings") -> Tensor:
    """Return the learners' slices, a view where possible.

    Args:
        embeddings: ``(B, M * d)``.
        num_learners: M >= 1.
        name: What messages call the first argument.

    Returns:
        ``(B, M, d)``.

    Raises:
        TypeError: If ``embeddings`` are not a tensor.
        ValueError: If the width is not a multiple of ``num_learners``.

    Examples:
        >>> split_learners(torch.arange(6).view(1, 6), num_learners=3).tolist()
        [[[0, 1], [2, 3], [4, 5]]]
    """
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or embeddings.shape[1] % num_learners:
        shape = tuple(embeddings.shape)
        raise ValueError(f"{name} must have a width that num_learners = {num_learners} divides, got shape {shape}")
    return embeddings.reshape(len(embeddings), num_learners, embeddings.shape[1] // num_learners)


def _learner_cosines(embeddings: Tensor, num_learners: int) -> Tensor:
    """Return the cosines between the learners' slices of each sample, ``(B, M, M)``, from one batched product.

    A slice of zeros has cosine 0 with all, itself included, and gets no gradient. One shorter than 1e-12 is divided by
    that, as ``torch.nn.functional.normalize`` does.
    """
    slices = split_learners(embeddings, num_learners)
    norms = torch.linalg.vector_norm(slices, dim=2, keepdim=True)
    unit = slices * torch.where(norms > 0, norms.clamp_min(1e-12).reciprocal(), 0)
    return unit @ unit.transpose(1, 2)


@torch.no_grad()
def learner_similarity(embeddings: Tensor, num_learners: int) -> float:
    """Return the mean cosine between two learners of one sample: 1 where all learners are alike.

    Args:
        embeddings: ``(B, M * d)``, floating point.
        num_learners: M >= 1.

    Returns:
        A number in -1 / (M - 1) to 1; 0 for an empty batch or a single learner.

    Raises:
        TypeError: If ``embeddings`` are not a floating point tensor.
        ValueError: If the width is not a multiple of ``num_learners``.

    Examples:
        >>> learner_similarity(torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0]]), num_learners=2)
        0.5
    """
    check_embeddings("embeddings", embeddings)
    check_values("embeddings", embeddings)
    cosines = _learner_cosines(upcast_half(embeddings), num_learners)
    pairs = len(cosines) * num_learners * (num_learners - 1) // 2
    return cosines.triu(1).sum().item() / max(pairs, 1)


class DivergenceMixin:
    r"""What the loss and the regularizer of divergence share.

    Args:
        num_learners: M >= 1.
        margin: $m$ > 0.
        **kwargs: Passed to the base class.

    Raises:
        ValueError: If an argument breaks a rule.
    """

    collect_stats: bool

    def __init__(self, num_learners: int, margin: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("num_learners", num_learners)
        check_settings({"margin": margin})
        self.num_learners = num_learners
        self.margin = margin
        recorded: Any = self
        recorded.record("num_learners", "margin", statistics=["learner_similarity"])

    def divergence_terms(self, embeddings: Tensor) -> LossDict:
        r"""Return $\sum_{p < q} [m - \lVert b_p - b_q \rVert^2]_+$ of each sample, for the reducer."""
        cosines = _learner_cosines(embeddings, self.num_learners)
        squared_distances = 2 - 2 * cosines  # of unit vectors
        losses = (scalar(self.margin) - squared_distances).relu().triu(1).sum((1, 2))  # each pair once
        if self.collect_stats:
            self.learner_similarity = learner_similarity(embeddings, self.num_learners)
        return {"loss": element_term(losses)}
