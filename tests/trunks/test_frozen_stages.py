import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pml_ext.recipes import Trainer, recipe
from pml_ext.trunks import PooledTrunk
from pml_ext.trunks.conv_net import ConvNet
from pml_ext.trunks.frozen_stages import freeze_stages, stage_names


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "regnetx_002"])
@pytest.mark.parametrize("name", ["proxy_anchor", "mhgl", "attention_ensemble"])
def test_what_lies_before_the_end_of_a_stage_stands_still(name, backbone):
    settings = {"embedding_size": 16, "image_size": 64, "pretrained": False, "freeze_batch_norm": False}
    made = recipe(name, 3, preset="finetune", backbone=backbone, frozen_stages=2, **settings)
    frozen = {n for n, p in made.trunk.named_parameters() if not p.requires_grad}
    before = {n: x.clone() for n, x in made.trunk.state_dict().items()}
    made.trunk.train()
    optimizer = torch.optim.SGD(made.trunk.parameters(), 0.1)
    loss = made.trunk(torch.randn(4, 3, 64, 64)).square().sum(0)[::2].sum()
    loss.backward()
    optimizer.step()
    moved = {n for n, x in made.trunk.state_dict().items() if not torch.equal(x, before[n])}
    assert frozen and not frozen & moved
    stage = stage_names(backbone)[1].replace(".", "_") + "_"
    assert any(stage in n.replace(".", "_") for n in frozen)
    norms = [n for n, m in made.trunk.named_modules() if isinstance(m, _BatchNorm) and f"{n}.weight" in frozen]
    assert not {f"{n}.running_mean" for n in norms} & moved  # nor do they learn statistics
    later = stage_names(backbone)[2].replace(".", "_") + "_"
    assert any(later in n.replace(".", "_") for n in moved)


def test_our_own_network():
    trunk = PooledTrunk(ConvNet(width=4), 8)
    assert freeze_stages(trunk, "convnet", 1) == ["stage1.0.weight", "stage1.1.weight", "stage1.1.bias"]


def test_trainings_leave_frozen_stages_frozen():
    """Warm-up, which lets the backbone learn after it, among them."""
    made = recipe("proxy_anchor", 3, width=4, image_size=8, frozen_stages=1, warmup_epochs=1, batch_size=8, epochs=2)
    before = {n: x.clone() for n, x in made.trunk.state_dict().items()}
    images = torch.utils.data.TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) // 8)
    Trainer(made, images, images.tensors[1]).train()
    moved = {n for n, x in made.trunk.state_dict().items() if not torch.equal(x, before[n])}
    assert moved and not any(".stage1." in n for n in moved) and any(".stage2." in n for n in moved)


@pytest.mark.parametrize(
    ("backbone", "count", "message"),
    [
        ("convnet", 3, r"frozen_stages must lie in 1 to 2 for 'convnet' \(stage1, stage2, stage3\), got 3"),
        ("resnet18", 9, "frozen_stages must lie in 1 to 4 for 'resnet18'"),
        ("module", 1, "frozen_stages must be 0 for the backbone 'module', whose stages are not known"),
        ("resnet18", 1, "frozen_stages must be 0 for a network whose stages are not known, got 1"),
    ],
)
def test_what_cannot_be_frozen(backbone, count, message):
    with pytest.raises(ValueError, match=message):
        freeze_stages(nn.Linear(2, 2), backbone, count)
