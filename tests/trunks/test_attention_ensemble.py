import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
from pytorch_metric_learning import losses, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel
from torch import nn
from torchvision.models import googlenet

from pml_ext.learners import split_learners
from pml_ext.losses import EnsembleLoss, HybridLoss, MultiSimilarityLoss
from pml_ext.trunks import AttentionEnsemble, freeze_batch_norm, param_groups

SIZE = (3, 32, 32)
IMAGES = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0))
M, D = 4, 6


def parts():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
    attention = nn.Sequential(nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    head = nn.Sequential(
        nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return stem, attention, head


def make(**kwargs):
    torch.manual_seed(0)
    return AttentionEnsemble(*parts(), num_learners=M, embedding_size=M * D, input_size=SIZE, **kwargs)


OPTIONS = [{"share_attention_trunk": share} for share in (True, False)]


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_folded_trunk_is_a_loop_over_learners(kwargs):
    trunk = make(**kwargs)
    trunk(IMAGES)  # running statistics that are not the initial ones
    trunk.eval()
    features, slices, masks = trunk.stem(IMAGES), [], []
    for m in range(M):
        attention = trunk.attention[m if len(trunk.attention) > 1 else 0]
        rows = slice(8 * m, 8 * (m + 1))
        mask = nn.functional.conv2d(attention(features), trunk.mask_conv.weight[rows], trunk.mask_conv.bias[rows])
        mask = mask.sigmoid()
        learner = trunk.linear(trunk.head(features * mask))
        slices.append(learner / learner.norm(dim=1, keepdim=True))
        masks.append(mask)
    torch.testing.assert_close(trunk(IMAGES), torch.cat(slices, 1))
    torch.testing.assert_close(trunk.masks(IMAGES), torch.stack(masks, 1))


@pytest.mark.parametrize("kwargs", OPTIONS, ids=str)
def test_shapes_and_unit_slices(kwargs):
    trunk = make(**kwargs)
    embeddings = trunk(IMAGES)
    assert embeddings.shape == (4, trunk.out_features) == (4, M * D)
    torch.testing.assert_close(embeddings.reshape(4, M, D).norm(dim=2), torch.ones(4, M))
    assert trunk.masks(IMAGES).shape == (4, M, 8, 8, 8)
    assert len(trunk.attention) == (1 if kwargs["share_attention_trunk"] else M)


def test_masks_differ_at_the_start():
    trunk = make().eval()
    masks, learners = trunk.masks(IMAGES), split_learners(trunk(IMAGES), M)
    assert masks.min() > 0
    assert masks.max() < 1
    for p in range(M):
        for q in range(p):
            assert not torch.allclose(masks[:, p], masks[:, q], atol=1e-3)
            assert not torch.allclose(learners[:, p], learners[:, q], atol=1e-3)


@pytest.mark.parametrize("share", [True, False])
def test_mask_convolutions_are_drawn_by_xavier_for_each_learner(share):
    trunk = make(share_attention_trunk=share)
    bound = (6 / (5 + 8)) ** 0.5  # fan_in 5, fan_out 8
    assert trunk.mask_conv.weight.shape == (M * 8, 5, 1, 1)
    assert 0.9 * bound < trunk.mask_conv.weight.abs().max() <= bound
    bound = (6 / (10 + D)) ** 0.5
    assert 0.8 * bound < trunk.linear.weight.abs().max() <= bound


@pytest.mark.parametrize("kwargs", [*OPTIONS, {"checkpoint": True}], ids=str)
def test_gradient_reaches_every_parameter(kwargs):
    trunk = make(**kwargs)
    trunk(IMAGES)[:, ::5].sum().backward()
    for name, x in trunk.named_parameters():
        assert x.grad is not None, name
        assert x.grad.isfinite().all(), name
        if "attention" not in name or ".0.bias" not in name:  # a bias before a batch norm does nothing
            assert x.grad.abs().sum() > 0, name


@pytest.mark.parametrize("training", [True, False])
def test_checkpoint_changes_nothing_but_memory(training):
    """Values, gradients, dropout, and running statistics, which must not see a batch twice."""
    plain, frugal = make().train(training), make(checkpoint=True).train(training)
    counts = []
    for trunk in (plain, frugal):
        runs = []
        handle = trunk.head[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)
        trunk(IMAGES)[:, ::3].sum().backward()
        handle.remove()
        counts.append(len(runs))
    assert counts == [1, 2]
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), frugal.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), name
    assert plain.head[1].num_batches_tracked == (1 if training else 0)
    assert frugal.head[1].running_mean is dict(frugal.head.named_buffers())["1.running_mean"]


