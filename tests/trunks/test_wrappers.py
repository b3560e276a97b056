import pytest
import torch
from torch import nn

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import CrossBatchMemory, HybridLoss, ProxyAnchorLoss
from pml_ext.trunks.wrappers import backbone_of, plain_name, unwrapped


def test_unwrapped():
    linear, loss_func = nn.Linear(2, 2), ProxyAnchorLoss(3, 2)
    assert unwrapped(linear) is linear
    assert unwrapped(nn.DataParallel(linear)) is linear
    assert unwrapped(DistributedLossWrapper(loss_func)) is loss_func
    memory = CrossBatchMemory(HybridLoss(3, 2), 2)  # no mere wrapper
    assert unwrapped(memory) is memory
    assert backbone_of(linear) is None


def test_a_network_with_a_part_of_that_name_is_no_wrapper():
    """What lies beside the part would be lost where the network is saved."""
    net = nn.Sequential()
    net.module, net.head = nn.Linear(2, 3), nn.Linear(3, 2)
    assert unwrapped(net) is net
    assert unwrapped(nn.DataParallel(net)) is net
    averaged = torch.optim.swa_utils.AveragedModel(net)
    assert unwrapped(averaged) is averaged.module


@pytest.mark.compiles  # that is imported, which takes seconds
def test_what_compiling_wraps_and_adds():
    linear = nn.Linear(2, 2)
    assert unwrapped(nn.DataParallel(torch.compile(linear))) is linear
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    plain = list(net.state_dict())
    net[0] = torch.compile(net[0])
    assert [plain_name(name) for name in net.state_dict()] == plain != list(net.state_dict())
