import torch
from torch import nn

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import CrossBatchMemory, HybridLoss, ProxyAnchorLoss
from pml_ext.trunks.wrappers import backbone_of, plain_name, unwrapped


def test_unwrapped():
    linear, loss_func = nn.Linear(2, 2), ProxyAnchorLoss(3, 2)
    assert unwrapped(linear) is linear
    assert unwrapped(nn.DataParallel(torch.compile(linear))) is linear
    assert unwrapped(DistributedLossWrapper(loss_func)) is loss_func
    memory = CrossBatchMemory(HybridLoss(3, 2), 2)  # no mere wrapper
    assert unwrapped(memory) is memory
    assert backbone_of(linear) is None


def test_names_without_what_compiling_adds():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    plain = list(net.state_dict())
    net[0] = torch.compile(net[0])
    assert [plain_name(name) for name in net.state_dict()] == plain != list(net.state_dict())