def test_checkpoint_keeps_less():
    def kept(trunk):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x)
        with hooks:
            trunk(IMAGES)
        return sum(sizes)

    wide = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)))
    stem, attention, head = parts()
    head = nn.Sequential(wide, head)
    sizes = {}
    for frugal in (False, True):
        trunk = AttentionEnsemble(stem, attention, head, M, M * D, input_size=SIZE, checkpoint=frugal)
        sizes[frugal] = kept(trunk)
    assert sizes[True] < sizes[False] / 3


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True)], ids=str)
def test_checkpoint_of_a_head_that_starts_in_place(first):
    grads = []
    for frugal in (False, True):
        torch.manual_seed(0)
        stem, attention, head = parts()
        modules = (stem[:2], attention, nn.Sequential(first, head))
        trunk = AttentionEnsemble(*modules, M, M * D, input_size=SIZE, checkpoint=frugal)
        torch.manual_seed(1)
        trunk(IMAGES)[:, ::3].sum().backward()
        grads.append([p.grad for p in trunk.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_of_one_and_eval():
    trunk = make()
    assert trunk(IMAGES[:1]).isfinite().all()
    trunk.eval()
    torch.testing.assert_close(trunk(IMAGES[1:]), trunk(IMAGES)[1:])
    assert torch.equal(trunk(IMAGES), trunk(IMAGES))
    larger = torch.randn(2, 3, 48, 40)
    assert trunk(larger).shape == (2, M * D)
    assert trunk.masks(larger).shape == (2, M, 8, 12, 10)


@pytest.mark.parametrize("kwargs", [{"share_attention_trunk": True}, {"share_attention_trunk": False}], ids=str)
def test_copies(kwargs):
    trunk = make(**kwargs).eval()
    file = io.BytesIO()
    torch.save(trunk.state_dict(), file)
    file.seek(0)
    loaded = AttentionEnsemble(*parts(), num_learners=M, embedding_size=M * D, input_size=SIZE, **kwargs).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
        assert torch.equal(other(IMAGES), trunk(IMAGES))


def test_dry_run_leaves_no_trace():
    stem, attention, head = parts()
    head[1].eval()
    before = [copy.deepcopy(part.state_dict()) for part in (stem, attention, head)]
    AttentionEnsemble(stem, attention, head, M, M * D, input_size=SIZE)
    for part, kept in zip((stem, attention, head), before, strict=True):
        assert all(torch.equal(x, kept[key]) for key, x in part.state_dict().items())
    assert stem.training
    assert stem[1].training
    assert not head[1].training


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    trunk = make().eval()
    with torch.autocast("cpu", dtype=half):
        embeddings = trunk(IMAGES)
    assert embeddings.isfinite().all()
    torch.testing.assert_close(embeddings.float(), trunk(IMAGES), rtol=0.1, atol=0.05)
    nn.init.zeros_(trunk.linear.weight)
    with torch.autocast("cpu", dtype=half):
        embeddings = trunk(IMAGES)
        assert not embeddings.any()  # zeros, not NaN
        embeddings.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in trunk.parameters())


def test_double_precision():
    trunk = make().double().eval()
    images = IMAGES[:2].double()
    embeddings = trunk(images)
    assert embeddings.dtype == torch.float64
    torch.testing.assert_close(embeddings.reshape(2, M, D).norm(dim=2), torch.ones(2, M, dtype=torch.float64))
    features = trunk.stem(images).detach().requires_grad_()
    trunk.stem = nn.Identity()
    assert torch.autograd.gradcheck(trunk, features[:1], atol=1e-4)


def test_statistics_and_records():
    trunk = make(collect_stats=True)
    learners = split_learners(trunk(IMAGES), M)
    cosines = [(learners[:, p] * learners[:, q]).sum(1) for p in range(M) for q in range(p)]
    assert trunk.learner_similarity == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    assert {"num_learners", "out_features"} <= set(trunk._record_these)
    assert not hasattr(make(), "learner_similarity")


def test_parameter_groups_and_frozen_norms():
    trunk = make()
    groups = param_groups(trunk, lr=1e-3, head_lr=1e-2)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for part in (trunk.stem, trunk.head) for p in part.parameters()} == {1e-3}
    assert {rates[id(p)] for part in (trunk.attention, trunk.mask_conv, trunk.linear) for p in part.parameters()} == {
        1e-2
    }
    assert len(rates) == len(list(trunk.parameters()))
    freeze_batch_norm(trunk.backbone)
    assert not trunk.train().head[1].training
    assert trunk.attention[0][1].training


