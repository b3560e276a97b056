"""From descriptions of classes to what margins are formed from."""

from typing import Literal

import torch
from torch import Tensor

ClassMetric = Literal["cosine", "euclidean", "squared_euclidean"]
_MOST_EXACT = 20_000  # described classes, up to which the largest distance is exact
_ROWS = 1024


def prepare_embeddings(embeddings: Tensor, metric: ClassMetric, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return rows whose squared distances (metric "euclidean": whose distances) are those of the classes.

    Rows are centred: that changes no distance, and keeps differences of large numbers out of the margins.

    Args:
        embeddings: ``(C, E)``, float32 or float64. A row with NaN, or of zeros, describes nothing.
        metric: "cosine" is 1 - cosine.
        normalize: Whether to divide by the largest distance: exact up to 20,000 described classes; beyond, that of
            20,000 drawn at random, always the same ones.

    Returns:
        ``(C, E)``, with zeros for classes that are not described, and which are, ``(C,)``, bool.
    """
    described = ~embeddings.isnan().any(1) & embeddings.any(1)
    rows = embeddings.nan_to_num(nan=0.0).double() * described[:, None]
    if metric == "cosine":  # half the squared distance of unit vectors; of any length, so that no square is lost
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        rows = torch.nn.functional.normalize(rows) / 2**0.5
    rounding = (8 * torch.finfo(embeddings.dtype).eps) ** 2 * rows.square().sum(1).max()
    center = rows.sum(0) / described.sum().clamp_min(1)
    rows = (rows - center) * described[:, None]
    largest = _largest_square(rows[described])
    if largest <= rounding:  # all equal: dividing by the largest would blow rounding up
        rows = torch.zeros_like(rows)
    elif normalize:
        rows = rows / largest**0.5
    return rows.to(embeddings.dtype), described


def prepare_distances(distances: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the matrix, zero where a class is not described, and which are.

    Args:
        distances: ``(C, C)``, float32 or float64, >= 0. A class whose row and column are zeros or NaN, but for the
            diagonal, is not described.
        normalize: Whether to divide by the largest distance.

    Raises:
        ValueError: If a distance between two described classes is NaN.
    """
    others = ~torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    known = distances.nan_to_num(nan=0.0) * others
    described = known.any(1) | known.any(0)
    valid = others & described & described[:, None]
    missing = (distances.isnan() & valid).nonzero()
    if len(missing):
        row, column = missing[0].tolist()
        raise ValueError(
            "class_distances must be NaN for a whole class (its row and column) or not at all, got NaN in row "
            f"{row}, column {column} alone"
        )
    distances = distances.masked_fill(~valid, 0.0)
    if normalize and distances.any():
        distances = distances / distances.max()
    return distances, described


def _largest_square(rows: Tensor) -> float:
    """Return the largest squared distance of two rows, without a matrix of all of them."""
    if len(rows) > _MOST_EXACT:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[order[:_MOST_EXACT].to(rows.device)]
    largest = 0.0
    squares = rows.square().sum(1)
    for start in range(0, len(rows), _ROWS):  # distances are symmetric: from the diagonal on
        block = torch.addmm(squares[start:], rows[start : start + _ROWS], rows[start:].T, alpha=-2)
        largest = max(largest, (block + squares[start : start + _ROWS, None]).max().item())
    return largest
