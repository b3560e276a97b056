import copy
import io
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from pytorch_metric_learning import losses, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel
from torch import nn

from pml_ext.losses import HybridLoss
from pml_ext.trunks import GlobalLocalTrunk, param_groups
from tests.needs import needs

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BACKBONES = {
    "resnet18": {},
    "resnet50": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "regnety_002": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "vit_tiny_patch16_224": {"img_size": 64, "patch_size": 8},
}


class Tiny(nn.Module):
    """A backbone of one's own: two maps."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.ReLU())

    def forward(self, images):
        local = self.first(images)
        return local, self.second(local)


def make_tiny(**kwargs):
    torch.manual_seed(0)
    return GlobalLocalTrunk(Tiny(), 8, feature_channels=(6, 10), **kwargs)


def make_small(**kwargs):
    torch.manual_seed(0)
    return GlobalLocalTrunk("resnet18", 16, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name):
    trunk = GlobalLocalTrunk(name, embedding_size=12, attention="solar", **BACKBONES[name]).eval()
    embeddings = trunk(IMAGES)
    assert embeddings.shape == (2, trunk.out_features) == (2, 12)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    local, glob = trunk.feature_maps(IMAGES)
    assert local.shape[1] == trunk.local_head[0].in_features
    assert glob.shape[1] == trunk.global_head[0].in_features
    assert local.shape[2] >= glob.shape[2] >= 2
    embeddings[:, 0].sum().backward()
    assert all(head[2].weight.grad.any() for head in (trunk.local_head, trunk.global_head))


def test_models_that_compute_while_they_are_made(monkeypatch):
    """Their levels cannot be counted without memory: timm's regnets under torch 2.5."""
    create = timm.create_model

    def create_with_memory(*args, **kwargs):
        if torch.empty(0).is_meta:
            raise NotImplementedError("no meta kernel")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_with_memory)
    assert make_small()(IMAGES).shape == (2, 16)


def test_levels_of_resnet50_are_conv4_and_conv5():
    local, glob = GlobalLocalTrunk("resnet50", 8).feature_maps(torch.zeros(1, 3, 224, 224))
    assert local.shape == (1, 1024, 14, 14)
    assert glob.shape == (1, 2048, 7, 7)


@pytest.mark.parametrize("attention", ["printed", "solar", "normalized", None])
@pytest.mark.parametrize("pool_type", ["avg", "avg+max", "gem"])
def test_embedding_is_that_of_its_parts(attention, pool_type):
    """The two halves are those of the heads, normalized together."""
    trunk = make_tiny(attention=attention, pool_type=pool_type).eval()
    local = trunk.backbone.first(IMAGES)
    halves = [trunk.local_head(local), trunk.global_head(trunk.backbone.second(local))]
    assert [h.shape for h in halves] == [(2, 4), (2, 4)]
    expected = torch.cat(halves, 1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trunk(IMAGES), expected)
    branches = trunk(IMAGES, return_branches=True)
    assert torch.equal(torch.cat(branches, 1), trunk(IMAGES))


@pytest.mark.parametrize("attention", ["printed", "solar", "normalized"])
def test_gradient_reaches_every_parameter(attention):
    trunk = make_tiny(attention=attention, pool_type="gem")
    for head in (trunk.local_head, trunk.global_head):
        for x in (*head[0].out.parameters(), *head[0].norm.parameters()):
            nn.init.normal_(x)  # some are zero in a fresh block: nothing would pass
    trunk(IMAGES)[:, ::3].sum().backward()
    for name, x in trunk.named_parameters():
        assert x.grad is not None, name
        assert x.grad.isfinite().all(), name
        assert x.grad.any(), name


def test_batch_of_one_and_eval():
    trunk = make_small()
    assert trunk(IMAGES[:1]).isfinite().all()
    trunk.eval()
    torch.testing.assert_close(trunk(IMAGES[1:]), trunk(IMAGES)[1:])
    assert torch.equal(trunk(IMAGES), trunk(IMAGES))


