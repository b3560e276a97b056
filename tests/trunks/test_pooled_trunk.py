import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

from pml_ext.trunks import PooledTrunk, freeze_batch_norm, param_groups

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BACKBONES = {
    "resnet18": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "vit_tiny_patch16_224": {"img_size": 64, "patch_size": 8},
}


def make(**kwargs):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.BatchNorm2d(6), nn.ReLU())
    return PooledTrunk(backbone, 8, **({"feature_channels": 6} | kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    trunk = PooledTrunk(name, 12, **BACKBONES[name]).eval()
    embeddings = trunk(IMAGES)
    assert embeddings.shape == (2, trunk.out_features) == (2, 12)
    features = trunk.feature_map(IMAGES)
    assert features.shape[1] == trunk.linear.in_features == trunk.backbone.num_features
    assert features.shape[2] == features.shape[3] >= 2
    embeddings[:, 0].sum().backward()
    assert trunk.linear.weight.grad.any()


def test_the_map_is_that_of_the_model():
    """The last of timm's features, pooled and mapped by hand."""
    trunk = PooledTrunk("resnet18", 12, pool_type="max").eval()
    model = timm.create_model("resnet18", features_only=True).eval()
    model.load_state_dict(trunk.backbone.model.state_dict())
    features = model(IMAGES)[-1]
    expected = features.amax((2, 3)) @ trunk.linear.weight.T + trunk.linear.bias
    torch.testing.assert_close(trunk(IMAGES), expected)


@pytest.mark.parametrize("num_learners", [1, 2, 4])
@pytest.mark.parametrize("attention", ["printed", "solar", "normalized", None])
@pytest.mark.parametrize("pool_type", ["avg", "avg+max", "gem"])
def test_embedding_is_that_of_its_parts(num_learners, attention, pool_type):
    trunk = make(num_learners=num_learners, attention=attention, pool_type=pool_type).eval()
    raw = trunk.linear(trunk.pool(trunk.attention(trunk.backbone(IMAGES))))
    slices = raw.view(2, num_learners, -1)
    expected = raw if num_learners == 1 else (slices / slices.norm(dim=2, keepdim=True)).flatten(1)
    torch.testing.assert_close(trunk(IMAGES), expected)
    if attention is not None:
        assert trunk.attention.style == attention
        assert trunk.attention.reduction == (1 if attention == "printed" else 2)  # SOLAR's, for the last level


def test_reduction_that_does_not_divide_the_channels():
    trunk = PooledTrunk(nn.Conv2d(3, 5, 3), 8, attention="solar", feature_channels=5)
    assert trunk.attention.reduction == 1
    assert trunk(IMAGES).shape == (2, 8)


def test_gradient_reaches_every_parameter():
    trunk = make(attention="printed", pool_type="gem", num_learners=2)
    trunk(IMAGES)[:, ::3].sum().backward()
    for name, x in trunk.named_parameters():
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any(), name


def test_batch_of_one_and_eval():
    trunk = PooledTrunk("resnet18", 8)
    assert trunk(IMAGES[:1]).isfinite().all()
    trunk.eval()
    torch.testing.assert_close(trunk(IMAGES[1:]), trunk(IMAGES)[1:])


def test_copies():
    trunk = PooledTrunk("resnet18", 8, attention="normalized").eval()
    file = io.BytesIO()
    torch.save(trunk.state_dict(), file)
    file.seek(0)
    loaded = PooledTrunk("resnet18", 8, attention="normalized").eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
        assert torch.equal(other(IMAGES), trunk(IMAGES))


def test_names_of_the_parameters():
    """State dicts that were saved stay loadable."""
    names = list(PooledTrunk("resnet18", 8, attention="printed").state_dict())
    assert names[0] == "backbone.model.conv1.weight"
    assert names[-10:] == [
        f"{part}.{x}"
        for part in ("attention.query", "attention.key", "attention.value", "attention.out", "linear")
        for x in ("weight", "bias")
    ]


def test_channels_of_a_module():
    backbone = nn.Conv2d(3, 6, 3)
    backbone.num_features = 6  # as timm's models have it
    assert PooledTrunk(backbone, 8)(IMAGES).shape == (2, 8)


def test_grayscale_and_small_images():
    trunk = PooledTrunk("resnet18", 8, in_chans=1, output_stride=8)
    assert trunk.feature_map(torch.zeros(2, 1, 32, 32)).shape[2:] == (4, 4)


def test_pretrained_weights_are_loaded(tmp_path):
    """From a local file, with timm's own loading code."""
    donor = timm.create_model("resnet18")
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    kwargs = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    trunk = PooledTrunk("resnet18", 8, pretrained=True, **kwargs)
    assert torch.equal(trunk.backbone.model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    trunk = make(num_learners=2).eval()
    with torch.autocast("cpu", dtype=half):
        embeddings = trunk(IMAGES)
    torch.testing.assert_close(embeddings.float(), trunk(IMAGES), rtol=0.1, atol=0.05)
    for x in trunk.linear.parameters():
        nn.init.zeros_(x)
    with torch.autocast("cpu", dtype=half):
        embeddings = trunk(IMAGES)
        assert not embeddings.any()  # zeros, not NaN
        embeddings.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in trunk.parameters())


def test_statistics_parameter_groups_and_frozen_norms():
    trunk = make(attention="solar", collect_stats=True)
    trunk(IMAGES)
    assert 0 < trunk.attention.attention_entropy <= 1
    assert {"out_features", "num_learners"} <= set(trunk._record_these)
    rates = {id(p): group["lr"] for group in param_groups(trunk, lr=1e-3, head_lr=1e-2) for p in group["params"]}
    assert {rates[id(p)] for p in trunk.backbone.parameters()} == {1e-3}
    assert {rates[id(p)] for part in (trunk.attention, trunk.linear) for p in part.parameters()} == {1e-2}
    freeze_batch_norm(trunk.backbone)
    assert not trunk.train().backbone[1].training


def test_a_timm_model_with_its_head():
    trunk = PooledTrunk(timm.create_model("resnet10t", num_classes=7), embedding_size=8)
    with pytest.raises(
        ValueError, match=r"got \(2, 7\): PooledTrunk\('resnet10t'\), or .* num_classes=0, global_pool=''\)"
    ):
        trunk(IMAGES.expand(2, 3, *IMAGES.shape[2:]))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"embedding_size": 0}, ValueError, "embedding_size must be an integer >= 1, got 0"),
        ({"embedding_size": "8"}, ValueError, "embedding_size must be an integer >= 1, got '8'"),
        ({"backbone": PooledTrunk}, TypeError, "backbone must be a name .* got the class PooledTrunk"),
        ({"num_learners": 3}, ValueError, "embedding_size must be a multiple of num_learners = 3, got 8"),
        ({"num_learners": 0}, ValueError, "num_learners must be an integer >= 1, got 0"),
        ({"backbone": "resnet5O"}, ValueError, "backbone must be a timm model such as .*resnet50.*, got 'resnet5O'"),
        ({"backbone": None}, TypeError, r"backbone must be a name or a torch\.nn\.Module, got None"),
        ({"attention": "none"}, ValueError, "attention must be None or one of printed, solar, normalized, got 'none'"),
        ({"pool_type": "mean"}, ValueError, "pool_type must be one of avg, max"),
        ({"backbone": nn.ReLU()}, ValueError, "feature_channels must be given for a backbone without num_features"),
        (
            {"backbone": nn.ReLU(), "in_chans": 1},
            ValueError,
            "in_chans must not be given with a backbone that is a mod",
        ),
        ({"backbone": nn.ReLU(), "pretrained": True}, ValueError, "pretrained must not be given with a backbone that"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        PooledTrunk(**({"backbone": "resnet18", "embedding_size": 8} | kwargs))


def test_backbones_without_a_map():
    pooled = PooledTrunk(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8, feature_channels=3)
    with pytest.raises(ValueError, match=r"backbone must give one map \(B, C, H, W\), got \(2, 3\)"):
        pooled(IMAGES)
    several = PooledTrunk(timm.create_model("resnet18", features_only=True), 8, feature_channels=512)
    with pytest.raises(ValueError, match=r"backbone must give one map \(B, C, H, W\), got list"):
        several(IMAGES)

    class Shrinking(nn.Module):
        def forward(self, images):
            return images[:, :, 3:]

    shrinking = PooledTrunk(Shrinking(), 8, feature_channels=3)
    assert shrinking(IMAGES).isfinite().all()
    with pytest.raises(
        ValueError, match=r"large enough for the backbone, got \(2, 3, 3, 3\), which leaves features of"
    ):
        shrinking(IMAGES[:, :, :3, :3])


@pytest.mark.parametrize("num_learners", [1, 4])
def test_no_image(num_learners):
    trunk = PooledTrunk(nn.Conv2d(3, 8, 3), 16, feature_channels=8, num_learners=num_learners)
    assert trunk(torch.empty(0, 3, 9, 9)).shape == (0, 16)
