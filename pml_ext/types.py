"""Types that several modules share."""

from typing import Any, TypeAlias

from torch import Tensor

Indices: TypeAlias = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]
"""What miners return: (anchors, positives, negatives) or (anchors, positives, anchors, negatives)."""

LossDict: TypeAlias = dict[str, dict[str, Any]]
"""Sub-loss name to its losses, indices and reduction type: what ``compute_loss`` returns and reducers take."""
