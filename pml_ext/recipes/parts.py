"""What the file of each paper returns."""

from collections.abc import Callable
from typing import NamedTuple

from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor, nn

from pml_ext.recipes.settings import Numbers, Settings
from pml_ext.types import Indices


class Parts(NamedTuple):
    """Network, loss and miner (or None)."""

    trunk: nn.Module
    loss: BaseMetricLossFunction
    miner: Callable[..., Indices] | None = None


Build = Callable[[Settings, int, "Tensor | None"], Parts]
"""Settings, number of classes, embeddings of the classes (or None) to the parts."""

Method = tuple[dict[str, Numbers], Build]
"""A recipe's own settings by preset, and what builds it."""
