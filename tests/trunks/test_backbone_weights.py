import time

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from pml_ext.trunks import AttentionEnsemble, GlobalLocalTrunk, PooledTrunk
from pml_ext.trunks import backbone_weights as module
from pml_ext.trunks.backbone_weights import load_weights, timm_model

IMAGES = torch.randn(2, 3, 64, 64)


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=7).eval()


@pytest.fixture(params=["pth", "safetensors", "of a training", "behind DDP", "state dict", "without classifier"])
def weights(request, donor, tmp_path):
    """The donor's weights in all forms that people have them in."""
    state = donor.state_dict()
    if request.param == "state dict":
        return state
    if request.param == "without classifier":
        return {name: x for name, x in state.items() if not name.startswith("fc.")}
    path = tmp_path / ("w.safetensors" if request.param == "safetensors" else "w.pth")
    if request.param == "safetensors":
        safetensors.torch.save_file(state, path)
    elif request.param == "of a training":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif request.param == "behind DDP":
        torch.save({f"module.{name}": x for name, x in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def test_features_are_those_of_the_donor(weights, donor):
    trunk = PooledTrunk("test_resnet", 8, weights=weights).eval()
    torch.testing.assert_close(trunk.feature_map(IMAGES), donor.forward_features(IMAGES))
    assert not torch.equal(PooledTrunk("test_resnet", 8).eval().feature_map(IMAGES), donor.forward_features(IMAGES))


def test_every_trunk_takes_weights(donor):
    state = donor.state_dict()
    both = GlobalLocalTrunk("test_resnet", 8, weights=state).eval()
    torch.testing.assert_close(both.feature_maps(IMAGES)[1], donor.forward_features(IMAGES))
    size = (3, 64, 64)
    learners = AttentionEnsemble.from_backbone("test_resnet", None, 2, 8, input_size=size, weights=state).eval()
    features = learners.head(learners.stem(IMAGES))
    torch.testing.assert_close(features, donor.forward_head(donor.forward_features(IMAGES), pre_logits=True))
    copied = learners.attention[0].state_dict()
    assert any(torch.equal(x, state["layer3.0.conv2.weight"]) for x in copied.values())  # the attention trunk, too


def test_a_state_dict_is_left_as_it_is(donor):
    state = dict(donor.state_dict())
    before = {name: x.clone() for name, x in state.items()}
    trunk = timm_model("test_resnet", False, state, features_only=True, in_chans=1)
    assert trunk.conv1[0].weight.shape[1] == 1 and state.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in state.items())
    assert "state_dict" not in trunk.pretrained_cfg  # nor kept twice


def test_torchvisions_checkpoints(tmp_path):
    donor = torchvision.models.resnet18(num_classes=3)
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    trunk = PooledTrunk("resnet18", 8, weights=tmp_path / "w.pth")
    assert torch.equal(trunk.backbone.model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)


def test_positions_of_a_vision_transformer_are_adapted():
    donor = timm.create_model("test_vit")
    trunk = PooledTrunk("test_vit", 8, weights=donor.state_dict(), img_size=64)
    assert trunk(IMAGES).shape == (2, 8)
    names = [name for name, _ in trunk.named_parameters() if name.endswith("pos_embed")]
    assert trunk.get_parameter(names[0]).shape[1] == 17


def changed(state, kind):
    state = dict(state)
    if kind == "missing":
        del state["layer1.0.conv1.weight"]
    elif kind == "unknown":
        state["layer9.weight"] = torch.ones(1)
    else:
        state["bn1.bias"] = torch.ones(3)
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 missing \(layer1.0.conv1.weight\)$"),
        ("unknown", r"1 unknown \(layer9.weight\)$"),
        (
            "shape",
            r"1 of another shape \(bn1.bias \(3,\) for \(32,\)\)$",
        ),
    ],
)
def test_names_that_do_not_fit_are_listed(kind, message, donor):
    with pytest.raises(ValueError, match="weights must fit test_resnet, got a state dict: " + message):
        PooledTrunk("test_resnet", 8, weights=changed(donor.state_dict(), kind))


