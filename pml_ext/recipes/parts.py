"""What the file of each paper gives."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pml_ext.recipes.settings import Numbers, Settings

if TYPE_CHECKING:
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from torch import Tensor, nn

    from pml_ext.types import Indices


class Parts(NamedTuple):
    """What a method makes of its settings.

    Attributes:
        trunk: The network.
        loss: The loss.
        miner: None: the loss has none.
        settled: Settings that are others than the given ones, since the network cannot have those.
    """

    trunk: "nn.Module"
    loss: "BaseMetricLossFunction"
    miner: "Callable[..., Indices] | None" = None
    settled: "Mapping[str, tuple[Any, str]]" = MappingProxyType({})


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
