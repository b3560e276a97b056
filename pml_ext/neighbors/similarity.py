"""Cosine similarities of all pairs, a part at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pml_ext.precision import full_precision, upcast_half

_CHUNK_ELEMENTS = 1 << 22  # similarities at a time: 16 MB


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """Return rows of length 1, float32 or better, without a graph."""
    with full_precision(embeddings.device):
        return torch.nn.functional.normalize(upcast_half(embeddings.detach()))


def similarity_chunks(unit: Tensor, gallery: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the indices of some rows and their similarities to all rows, ``(n, M)``, until all have been there.

    Args:
        unit: ``(N, D)``, rows of length 1.
        gallery: ``(M, D)``, what they are compared with. None: ``unit``.
    """
    gallery = unit if gallery is None else gallery
    step = max(1, _CHUNK_ELEMENTS // max(len(gallery), 1))
    for rows in torch.split(torch.arange(len(unit), device=unit.device), step):
        yield rows, unit[rows] @ gallery.T
