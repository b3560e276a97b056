"""What a loss made of other losses demands of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import Tensor

from pml_ext.types import Indices
from pml_ext.validation import check_indices_tuple, check_number, shown, validation_enabled


def check_child(name: str, child: Any) -> None:
    """Check that a child is one of PML's losses and reduces to one number.

    Raises:
        TypeError: If it is no ``BaseMetricLossFunction``.
        ValueError: If its reducer is a ``DoNothingReducer``.
    """
    if not isinstance(child, BaseMetricLossFunction):
        raise TypeError(f"{name} must be a BaseMetricLossFunction, got {shown(child)}")
    if isinstance(child.reducer, DoNothingReducer):
        raise ValueError(f"{name} must reduce its losses to one number, got a loss with DoNothingReducer")


def check_weights(**weights: Any) -> None:
    """Raise a ValueError that names the first weight that is negative or not finite, a TypeError where it is none."""
    for name, weight in weights.items():
        check_number(name, weight)
        weight = weight.item() if isinstance(weight, Tensor) else weight
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {weight}")


def agreed_size(name: str, given: int | None, children: dict[str, Any]) -> int | None:
    """Return the one value of a size that the argument and the children give, None if none does.

    Args:
        name: ``num_classes`` or ``embedding_size``.
        given: The argument.
        children: Names and losses.

    Raises:
        ValueError: If two values differ.
    """
    known = [given, *(getattr(child, name, None) for child in children.values())]
    values = {value for value in known if value}  # some of PML's losses record the name with the value 0
    if len(values) > 1:
        raise ValueError(f"{name} must agree with {' and '.join(children)}, got {known}")
    return values.pop() if values else None


def mine(
    miner: Callable[..., Indices],
    embeddings: Tensor,
    labels: Tensor | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
) -> Indices:
    """Return what a miner finds, with its form and range checked."""
    mined = miner(embeddings, labels, ref_emb, ref_labels)
    if validation_enabled():
        check_indices_tuple(mined, len(embeddings), len(embeddings if ref_emb is None else ref_emb))
    return mined


def all_leave_out_own(loss: Any) -> bool:
    """Whether a composite loss mines nothing, and its children that see ``ref_emb`` leave out what is told to them."""
    return loss.miner is None and all(
        getattr(child, "leaves_out_own", False) for child in loss.compares_with_refs().values()
    )


def compared_losses(loss: Any, name: str = "loss") -> Iterator[tuple[str, Any]]:
    """Yield the children of a composite loss that see ``ref_emb``, and theirs, with their paths."""
    for child_name, child in loss.compares_with_refs().items():
        yield f"{name}.{child_name}", child
        if hasattr(child, "compares_with_refs"):
            yield from compared_losses(child, f"{name}.{child_name}")
