"""Similarities of the pairs in a list, without copies of their embeddings."""

from typing import Any

import torch
from torch import Tensor

from pml_ext.precision import full_precision, narrow
from pml_ext.streaming.gradients import first_derivative_only, through_norm, unit_rows
from pml_ext.streaming.proxy_chunks import auto_block


def list_similarities(
    embeddings: Tensor, refs: Tensor | None, anchors: Tensor, others: Tensor, normalize: bool, name: str
) -> Tensor:
    """Return the cosine or dot product of each pair, ``(P,)``.

    Args:
        embeddings: ``(B, D)``, float32 or float64.
        refs: ``(R, D)``. None: the batch itself.
        anchors: ``(P,)``, int64, rows of the embeddings.
        others: ``(P,)``, int64, rows of the references.
        normalize: Cosine (True) or dot product (False).
        name: What a message calls the result, where it is differentiated twice.
    """
    with full_precision(embeddings.device):
        values: Tensor = _PairSimilarities.apply(embeddings, refs, anchors, others, normalize, name)
    return values


class _PairSimilarities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        refs: Tensor | None,
        anchors: Tensor,
        others: Tensor,
        normalize: bool,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(embeddings, refs, anchors, others)
        ctx.normalize, ctx.name = normalize, name
        values = embeddings.new_empty(len(anchors))
        for place in _chunks(embeddings, anchors):
            x, y = _rows(embeddings, refs, anchors[place], others[place], normalize)
            values[place] = (x[0] * y[0]).sum(1)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        embeddings, refs, anchors, others = ctx.saved_tensors
        with torch.no_grad(), full_precision(embeddings.device):
            by_embeddings = torch.zeros_like(embeddings) if ctx.needs_input_grad[0] else None
            by_refs = by_embeddings
            if refs is not None:
                by_refs = torch.zeros_like(refs, dtype=embeddings.dtype) if ctx.needs_input_grad[1] else None
            for place in _chunks(embeddings, anchors):
                x, y = _rows(embeddings, refs, anchors[place], others[place], ctx.normalize)
                for total, rows, own, other in ((by_embeddings, anchors, x, y), (by_refs, others, y, x)):
                    if total is not None:
                        by_own = grad[place, None] * other[0]
                        total.index_add_(0, rows[place], by_own if own[1] is None else through_norm(by_own, *own))
            found = by_embeddings, None if refs is None or by_refs is None else narrow(by_refs, refs)
        inputs = tuple(x for x in (embeddings, refs, grad) if x is not None)
        return (*first_derivative_only(ctx.name, found, inputs), None, None, None, None)


def _chunks(embeddings: Tensor, anchors: Tensor) -> list[slice]:
    size = max(1, auto_block(embeddings.device) // max(1, embeddings.shape[1]))
    return [slice(start, start + size) for start in range(0, len(anchors), size)]


def _rows(embeddings: Tensor, refs: Tensor | None, anchors: Tensor, others: Tensor, normalize: bool) -> Any:
    """Return both sides of some pairs and 1 / |x| of each, or None."""
    refs = embeddings if refs is None else refs
    return [
        unit_rows(x.index_select(0, i).to(embeddings.dtype), normalize)
        for x, i in ((embeddings, anchors), (refs, others))
    ]
