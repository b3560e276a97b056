import pytest
import torch
from torch import nn

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import MultiSimilarityLoss, ProxyAnchorLoss
from pml_ext.recipes.networks import matched_state, network_state


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Compiled(nn.Module):
    """Has the names that ``torch.compile`` gives, without the seconds that its import takes."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net


WRAPPERS = [
    lambda net: net,
    Compiled,
    nn.DataParallel,
    torch.optim.swa_utils.AveragedModel,
    lambda net: nn.DataParallel(Compiled(net)),
    lambda net: nn.Sequential(Compiled(net[0]), net[1]),
]


@pytest.mark.parametrize("write", WRAPPERS)
@pytest.mark.parametrize("read", WRAPPERS)
def test_wrappers_leave_no_names(write, read):
    source, target = network(), network()
    wrapped = write(source)
    assert list(network_state(wrapped)) == list(network().state_dict())
    inner = read(target)
    for state in (network_state(wrapped), wrapped.state_dict()):  # as former versions wrote it
        target[0].weight.data.zero_()
        states = matched_state(inner, state, "x.pt must fit")
        (inner if inner.state_dict().keys() == states.keys() else target).load_state_dict(states)
        assert torch.equal(target[0].weight, source[0].weight)


def test_losses_of_several_processes():
    source, target = ProxyAnchorLoss(3, 2), ProxyAnchorLoss(3, 2)
    for state in (network_state(DistributedLossWrapper(source)), DistributedLossWrapper(source).state_dict()):
        target.load_state_dict(matched_state(target, state, ""))
        assert torch.equal(target.proxies, source.proxies)


@pytest.mark.parametrize(
    ("module", "state", "got"),
    [
        (nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), r"bias has shape \(4,\), and here \(3,\)"),
        (nn.Linear(2, 3), {}, r"bias has shape none, and here \(3,\)"),
        (MultiSimilarityLoss(), {"proxies": torch.ones(2)}, r"proxies has shape \(2,\), and here none"),
    ],
)
def test_what_does_not_fit(module, state, got):
    with pytest.raises(ValueError, match=rf"^x\.pt must hold the network, got another: {got}$"):
        matched_state(module, state, "x.pt must hold the network")
