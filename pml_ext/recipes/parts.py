"""What the file of each paper gives."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pml_ext.recipes.settings import Numbers, Settings

if TYPE_CHECKING:
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from torch import Tensor, nn

    from pml_ext.types import Indices


class Parts(NamedTuple):
    """Network, loss and miner (or None)."""

    trunk: "nn.Module"
    loss: "BaseMetricLossFunction"
    miner: "Callable[..., Indices] | None" = None


class Method(NamedTuple):
    """A way of training.

    Attributes:
        numbers: Its own settings by preset; those of "all" for each preset, those of "paper" for each of the papers'.
        build: Settings, number of classes, embeddings of the classes (or None) to the parts.
        summary: Network and loss, in a line.
    """

    numbers: dict[str, Numbers]
    build: "Callable[[Settings, int, Tensor | None], Parts]"
    summary: str