class TestFromBackbone:
    @pytest.mark.parametrize(("name", "split"), [("test_efficientnet", "blocks.2"), ("test_convnext", "stages.1")])
    def test_timms_networks_are_cut_at_an_eighth_of_the_resolution(self, name, split):
        trunk = AttentionEnsemble.from_backbone(name, None, 2, 8, input_size=(3, 64, 64))
        chosen = AttentionEnsemble.from_backbone(name, split, 2, 8, input_size=(3, 64, 64))
        assert trunk.stem(torch.zeros(1, 3, 64, 64)).shape[2:] == (8, 8)
        assert [n for n, _ in trunk.named_parameters()] == [n for n, _ in chosen.named_parameters()]

    def test_a_number_cuts_behind_the_first_stage_of_that_reduction(self):
        trunk = AttentionEnsemble.from_backbone("test_efficientnet", 16, 2, 8, input_size=(3, 64, 64))
        assert trunk.stem(torch.zeros(1, 3, 64, 64)).shape[2:] == (4, 4)
        dilated = AttentionEnsemble.from_backbone("test_efficientnet", 8, 2, 8, input_size=(3, 64, 64), output_stride=8)
        usual = AttentionEnsemble.from_backbone("test_efficientnet", None, 2, 8, input_size=(3, 64, 64))
        assert [n for n, _ in dilated.stem.named_parameters()] == [n for n, _ in usual.stem.named_parameters()]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "split", "stage"),
        [
            ("resnet18", None, ["layer3"]),
            ("resnet26", "layer2", ["layer3"]),
            ("resnet26d", None, ["layer3"]),  # pools in its shortcuts
            ("mobilenetv3_small_100", "blocks.2", ["blocks_3"]),
            ("regnetx_002", "s2", ["s3"]),
            ("convnext_atto", "stages.1", None),
            ("densenet121", "features.transition1", ["features_denseblock2"]),
            ("resnet18", "layer4", None),
        ],
    )
    def test_backbones(self, name, split, stage):
        trunk = AttentionEnsemble.from_backbone(name, split, M, M * D, input_size=(3, 64, 64)).eval()
        images = torch.randn(2, 3, 64, 64)
        assert trunk(images).shape == (2, M * D)
        features = trunk.stem(images)
        assert trunk.masks(images).shape == (2, M, *features.shape[1:])
        children = [child for child, _ in trunk.attention[0].named_children()]
        if stage is None:  # two 3 x 3 convolutions
            assert [type(m).__name__ for m in trunk.attention[0]] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
            assert trunk.attention[0][0].kernel_size == (3, 3)
        else:
            assert children == stage

    def test_all_of_it_is_in_training_mode(self):
        backbone = timm.create_model("resnet18", num_classes=0).eval()
        for given in ("resnet18", backbone):
            trunk = AttentionEnsemble.from_backbone(given, None, 2, 8, input_size=SIZE)
            assert all(m.training for m in trunk.modules())
            norms = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
            assert {int(norm.num_batches_tracked) for norm in norms} == {0}  # the dry runs left nothing
            trunk(IMAGES)
            assert {int(norm.num_batches_tracked) for norm in norms} == {1}

    def test_next_stage_with_a_grid_of_its_own(self):
        trunk = AttentionEnsemble.from_backbone("botnet26t_256", "stages.1", 2, 8, input_size=(3, 256, 256))
        assert [type(m).__name__ for m in trunk.attention[0]] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2

    @pytest.mark.slow
    def test_paper(self):
        """GoogLeNet, eight learners, 512 dimensions: the shapes and sizes of the paper."""
        trunk = AttentionEnsemble.from_backbone("googlenet")
        images = torch.zeros(1, 3, 224, 224)
        assert trunk.masks(images).shape == (1, 8, 480, 14, 14)
        assert [name for name, _ in trunk.attention[0].named_children()] == [f"inception4{x}" for x in "abcde"]
        assert trunk.attention[0](trunk.stem(images)).shape == (1, 832, 14, 14)
        pools = [m for m in trunk.attention[0].modules() if isinstance(m, nn.MaxPool2d)]
        assert len(pools) == 5
        assert {pool.stride for pool in pools} == {1}
        assert trunk.linear.weight.shape == (64, 1024)
        assert trunk.eval()(images).shape == (1, 512)
        millions = sum(p.numel() for p in trunk.parameters()) / 1e6
        assert 11 < millions < 12.5  # the paper's would be 12.0; torchvision has 3 x 3 where the paper has 5 x 5

    def test_separate_attention_trunks(self):
        trunk = AttentionEnsemble.from_backbone("resnet18", None, 2, 8, share_attention_trunk=False, input_size=SIZE)
        assert len(trunk.attention) == 2
        assert trunk.attention[0].layer3 is not trunk.attention[1].layer3
        assert trunk(IMAGES).shape == (4, 8)

    def test_attention_starts_with_the_backbones_weights(self):
        trunk = AttentionEnsemble.from_backbone("resnet18", None, 2, 8, input_size=SIZE)
        theirs, ours = trunk.head.layer3[0].conv1, trunk.attention[0].layer3[0].conv1
        assert theirs.weight is not ours.weight
        assert torch.equal(theirs.weight, ours.weight)
        assert (theirs.stride, ours.stride) == ((2, 2), (1, 1))
        assert trunk.attention[0].layer3[0].downsample[0].stride == (1, 1)

    def test_stem_is_not_changed_in_place(self):
        class Eager(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Conv2d(3, 6, 3, 4, 1)
                self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1))
                self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

            def forward(self, images):
                return self.last(self.second(self.first(images)))

        trunk = AttentionEnsemble.from_backbone(Eager(), "first", 2, 8, input_size=SIZE).eval()
        assert [name for name, _ in trunk.attention[0].named_children()] == ["second"]
        features = trunk.stem(IMAGES)
        before = features.clone()
        trunk._masks(features)
        assert torch.equal(features, before)
        assert before.min() < 0

    def test_grayscale_small_images(self):
        trunk = AttentionEnsemble.from_backbone("resnet10t", None, 2, 8, input_size=(1, 32, 32), output_stride=8)
        images = torch.randn(2, 1, 32, 32)
        assert trunk.stem(images).shape[2:] == (4, 4)
        assert trunk(images).shape == (2, 8)

    def test_pretrained_weights_are_loaded(self, tmp_path, monkeypatch):
        """From local files, with timm's and torchvision's own loading code."""
        donor = timm.create_model("resnet18")
        torch.save(donor.state_dict(), tmp_path / "weights.pth")
        overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
        trunk = AttentionEnsemble.from_backbone("resnet18", None, 2, 8, pretrained=True, input_size=SIZE, **overlay)
        assert torch.equal(trunk.head.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
        assert torch.equal(trunk.attention[0].layer3[1].conv2.weight, donor.layer3[1].conv2.weight)

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            donor = googlenet(weights=None, aux_logits=True, init_weights=False)
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(donor.state_dict(), folder / "googlenet-1378be20.pth")
        trunk = AttentionEnsemble.from_backbone("googlenet", None, 2, 8, pretrained=True, input_size=(3, 64, 64))
        assert torch.equal(trunk.stem.conv1.conv.weight, donor.conv1.conv.weight)
        assert torch.equal(trunk.attention[0].inception4e.branch1.conv.weight, donor.inception4e.branch1.conv.weight)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"backbone": "resnet5O"}, "backbone must be a timm model such as .*resnet50.*, got 'resnet5O'"),
            ({"backbone": "googlnet"}, "backbone must be a timm model such as googlenet.* got 'googlnet'"),
            ({"split": "layer7"}, r"split must be one of conv1, .* layer2, layer2\.0, .* got 'layer7'"),
            ({"split": 5}, r"split must be .*reductions \(2, 4, 8, 16, 32\), got 5"),
            ({"split": "layer2.0.conv1"}, r"got 'layer2\.0\.conv1', which .* bypasses"),
            ({"split": "global_pool"}, r"stem must give one map \(B, C, H, W\), got \(1, 512\)"),
            (
                {"backbone": "vit_tiny_patch16_224", "input_size": (3, 224, 224)},
                r"split must be given for this backbone, one of patch_embed, .*blocks\.2",
            ),
            (
                {"backbone": "vit_tiny_patch16_224", "split": "blocks.3", "input_size": (3, 224, 224)},
                r"stem must give one map \(B, C, H, W\), got \(1, 197, 192\)",
            ),
            (
                {"backbone": "swin_tiny_patch4_window7_224", "split": "layers.1"},
                r"backbone must return maps \(B, C, H, W\), got a SwinTransformer",
            ),
            (
                {"backbone": "googlenet", "input_size": (1, 64, 64)},
                "input_size must have 3 channels for googlenet, got 1",
            ),
            ({"input_size": 64}, r"input_size must be \(channels, height, width\), each >= 1, got 64"),
            ({"input_size": (64, 64)}, r"input_size must be \(channels, height, width\), each >= 1, got \(64, 64\)"),
            ({"num_classes": 10}, "num_classes must not be given"),
            ({"backbone": "ghostnet_100", "split": "blocks.3"}, "a GhostNet that does not .*drop_rate=0"),
            ({"num_learners": 2.0}, r"num_learners must be an integer >= 1, got 2\.0"),
            ({"backbone": nn.Flatten(), "pretrained": True}, "pretrained must not be given with a backbone that is a"),
            ({"backbone": nn.Flatten(), "drop_rate": 0.1}, "drop_rate must not be given with a backbone that is a"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            AttentionEnsemble.from_backbone(**({"backbone": "resnet18", "input_size": SIZE} | kwargs))


def test_backbone_must_be_a_name_or_a_module():
    with pytest.raises(TypeError, match=r"backbone must be a name or a torch\.nn\.Module, got None"):
        AttentionEnsemble.from_backbone(None)


def test_names_in_place_of_the_three_parts():
    with pytest.raises(
        TypeError, match=r"stem must be a torch.nn.Module, got 'resnet18': AttentionEnsemble.from_backbone"
    ):
        AttentionEnsemble("resnet18", *parts()[1:])
    with pytest.raises(TypeError, match=r"head must be a torch.nn.Module, got the class Flatten"):
        AttentionEnsemble(*parts()[:2], nn.Flatten)


def test_a_classifier_is_no_head():
    """Its logits would pass for features."""
    network = timm.create_model("resnet10t", num_classes=5)
    with pytest.raises(
        ValueError, match=r"with a classifier: backbone\.reset_classifier\(0\), .*'resnet10t', num_classes=0"
    ):
        AttentionEnsemble.from_backbone(network, input_size=(3, 32, 32))
    network.reset_classifier(0)
    AttentionEnsemble.from_backbone(network, input_size=(3, 32, 32))


def test_channels_of_the_network_and_of_its_images():
    with pytest.raises(ValueError, match=r"in_chans must be the channels of input_size, \(3, 224, 224\), got 1"):
        AttentionEnsemble.from_backbone("resnet10t", in_chans=1)


def replaced(position, module):
    modules = list(parts())
    modules[position] = module
    return modules


@pytest.mark.parametrize(
    ("modules", "kwargs", "message"),
    [
        (parts(), {"num_learners": 0}, "num_learners must be an integer >= 1, got 0"),
        (parts(), {"embedding_size": 10}, "embedding_size must be a multiple of num_learners = 4, got 10"),
        (replaced(0, nn.Flatten()), {}, r"stem must give one map \(B, C, H, W\), got \(1, 3072\)"),
        (
            replaced(1, nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 5, 1))),
            {},
            "attention must not change the stem",
        ),
        (replaced(1, nn.Conv2d(8, 5, 3)), {}, r"attention must keep the grid .* to \(1, A, 8, 8\), got \(1, 5, 6, 6\)"),
        (replaced(2, nn.Conv2d(8, 5, 3)), {}, r"head must end after pooling, with \(B, F\), got \(1, 5, 6, 6\)"),
    ],
)
def test_bad_arguments(modules, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AttentionEnsemble(*modules, **({"num_learners": M, "embedding_size": M * D, "input_size": SIZE} | kwargs))


def test_grid_is_checked_for_other_image_sizes():
    """A mask of one position would be spread over the map without a word."""
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Conv2d(8, 5, 1))
    trunk = AttentionEnsemble(*replaced(1, pooling), num_learners=M, embedding_size=M * D, input_size=SIZE)
    assert trunk(IMAGES).shape == (4, M * D)
    with pytest.raises(ValueError, match=r"attention must keep the grid of the stem, \(12, 12\), got \(8, 8\)"):
        trunk(torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize("inner", ["pair", "hybrid"])
def test_pml_trainer_tester_and_inference(inner):
    """MetricLossOnly, GlobalEmbeddingSpaceTester and InferenceModel take it as their trunk."""
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(8)
    images = torch.randn(4, 3, 32, 32)[labels] + 0.3 * torch.randn(32, 3, 32, 32)
    dataset = torch.utils.data.TensorDataset(images, labels)
    trunk = make(collect_stats=True)
    loss_func = EnsembleLoss(MultiSimilarityLoss() if inner == "pair" else HybridLoss(4, D, proxy_weight=1.0), M)
    optimizers = {"trunk_optimizer": torch.optim.AdamW(param_groups(trunk, lr=1e-2))}
    if inner == "hybrid":
        optimizers["metric_loss_optimizer"] = torch.optim.AdamW(loss_func.parameters(), lr=1e-1)
    before = loss_func(trunk(images), labels).item()
    trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers=optimizers,
        batch_size=16,
        loss_funcs={"metric_loss": loss_func},
        dataset=dataset,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    ).train(num_epochs=8)
    assert loss_func(trunk(images), labels).item() < before
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0, accuracy_calculator=calculator, data_device=torch.device("cpu")
    )
    assert tester.test({"train": dataset}, 0, trunk)["train"]["precision_at_1_level0"] > 0.9
    model = InferenceModel(trunk, data_device=torch.device("cpu"))
    model.train_knn(dataset)
    _, neighbors = model.get_nearest_neighbors(images[:4], k=1)
    assert neighbors[:, 0].tolist() == [0, 1, 2, 3]


def test_any_pml_loss_takes_the_whole_vector():
    trunk = make()
    losses.ContrastiveLoss()(trunk(IMAGES), torch.tensor([0, 0, 1, 1])).backward()
    assert trunk.mask_conv.weight.grad.any()


@pytest.mark.compiles
class TestExport:
    @pytest.fixture
    def trunk(self):
        return make().eval()

    def test_torch_export(self, trunk):
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(trunk, (IMAGES,), dynamic_shapes={"images": {0: batch}})
        more = torch.randn(7, *SIZE)
        torch.testing.assert_close(exported.module()(more), trunk(more), rtol=1e-4, atol=1e-5)

    def test_compile(self, trunk):
        torch.compiler.reset()
        compiled = torch.compile(trunk, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IMAGES), trunk(IMAGES), rtol=1e-4, atol=1e-5)
