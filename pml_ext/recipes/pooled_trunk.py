"""The usual network of metric learning: backbone, pooling, one linear map."""

from typing import Any

from torch import Tensor, nn

from pml_ext.pml_internals import ModuleWithRecords
from pml_ext.precision import upcast_half
from pml_ext.trunks import GlobalPool2d, SecondOrderAttention
from pml_ext.trunks.global_local_trunk import SOLAR_REDUCTIONS
from pml_ext.trunks.global_pool import PoolType
from pml_ext.trunks.second_order_attention import Style


class PooledTrunk(ModuleWithRecords):
    """Pool a backbone's map and map it to the embedding: the plain head that others are compared with.

    Args:
        backbone: Images to one map ``(B, C, H, W)``, with ``num_features`` = C.
        embedding_size: D.
        pool_type: Of ``GlobalPool2d``.
        attention: Style of second-order attention before pooling, as on the global level of ``GlobalLocalTrunk``, or
            None.
        num_learners: Into how many slices the embedding is cut that are normalised each for itself. 1: not normalised.

    Attributes:
        out_features: D, as in timm.

    Shape:
        - images: ``(B, C', H, W)``. Output: ``(B, D)``.

    Raises:
        ValueError: If ``embedding_size`` is no multiple of ``num_learners``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embedding_size: int,
        pool_type: PoolType = "avg",
        attention: Style | None = None,
        num_learners: int = 1,
    ) -> None:
        super().__init__()
        if embedding_size < 1 or embedding_size % num_learners:
            raise ValueError(f"embedding_size must be >= 1 and a multiple of {num_learners}, got {embedding_size}")
        channels: Any = backbone.num_features
        self.backbone = backbone
        reduction = 1 if attention == "printed" else SOLAR_REDUCTIONS["global"]
        self.attention = (
            nn.Identity() if attention is None else SecondOrderAttention(channels, reduction, style=attention)
        )
        self.pool = GlobalPool2d(pool_type)
        self.linear = nn.Linear(channels, embedding_size)
        self.out_features = embedding_size
        self.num_learners = num_learners

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings."""
        embeddings: Tensor = self.linear(self.pool(self.attention(self.backbone(images))))
        if self.num_learners == 1:
            return embeddings
        slices = upcast_half(embeddings).reshape(len(embeddings), self.num_learners, -1)
        return nn.functional.normalize(slices, dim=2).flatten(1).to(embeddings.dtype)
