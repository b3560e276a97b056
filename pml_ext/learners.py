"""The slices of an ensemble's embedding: one (B, M * d) tensor holds M learners' vectors side by side."""

from typing import Literal, get_args

import torch
from torch import Tensor

from pml_ext.precision import upcast_half
from pml_ext.validation import check_count, check_settings

__all__ = ["learner_similarity", "split_learners"]

PairReduction = Literal["sum", "mean"]


def split_learners(embeddings: Tensor, num_learners: int, name: str = "embeddings") -> Tensor:
    """Return the learners' slices, a view where possible.

    Args:
        embeddings: ``(B, M * d)``.
        num_learners: M >= 1.
        name: What messages call the first argument.

    Returns:
        ``(B, M, d)``.

    Raises:
        ValueError: If the width is not a multiple of ``num_learners``.

    Examples:
        >>> split_learners(torch.arange(6).view(1, 6), num_learners=3).tolist()
        [[[0, 1], [2, 3], [4, 5]]]
    """
    if embeddings.ndim != 2 or embeddings.shape[1] % num_learners:
        shape = tuple(embeddings.shape)
        raise ValueError(f"{name} must have a width that num_learners = {num_learners} divides, got shape {shape}")
    return embeddings.reshape(len(embeddings), num_learners, embeddings.shape[1] // num_learners)


def _learner_cosines(embeddings: Tensor, num_learners: int) -> Tensor:
    """Return the cosines between the learners' slices of each sample, ``(B, M, M)``, from one batched product.

    A slice of zeros has cosine 0 with all, itself included, and gets no gradient.
    """
    slices = split_learners(embeddings, num_learners)
    norms = torch.linalg.vector_norm(slices, dim=2, keepdim=True)
    unit = slices * torch.where(norms > 0, norms.clamp_min(1e-30).reciprocal(), 0)
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
        ValueError: If the width is not a multiple of ``num_learners``.

    Examples:
        >>> learner_similarity(torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0]]), num_learners=2)
        0.5
    """
    cosines = _learner_cosines(upcast_half(embeddings), num_learners)
    pairs = len(cosines) * num_learners * (num_learners - 1) // 2
    return cosines.triu(1).sum().item() / max(pairs, 1)


def divergence(embeddings: Tensor, num_learners: int, margin: float, reduction_over_pairs: PairReduction) -> Tensor:
    """Return the hinge of each sample, ``(B,)``."""
    cosines = _learner_cosines(embeddings, num_learners)
    # |p - q|^2 = 2 - 2 cos of unit vectors; each pair once
    losses = (margin - 2 + 2 * cosines).relu().triu(1).sum((1, 2))
    if reduction_over_pairs == "mean":
        losses = losses / max(num_learners * (num_learners - 1) // 2, 1)
    return losses


def check_divergence_settings(
    num_learners: int, margin: float, reduction_over_pairs: str = "sum", margin_name: str = "margin"
) -> None:
    """Raise a ValueError that names what breaks a rule."""
    check_count("num_learners", num_learners)
    if reduction_over_pairs not in get_args(PairReduction):
        known = ", ".join(get_args(PairReduction))
        raise ValueError(f"reduction_over_pairs must be one of {known}, got {reduction_over_pairs!r}")
    check_settings({margin_name: margin})
