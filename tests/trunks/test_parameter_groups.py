import pytest
import timm
import torch
from pytorch_metric_learning.losses import MultipleLosses
from torch import nn

from pml_ext.losses import HybridLoss
from pml_ext.trunks import param_groups
from pml_ext.trunks.wrappers import backbone_of


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize("name", ["lr", "head_lr", "proxy_lr"])
def test_rates_are_numbers(name):
    with pytest.raises(TypeError, match=f"{name} must be a number .* got '1e-3'"):  # as YAML has it
        param_groups(Trunk(), **{name: "1e-3"})


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


def rates(groups, module):
    by_parameter = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {by_parameter[id(p)] for p in module.parameters()}


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "sequential": lambda trunk: nn.Sequential(trunk, nn.Linear(2, 2)),
    "several": lambda trunk: nn.DataParallel(nn.Sequential(nn.DataParallel(trunk), nn.ReLU())),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_looked_through(wrap):
    wrapped = wrap(Trunk())
    groups = param_groups(wrapped, lr=0.1, head_lr=0.2)
    backbone = backbone_of(wrapped)
    assert isinstance(backbone[1], nn.BatchNorm2d)
    assert rates(groups, backbone) == {0.1}
    inside = {id(p) for p in backbone.parameters()}
    others = nn.ParameterList([p for p in wrapped.parameters() if id(p) not in inside])
    assert len(others) >= 2 and rates(groups, others) == {0.2}


def test_a_backbone_that_cannot_be_told():
    """Also one inside a module that we know nothing of."""
    net = nn.Module()
    net.trunk = Trunk()
    for trunk in (net, nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=r"head_lr must be None for a trunk .* got 0\.2 for a (Module|Linear): keep .* backbone"
        ):
            param_groups(trunk, lr=0.1, head_lr=0.2)
        assert rates(param_groups(trunk, lr=0.1), trunk) == {0.1}
    with pytest.raises(ValueError, match="trunk must have one part with the attribute backbone, got 2"):
        param_groups(nn.Sequential(Trunk(), Trunk()))


def timm_resnet(**kwargs):
    return timm.create_model("resnet10t", **kwargs)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["alone", "wrapped"])
def test_the_classifier_of_a_timm_model_is_new(wrap):
    net = timm_resnet(num_classes=8)
    groups = param_groups(wrap(net), HybridLoss(3, 8), 0.1, 0.2, 0.3)
    assert rates(groups, net.fc) == {0.2}
    assert rates(groups, net.conv1) == rates(groups, net.layer4) == {0.1}
    assert sum(len(group["params"]) for group in groups) == 1 + len(list(net.parameters()))


def test_layers_behind_a_timm_model_are_new():
    net = nn.Sequential(timm_resnet(num_classes=0), nn.Linear(512, 8))
    groups = param_groups(net, lr=0.1, head_lr=0.2)
    assert (rates(groups, net[0]), rates(groups, net[1])) == ({0.1}, {0.2})
    two = nn.Sequential(net[0], timm_resnet(num_classes=0))
    assert rates(param_groups(two, lr=0.1), two) == {0.1}


def test_a_timm_model_with_two_classifiers():
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    groups = param_groups(net, lr=0.1, head_lr=0.2)
    assert (rates(groups, net.blocks), rates(groups, net.head), rates(groups, net.head_dist)) == ({0.1}, {0.2}, {0.2})


def test_head_lr_without_new_layers():
    net = Trunk()
    del net.head
    for trunk, kind in ((timm_resnet(num_classes=0), "ResNet"), (net, "Trunk")):
        with pytest.raises(ValueError, match=rf"head_lr must be None .* got 0\.2 for a {kind}: add one, as in timm"):
            param_groups(trunk, lr=0.1, head_lr=0.2)


@pytest.mark.parametrize("loss_func", [HybridLoss(3, 2), MultipleLosses([HybridLoss(3, 2)])])
def test_swapped_arguments(loss_func):
    with pytest.raises(
        TypeError, match=r"trunk must be the network, got the loss .*: param_groups\(trunk, loss_func\)"
    ):
        param_groups(loss_func, Trunk())


def test_no_modules():
    with pytest.raises(TypeError, match=r"trunk must be .* got generator: the module itself, not its parameters\(\)"):
        param_groups(Trunk().parameters())
    with pytest.raises(TypeError, match=r"trunk must be .* got list: torch\.nn\.Sequential\(\.\.\.\)"):
        param_groups([Trunk()])
    with pytest.raises(TypeError, match=r"loss_func must be .* got list: torch\.nn\.ModuleList\(\.\.\.\)"):
        param_groups(Trunk(), [HybridLoss(3, 2)])
    with pytest.raises(TypeError, match=r"loss_func must be a torch\.nn\.Module, got float$"):
        param_groups(Trunk(), 1e-3)


def test_a_loss_inside_of_the_network():
    net = Trunk()
    net.criterion = HybridLoss(3, 2)
    groups = param_groups(nn.DataParallel(net), net.criterion, 0.1, 0.2, 0.3)
    assert (rates(groups, net.backbone), rates(groups, net.head), rates(groups, net.criterion)) == ({0.1}, {0.2}, {0.3})
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


@pytest.mark.parametrize(
    "loss_func_of",
    [lambda net: None, lambda net: MultipleLosses([net.criterion, HybridLoss(3, 2)]), lambda net: net.criterion],
)
def test_a_loss_inside_of_the_network_counts_as_proxies_however_it_is_given(loss_func_of):
    net = Trunk()
    net.criterion = HybridLoss(3, 2)
    groups = param_groups(net, loss_func_of(net), 0.1, 0.2, 0.3)
    assert (rates(groups, net.backbone), rates(groups, net.head), rates(groups, net.criterion)) == ({0.1}, {0.2}, {0.3})


def test_a_network_of_a_loss_alone():
    loss_func = HybridLoss(3, 2)
    assert rates(param_groups(nn.Sequential(nn.Flatten(), loss_func), loss_func, 0.1), loss_func) == {1e-2}


def test_a_network_inside_of_the_loss():
    net = Trunk()
    net.criterion = HybridLoss(3, 2)
    groups = param_groups(net.backbone, net, 0.1, proxy_lr=0.3)
    assert (rates(groups, net.backbone), rates(groups, net.head)) == ({0.1}, {0.3})
