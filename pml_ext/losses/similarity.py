"""PML's cosine and dot product matrices with cheaper gradients."""

from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor

from pml_ext.streaming.gradients import inverse_norm, quick_apply, through_norm
from pml_ext.streaming.proxy_chunks import auto_block, auto_chunk_size


def distance_matrix(distance: BaseDistance, query: Tensor, ref: Tensor | None = None) -> Tensor:
    """Return ``distance(query, ref)``.

    PML's own cosine and dot product similarities, which most users keep, are evaluated with fewer passes: a cheaper
    gradient of the normalization, and one product instead of two for the gradient of a batch with itself. All other
    distances, and those that collect statistics, are called.

    Args:
        distance: PML's distance object.
        query: ``(B, D)``, float32 or float64.
        ref: ``(R, D)``, or None for the batch itself.

    Returns:
        ``(B, R)``.
    """
    if not is_plain(distance) or torch.compiler.is_compiling():
        return distance(query) if ref is None else distance(query, ref)
    if distance.normalize_embeddings:
        return _cosine(query, ref)[0]
    return query @ (query if ref is None else ref).T


def can_stream(distance: BaseDistance, embeddings: Tensor, num_classes: int) -> bool:
    """Whether a proxy loss can walk over its proxies instead of calling the distance.

    Not with distances other than PML's own cosine and dot product similarities, nor for an empty batch, nor under
    ``torch.func`` transforms; nor, under ``torch.compile``, where one chunk holds all: dense code is fused there.
    """
    if not is_plain(distance) or not embeddings.numel() or torch._C._are_functorch_transforms_active():
        return False
    return not torch.compiler.is_compiling() or num_classes > auto_chunk_size(
        len(embeddings), embeddings.shape[1], embeddings.device
    )


def can_stream_pairs(
    distance: BaseDistance,
    embeddings: Tensor,
    ref_emb: Tensor | None,
    chunk_size: int | None,
    euclidean: bool = False,
) -> bool:
    """Whether a pair loss can walk over tiles instead of calling the distance, and gains by it.

    Not with distances other than PML's own cosine and dot product similarities, where ``euclidean`` says so its
    Euclidean distance too, nor for an empty batch, nor under ``torch.func`` transforms. Without a ``chunk_size``
    neither where one tile holds all pairs, nor under ``torch.compile``: dense code is faster there, or is fused, and
    has all derivatives.
    """
    plain = is_plain(distance) or (euclidean and is_euclidean(distance))
    if not plain or not embeddings.numel() or torch._C._are_functorch_transforms_active():
        return False
    if chunk_size is not None:
        return True
    if torch.compiler.is_compiling():
        return False
    num_refs = len(embeddings if ref_emb is None else ref_emb)
    return len(embeddings) * num_refs > auto_block(embeddings.device)


def is_plain(distance: BaseDistance) -> bool:
    """Whether a distance is PML's own cosine or dot product similarity, with its defaults and without statistics."""
    own = type(distance) in (CosineSimilarity, DotProductSimilarity) and (distance.p, distance.power) == (2, 1)
    return own and not distance.collect_stats


def is_euclidean(distance: BaseDistance) -> bool:
    """Whether a distance is PML's own Euclidean distance or its square, without statistics."""
    own = type(distance) is LpDistance and distance.p == 2 and distance.power in (1, 2)
    return own and not distance.collect_stats


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, ref: Tensor | None) -> tuple[Tensor | None, ...]:
        query_inverse = inverse_norm(query)
        query_unit = query * query_inverse
        if ref is None:
            return query_unit @ query_unit.T, query_unit, query_inverse, None, None
        ref_inverse = inverse_norm(ref)
        ref_unit = ref * ref_inverse
        return query_unit @ ref_unit.T, query_unit, query_inverse, ref_unit, ref_inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        query, ref, query_unit, query_inverse, ref_unit, ref_inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True wants a gradient that can be differentiated again
            query_inverse = inverse_norm(query)
            query_unit = query * query_inverse
            if ref is not None:
                ref_inverse = inverse_norm(ref)
                ref_unit = ref * ref_inverse
        if ref is None:
            return through_norm((grad + grad.T) @ query_unit, query_unit, query_inverse), None
        query_grad = ref_grad = None
        if ctx.needs_input_grad[0]:
            query_grad = through_norm(grad @ ref_unit, query_unit, query_inverse)
        if ctx.needs_input_grad[1]:
            ref_grad = through_norm(grad.T @ query_unit, ref_unit, ref_inverse)
        return query_grad, ref_grad


_cosine = quick_apply(_Cosine)