def test_averaged_networks(donor):
    averaged = torch.optim.swa_utils.AveragedModel(donor)
    trunk = PooledTrunk("test_resnet", 8, weights=averaged.state_dict())
    assert torch.equal(trunk.backbone.model.conv1[0].weight, donor.conv1[0].weight)


def test_weights_that_are_not_finite(donor):
    state = donor.state_dict() | {"bn1.bias": torch.full((32,), torch.nan)}
    with pytest.raises(ValueError, match=r"weights must be finite, got NaN or infinity in 'bn1\.bias' of a state"):
        PooledTrunk("test_resnet", 8, weights=state)


def test_unknown_tags():
    assert PooledTrunk("test_resnet.r160_in1k", 8).out_features == 8
    with pytest.raises(ValueError, match=r"backbone must be a timm model such as .* got 'test_resnet.nonsense'"):
        PooledTrunk("test_resnet.nonsense", 8)


def test_another_network(donor):
    with pytest.raises(ValueError, match=r"must fit test_byobnet, got a state dict: \d+ missing \(stem.conv.weight"):
        PooledTrunk("test_byobnet", 8, weights=donor.state_dict())


def test_a_network_of_ones_own():
    net, other = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3))
    trunk = PooledTrunk(net, 8, feature_channels=4, weights=other.state_dict())
    assert torch.equal(trunk.backbone[0].weight, other[0].weight)
    with pytest.raises(ValueError, match=r"fit a Sequential, got a state dict: 2 missing .*; 1 unknown \(1.weight\)"):
        load_weights(net, {"1.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("nowhere.pth", FileNotFoundError, r"weights must be a file, .*, got nowhere.pth \(none there\)"),
        (3, TypeError, "weights must be a file, 'installed' or a state dict, got 3"),
        ({}, ValueError, "weights must hold tensors by their names, got a state dict with nothing"),
        ({"a": 1}, ValueError, "weights must hold tensors by their names, got a state dict with 'a': int"),
    ],
)
def test_what_is_no_weights(wrong, error, message):
    with pytest.raises(error, match=message):
        PooledTrunk("test_resnet", 8, weights=wrong)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot read .*w\.pth"):
        PooledTrunk("test_resnet", 8, weights=tmp_path / "w.pth")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "code.pth")  # would run code of whoever wrote it
    with pytest.raises(ValueError, match=r"cannot read .*code\.pth"):
        PooledTrunk("test_resnet", 8, weights=tmp_path / "code.pth")
    with pytest.raises(FileNotFoundError, match=r"\(a folder\)"):
        PooledTrunk("test_resnet", 8, weights=tmp_path)


def test_either_downloaded_or_given(donor):
    with pytest.raises(ValueError, match="pretrained must be False with weights, got True"):
        PooledTrunk("test_resnet", 8, pretrained=True, weights=donor.state_dict())
    with pytest.raises(ValueError, match="weights must be None for 'googlenet'"):
        AttentionEnsemble.from_backbone("googlenet", input_size=(3, 64, 64), weights=donor.state_dict())


def test_without_network_the_ways_out_are_named_at_once(monkeypatch):
    monkeypatch.setattr(module, "_reachable", lambda address: False)
    started = time.perf_counter()
    with pytest.raises(OSError, match=r"'test_resnet' must be downloaded.*cannot be reached: set weights to a file"):
        PooledTrunk("test_resnet", 8, pretrained=True)
    assert time.perf_counter() - started < 10  # the hub's own retries take most of a minute


def test_a_host_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(module, "getproxies", dict)
    assert not module._reachable("https://127.0.0.1:1")
    monkeypatch.setattr(module, "getproxies", lambda: {"https": "http://proxy"})
    assert module._reachable("https://127.0.0.1:1")  # the proxy alone knows
