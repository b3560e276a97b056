import pytest
import torch
from torch import nn

from pml_ext.trunks import GlobalLocalTrunk
from pml_ext.trunks.conv_net import ConvNet

IMAGES = torch.randn(3, 2, 21, 17, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ConvNet(in_channels=2, width=4).eval()


def test_is_three_stages(network):
    """Convolution, norm and ReLU, with 2 x 2 pooling before the second and the third; twice the channels in each."""
    x = IMAGES
    for i, (stage, width) in enumerate(zip((network.stage1, network.stage2, network.stage3), (4, 8, 16), strict=True)):
        convolution, norm = [m for m in stage if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        x = nn.functional.max_pool2d(x, 2) if i else x
        x = nn.functional.conv2d(x, convolution.weight, padding=1)
        x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
        assert x.shape[1] == width
    assert x.shape == (3, network.num_features, 5, 4)
    torch.testing.assert_close(network(IMAGES), x)


def test_names_of_the_parameters(network):
    """State dicts that were saved stay loadable."""
    names = [name for name, _ in network.named_parameters()]
    assert names[:6] == [
        "stage1.0.weight",
        "stage1.1.weight",
        "stage1.1.bias",
        "stage2.1.weight",
        "stage2.2.weight",
        "stage2.2.bias",
    ]
    assert [name for name, _ in network.two_levels().named_parameters()] == [f"network.{name}" for name in names]


def test_two_levels(network):
    local, last = network.two_levels()(IMAGES)
    assert torch.equal(local, network.stage2(network.stage1(IMAGES)))
    assert torch.equal(last, network(IMAGES))
    trunk = GlobalLocalTrunk(network.two_levels(), 6, feature_channels=(8, 16))
    assert trunk(IMAGES).shape == (3, 6)
