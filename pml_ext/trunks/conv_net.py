"""A small convolutional network for small images."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Three stages of a 3 x 3 convolution with batch norm, at full, half and a quarter of the resolution.

    What an image of 28 to 64 pixels leaves room for; without a download, and fast on a CPU.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first stage; each stage has twice those of the one before.

    Attributes:
        num_features: Channels of the last stage, as in timm.

    Shape:
        - images: ``(B, in_channels, H, W)``. Output: ``(B, 4 * width, H // 4, W // 4)``.

    Examples:
        >>> import torch
        >>> ConvNet(in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 128, 7, 7])
    """

    def __init__(self, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stage1 = _stage(in_channels, width, pool=False)
        self.stage2 = _stage(width, 2 * width)
        self.stage3 = _stage(2 * width, 4 * width)
        self.num_features = 4 * width

    def forward(self, images: Tensor) -> Tensor:
        """Return the last map."""
        features: Tensor = self.stage3(self.stage2(self.stage1(images)))
        return features

    def two_levels(self) -> nn.Module:
        """Return this network, giving the maps of its last two stages, as ``GlobalLocalTrunk`` wants them."""
        return _TwoLevels(self)


class _TwoLevels(nn.Module):
    def __init__(self, network: ConvNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return local and global features."""
        local = self.network.stage2(self.network.stage1(images))
        return local, self.network.stage3(local)


def _stage(channels: int, out: int, pool: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)
