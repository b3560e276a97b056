"""What a backbone sees in images, without a head: the level that a training starts from."""

from torch import Tensor, nn

from pml_ext.trunks.attention_ensemble import AttentionEnsemble
from pml_ext.trunks.global_local_trunk import GlobalLocalTrunk
from pml_ext.trunks.pooled_trunk import PooledTrunk
from pml_ext.trunks.wrappers import unwrapped
from pml_ext.validation import shown


class BackboneFeatures(nn.Module):
    """Mean over positions of a backbone's last map, the baseline before training.

    As embeddings of a pretrained network without further training, they show what training adds.

    Args:
        trunk: A ``PooledTrunk``, ``GlobalLocalTrunk`` or ``AttentionEnsemble``, which keeps its weights; also inside of
            wrappers.

    Shape:
        - images: ``(B, in_chans, H, W)``. Output: ``(B, C)``.

    Raises:
        TypeError: If ``trunk`` is another network.

    Examples:
        >>> import torch
        >>> BackboneFeatures(PooledTrunk("resnet18", embedding_size=64))(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 512])
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        inside = unwrapped(trunk) if isinstance(trunk, nn.Module) else trunk
        if not isinstance(inside, PooledTrunk | GlobalLocalTrunk | AttentionEnsemble):
            raise TypeError(f"trunk must be a trunk of this package, such as PooledTrunk(name), got {shown(inside)}")
        self.trunk = inside

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        if isinstance(self.trunk, AttentionEnsemble):
            pooled: Tensor = self.trunk.head(self.trunk.stem(images))
            return pooled
        if isinstance(self.trunk, GlobalLocalTrunk):
            return self.trunk.feature_maps(images)[1].mean((2, 3))
        return self.trunk.feature_map(images).mean((2, 3))
