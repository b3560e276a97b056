import pytest
import torch
from torch import nn

from pml_ext.losses import HybridLoss
from pml_ext.trunks import param_groups


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def test_groups():
    trunk, loss_func = Trunk(), HybridLoss(3, 2)
    groups = {group.pop("name"): group for group in param_groups(trunk, loss_func, 0.1, 0.2, 0.3, 0.05)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "backbone": (0.1, 0.05),
        "backbone, no decay": (0.1, 0.0),
        "new layers": (0.2, 0.05),
        "new layers, no decay": (0.2, 0.0),
        "proxies": (0.3, 0.05),
    }
    assert groups["backbone"]["params"] == [trunk.backbone[0].weight]
    assert groups["new layers, no decay"]["params"] == [trunk.head.bias]
    assert groups["proxies"]["params"] == [loss_func.proxy_loss.proxies]
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for module in (trunk, loss_func) for p in module.parameters()}


def test_frozen_and_shared_parameters():
    trunk = Trunk()
    trunk.backbone.requires_grad_(False)
    trunk.head2 = trunk.head
    assert [(g["name"], len(g["params"])) for g in param_groups(trunk)] == [
        ("new layers", 1),
        ("new layers, no decay", 1),
    ]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimizer(optimizer):
    trunk = Trunk()
    before = trunk.head.weight.detach().clone()
    step = optimizer(param_groups(trunk, HybridLoss(3, 2)))
    trunk.head(torch.ones(1, 4)).sum().backward()
    step.step()
    assert not torch.equal(trunk.head.weight, before)


@pytest.mark.parametrize("name", ["lr", "head_lr", "proxy_lr"])
def test_bad_rates(name):
    with pytest.raises(ValueError, match=f"^{name} must be > 0, got 0"):
        param_groups(Trunk(), **{name: 0})


def test_bad_arguments():
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        param_groups(Trunk(), weight_decay=-1)
    with pytest.raises(ValueError, match="trunk must have a parameter that requires a gradient"):
        param_groups(nn.ReLU())
