import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from pml_ext.trunks import freeze_batch_norm


def test_statistics_stay_and_weights_learn():
    net = freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train()
    norm, images = net[1], 5 + torch.randn(6, 3, 4, 4)
    assert net.training
    expected = net(images)
    torch.testing.assert_close(net.eval()(images), expected)
    net.train()(images).square().sum().backward()
    assert not norm.running_mean.any()
    assert norm.weight.grad.any()


def test_copies_stay_frozen():
    net = freeze_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.train()
        assert not other[1].training
        assert other[1].train.args[0] is other[1]  # itself, not the original


def test_norms_of_timm():
    net = freeze_batch_norm(timm.create_model("mobilenetv3_small_050")).train()
    before = {name: x.clone() for name, x in net.named_buffers()}
    net(torch.randn(2, 3, 32, 32))
    assert before
    assert all(torch.equal(x, before[name]) for name, x in net.named_buffers())


def test_no_batch_norm():
    with pytest.raises(ValueError, match="module must contain a batch norm, got a Linear without"):
        freeze_batch_norm(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got 'resnet18'"):
        freeze_batch_norm("resnet18")


def test_norms_in_the_place_of_others_are_frozen():
    net = freeze_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4))))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net).train()
    assert isinstance(net[1][0], nn.SyncBatchNorm)
    assert net.training and net[1].training and not net[1][0].training