def test_copies():
    trunk = make_small().eval()
    file = io.BytesIO()
    torch.save(trunk.state_dict(), file)
    file.seek(0)
    loaded = GlobalLocalTrunk("resnet18", 16).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
        assert torch.equal(other(IMAGES), trunk(IMAGES))


def test_grayscale_and_small_images():
    trunk = make_small(in_chans=1, output_stride=8)
    images = torch.randn(2, 1, 32, 32)
    assert [tuple(m.shape[2:]) for m in trunk.feature_maps(images)] == [(4, 4), (4, 4)]
    early = make_small(in_chans=1, local_level=-3, global_level=-2)
    assert [tuple(m.shape[2:]) for m in early.feature_maps(images)] == [(4, 4), (2, 2)]
    assert trunk(images).shape == early(images).shape == (2, 16)


def test_vision_transformer_on_small_images():
    trunk = GlobalLocalTrunk("vit_tiny_patch16_224", 8, attention="solar", img_size=32, patch_size=4).eval()
    assert [tuple(m.shape[2:]) for m in trunk.feature_maps(torch.zeros(1, 3, 32, 32))] == [(8, 8), (8, 8)]


def test_empty_level():
    class Shrinking(Tiny):
        def forward(self, images):
            local, glob = super().forward(images)
            return local, glob[:, :, 3:]

    trunk = GlobalLocalTrunk(Shrinking(), 8, feature_channels=(6, 10))
    assert trunk(IMAGES).isfinite().all()
    with pytest.raises(ValueError, match=r"large enough for the global level, got \(2, 3, 16, 16\), which leaves"):
        trunk(IMAGES[:, :, :16, :16])


def test_pretrained_weights_are_loaded(tmp_path):
    """From a local file, with timm's own loading code."""
    donor = timm.create_model("resnet18")
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    kwargs = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    trunk = GlobalLocalTrunk("resnet18", 8, pretrained=True, **kwargs)
    assert torch.equal(trunk.backbone.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    assert not torch.equal(GlobalLocalTrunk("resnet18", 8).backbone.conv1.weight, donor.conv1.weight)


def test_attention_maps():
    trunk = make_small()
    for attended, features in zip(trunk.attention_maps(IMAGES), trunk.feature_maps(IMAGES), strict=True):
        assert attended.shape == (2, *features.shape[2:])
        torch.testing.assert_close(attended.sum((1, 2)), torch.ones(2))
    with pytest.raises(ValueError, match="attention must not be None for attention_maps"):
        make_small(attention=None).attention_maps(IMAGES)


def test_statistics_and_records():
    trunk = make_tiny(collect_stats=True)
    trunk(IMAGES)
    for head in (trunk.local_head, trunk.global_head):
        assert 0 < head[0].attention_entropy <= 1
    assert {"out_features", "local_level", "global_level"} <= set(trunk._record_these)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    trunk = make_tiny().eval()
    with torch.autocast("cpu", dtype=half):
        embeddings = trunk(IMAGES)
    assert embeddings.isfinite().all()
    torch.testing.assert_close(embeddings.float(), trunk(IMAGES), rtol=0.1, atol=0.05)
    for head in (trunk.local_head, trunk.global_head):
        nn.init.zeros_(head[2].weight)
        nn.init.zeros_(head[2].bias)
    with torch.autocast("cpu", dtype=half):
        embeddings = trunk(IMAGES)
        assert not embeddings.any()  # zeros, not NaN
        embeddings.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in trunk.parameters())


