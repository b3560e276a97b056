"""The base of losses that compare samples with samples: which pairs there are, and whether to walk over tiles."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.similarity import can_stream_pairs, distance_matrix
from pml_ext.pairs import own_places
from pml_ext.streaming.pair_tiles import Pairs
from pml_ext.streaming.proxy_chunks import check_chunk_size
from pml_ext.types import Indices
from pml_ext.validation import already_valid, is_learned, validation_enabled


class BasePairLoss(BaseLoss):
    """Pairs from labels or from ``indices_tuple``, in the batch or with references.

    Args:
        chunk_size: Rows and columns of a tile of similarities, which are looked at together. None: what is faster: all
            pairs at once where they fit into the cache, else tiles that do.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``.
    """

    needs_labels = False  # or indices_tuple
    takes_refs = True
    leaves_out_own = True
    streams_euclidean = False  # PML's LpDistance(p=2) too

    def __init__(self, chunk_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_chunk_size(chunk_size)
        self.chunk_size = chunk_size

    def _check_pairs(self, labels: Tensor | None, indices_tuple: Indices | None) -> None:
        if labels is None and indices_tuple is None:
            raise ValueError("labels or indices_tuple must be given, got None for both")

    def _can_stream(
        self, embeddings: Tensor, indices_tuple: Indices | None, ref_emb: Tensor | None, *settings: Any
    ) -> bool:
        """Whether to walk over tiles: not with pairs from a list, nor with settings that are learned."""
        if indices_tuple is not None or is_learned(*settings):
            return False
        return can_stream_pairs(self.distance, embeddings, ref_emb, self.chunk_size, self.streams_euclidean)

    def _streamed(
        self,
        walk: Callable[..., Any],
        embeddings: Tensor,
        labels: Tensor | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Call a function with ``Pairs`` and ``chunk_size``, for one of the walks of ``pml_ext.streaming``."""
        if torch.compiler.is_compiling():  # a call that is not looked into, instead of a loop that is unrolled
            walk = torch.compiler.disable(walk)  # type: ignore[no-untyped-call]
        assert labels is not None
        pairs = Pairs(embeddings, labels, normalize=self.distance.normalize_embeddings)
        if ref_emb is not None:
            ref_labels = labels if ref_labels is None else ref_labels
            pairs = pairs._replace(refs=ref_emb, ref_labels=ref_labels, own=own_places())
        with already_valid():
            return walk(pairs, chunk_size=self.chunk_size, **kwargs)

    def _similarity(self, embeddings: Tensor, ref_emb: Tensor | None) -> Tensor:
        """Return the similarities, ``(B, R)``; a distance is a negative similarity."""
        matrix = distance_matrix(self.distance, embeddings, ref_emb)
        return matrix if self.distance.is_inverted else -matrix

    def _masks(
        self,
        similarity: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return which pairs are positive and which negative, two bool masks like ``similarity``."""
        if indices_tuple is not None:
            return _masks_from_indices(indices_tuple, similarity)
        assert labels is not None
        positive = labels[:, None].eq(labels if ref_labels is None else ref_labels)
        negative = ~positive
        _leave_out_own(positive, ref_emb)
        return positive, negative

    def _lists(
        self,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return anchors and positives, anchors and negatives: of ``indices_tuple``, or all pairs."""
        if indices_tuple is not None:
            return _four(indices_tuple)
        assert labels is not None
        same = labels[:, None].eq(labels if ref_labels is None else ref_labels)
        others, negatives = (~same).nonzero(as_tuple=True)
        _leave_out_own(same, ref_emb)
        return *same.nonzero(as_tuple=True), others, negatives  # type: ignore[return-value]

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def _leave_out_own(same: Tensor, ref_emb: Tensor | None) -> None:
    """Take each sample's pair with itself out of a mask of the pairs of one label."""
    rows = torch.arange(len(same), device=same.device)
    own = rows if ref_emb is None else own_places()
    if own is not None:
        same[rows, own] = False  # fill_diagonal_ would bind a graph to one size


def _four(indices_tuple: Indices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return anchors and positives, anchors and negatives: a triplet is a pair of each kind."""
    return indices_tuple if len(indices_tuple) == 4 else (*indices_tuple[:2], *indices_tuple[::2])


def _masks_from_indices(indices_tuple: Indices, mat: Tensor) -> tuple[Tensor, Tensor]:
    a1, p, a2, n = _four(indices_tuple)
    positive, negative = (torch.zeros(mat.shape, dtype=torch.bool, device=mat.device) for _ in range(2))
    positive[a1, p] = True
    negative[a2, n] = True
    if validation_enabled() and (positive & negative).any():
        pair = tuple((positive & negative).nonzero()[0].tolist())
        raise ValueError(f"indices_tuple must hold a pair as positive or as negative, got {pair} as both")
    return positive, negative