def test_double_precision():
    trunk = make_tiny(pool_type="gem").double().eval()
    lengths = trunk(IMAGES.double()).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_channels_last():
    trunk = make_small().eval()
    expected = trunk(IMAGES)
    trunk = trunk.to(memory_format=torch.channels_last)
    torch.testing.assert_close(trunk(IMAGES.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.compiles
class TestExport:
    """In eval mode the exported trunk gives the same embeddings, for other batch sizes too."""

    @pytest.fixture
    def trunk(self):
        """One head with the attention as printed, one with the normalized one."""
        torch.manual_seed(0)
        trunk, other = (
            GlobalLocalTrunk("test_resnet", 16, attention=attention, pool_type="gem").eval()
            for attention in ("printed", "normalized")
        )
        trunk.global_head = other.global_head
        for head in (trunk.local_head, trunk.global_head):
            for x in head[0].norm.parameters():
                nn.init.normal_(x)
        assert [head[0].style for head in (trunk.local_head, trunk.global_head)] == ["printed", "normalized"]
        return trunk

    def test_torch_export(self, trunk):
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(trunk, (IMAGES,), dynamic_shapes={"images": {0: batch}})
        more = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(exported.module()(more), trunk(more), rtol=1e-4, atol=1e-5)

    def test_trace(self, trunk):
        traced = torch.jit.trace(trunk, IMAGES)
        more = torch.randn(5, 3, 64, 64)
        torch.testing.assert_close(traced(more), trunk(more), rtol=1e-4, atol=1e-5)

    @pytest.mark.skipif(torch.__version__.startswith("2.5."), reason="its exporter fails with a recent protobuf")
    def test_onnx(self, trunk, tmp_path):
        needs("onnxscript")  # which torch.onnx needs, with onnx
        onnxruntime = needs("onnxruntime")
        path = tmp_path / "trunk.onnx"
        torch.onnx.export(trunk, (IMAGES,), str(path), input_names=["images"], dynamo=True)
        session = onnxruntime.InferenceSession(str(path))
        (embeddings,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
        np.testing.assert_allclose(embeddings, trunk(IMAGES).detach().numpy(), rtol=1e-3, atol=1e-5)

    def test_compile(self, trunk):
        torch.compiler.reset()
        compiled = torch.compile(trunk, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IMAGES), trunk(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embedder", ["none", "identity", "linear"])
def test_pml_trainer_tester_and_inference(embedder):
    """MetricLossOnly, GlobalEmbeddingSpaceTester and InferenceModel take it as their trunk."""
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(8)
    images = torch.randn(4, 3, 32, 32)[labels] + 0.3 * torch.randn(32, 3, 32, 32)
    dataset = torch.utils.data.TensorDataset(images, labels)
    trunk = make_tiny()
    models, size = {"trunk": trunk}, 8
    if embedder != "none":
        models["embedder"] = nn.Identity() if embedder == "identity" else nn.Linear(8, 5)
        size = 5 if embedder == "linear" else 8
    loss_func = HybridLoss(4, size, proxy_weight=1.0)
    optimizers = {
        f"{name}_optimizer": torch.optim.AdamW(param_groups(model, lr=1e-2))
        for name, model in models.items()
        if list(model.parameters())
    }
    optimizers["metric_loss_optimizer"] = torch.optim.AdamW(loss_func.parameters(), lr=1e-1)
    before = loss_func(_embed(models, images), labels).item()
    trainers.MetricLossOnly(
        models=models,
        optimizers=optimizers,
        batch_size=16,
        loss_funcs={"metric_loss": loss_func},
        dataset=dataset,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(num_epochs=8)
    assert loss_func(_embed(models, images), labels).item() < before
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0, accuracy_calculator=calculator, data_device=torch.device("cpu")
    )
    accuracies = tester.test({"train": dataset}, 0, models["trunk"], models.get("embedder"))
    assert accuracies["train"]["precision_at_1_level0"] > 0.9
    model = InferenceModel(models["trunk"], models.get("embedder"), data_device=torch.device("cpu"))
    model.train_knn(dataset)
    _, neighbors = model.get_nearest_neighbors(images[:4], k=1)
    assert neighbors[:, 0].tolist() == [0, 1, 2, 3]


def _embed(models, images):
    embeddings = models["trunk"](images)
    return models["embedder"](embeddings) if "embedder" in models else embeddings


def test_fits_a_pml_loss():
    trunk = make_small()
    losses.ContrastiveLoss()(trunk(IMAGES), torch.tensor([0, 0])).backward()
    assert trunk.global_head[2].weight.grad.any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embedding_size": 7}, "embedding_size must be even and >= 2, got 7"),
        ({"backbone": "resnet5O"}, "backbone must be a timm model such as .*resnet50.*, got 'resnet5O'"),
        ({"local_level": -6}, "local_level must lie in -5 to -1 for resnet18, got -6"),
        ({"global_level": 0}, "global_level must lie in -5 to -1 for resnet18, got 0"),
        ({"local_level": -1, "global_level": -2}, "local_level must come before global_level, got -1 and -2"),
        ({"attention": "none"}, "attention must be None or one of printed, solar, normalized, got 'none'"),
        ({"pool_type": "mean"}, "pool_type must be one of avg, max"),
        ({"backbone": Tiny()}, "feature_channels must be given for a backbone without feature_info"),
        ({"backbone": Tiny(), "in_chans": 1}, "in_chans must not be given with a backbone that is a module"),
        ({"backbone": Tiny(), "pretrained": True}, "pretrained must not be given with a backbone that is a module"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GlobalLocalTrunk(**({"backbone": "resnet18", "embedding_size": 8} | kwargs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: timm.create_model("resnet10t"),
            r"got a ResNet, which returns none: GlobalLocalTrunk\('resnet10t'\), or",
        ),
        (lambda: timm.create_model("resnet10t", features_only=True), r"got a FeatureListNet with 5: .*\(-2, -1\)\)"),
    ],
)
def test_a_timm_model_without_two_maps(make, message):
    with pytest.raises(ValueError, match=f"backbone must return two feature maps, local and global, {message}"):
        GlobalLocalTrunk(make())
    cured = timm.create_model("resnet10t", features_only=True, out_indices=(-2, -1))
    assert GlobalLocalTrunk(cured, embedding_size=8)(torch.randn(2, 3, 64, 64)).shape == (2, 8)


def test_a_backbone_that_gives_no_maps():
    """A batch of two rows could be taken for two maps."""
    trunk = GlobalLocalTrunk(nn.Flatten(), embedding_size=8, feature_channels=(2, 2))
    with pytest.raises(ValueError, match=r"backbone must give two maps \(B, C, H, W\), got a Tensor of \(2, 12\)"):
        trunk(torch.randn(2, 3, 2, 2))
    trunk.backbone.forward = lambda images: [images, images, images]
    with pytest.raises(ValueError, match=r"backbone must give two maps \(B, C, H, W\), got a list of length 3"):
        trunk(torch.randn(2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"feature_channels must be the channels of two maps, .*got 64"):
        GlobalLocalTrunk(nn.Flatten(), feature_channels=64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backbone": 64}, "backbone must be a name or a torch.nn.Module, got 64"),
        ({"embeding_size": 8}, "embeding_size is an argument neither of the trunk nor of timm's resnet18"),
        ({"features_only": True}, "features_only must not be given: the trunk gives it to timm's resnet18"),
        ({"weights": nn.ReLU()}, "weights must be a file, 'installed' or a state dict, got a ReLU"),
    ],
)
def test_arguments_of_the_wrong_kind(kwargs, message):
    with pytest.raises(TypeError, match=message):
        GlobalLocalTrunk(**({"backbone": "resnet18", "embedding_size": 8} | kwargs))


def test_paper_learning_rates():
    groups = param_groups(make_small(), losses.ProxyAnchorLoss(3, 16))
    rates = {group["name"].split(",")[0]: group["lr"] for group in groups}
    assert rates == {"backbone": 1e-4, "new layers": 1e-4, "proxies": 1e-2}
    assert math.isclose(sum(group["weight_decay"] for group in groups), 3e-4)
