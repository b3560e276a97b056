import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torchvision.models import googlenet

from pml_ext.modes import in_mode
from pml_ext.trunks.cut_backbone import cut_backbone, cut_points

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CUTS = {
    "resnet18": "layer2",
    "resnet26": "layer2.1",
    "googlenet": "maxpool3",
    "mobilenetv3_small_100": "blocks.2",
    "convnext_atto": "stages.1",
    "regnetx_002": "s2",
    "efficientnet_b0": "blocks.3",  # with stochastic depth
    "densenet121": "features.transition2",
    "vit_tiny_patch16_224": "blocks.3",
}

SMALLEST = "resnet18"


def create(name):
    if name == "googlenet":
        return googlenet(weights=None, aux_logits=False, init_weights=True)
    kwargs = {"drop_path_rate": 0.5} if name == "efficientnet_b0" else {}
    return timm.create_model(name, num_classes=7, **({"img_size": 64} if "vit" in name else {}), **kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == SMALLEST else pytest.mark.slow) for name in CUTS]
)
def test_parts_are_the_whole(name, training):
    """Values, gradients and running statistics, after train() and eval() have been called both."""
    whole = create(name).eval()
    with torch.no_grad():
        for module in whole.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    stem, head = cut_backbone(copy.deepcopy(whole), CUTS[name])
    before = {key: x.clone() for key, x in whole.state_dict().items()}
    results = []
    for modules in ([whole], [stem, head]):
        for module in modules:
            module.train(not training)
            module.train(training)
        torch.manual_seed(1)
        out = IMAGES
        for module in modules:
            out = module(out)
        out.square().sum().backward()
        results.append(out)
    assert torch.equal(*results)
    parts = stem.state_dict() | head.state_dict()
    assert set(parts) == set(before)
    for key, x in whole.state_dict().items():
        assert torch.equal(parts[key], x), key
    changed = {key for key, x in parts.items() if not torch.equal(x, before[key])}
    norms = {key for key in before if "running" in key or "num_batches" in key}
    assert changed == (norms if training else set())
    grads = dict(stem.named_parameters()) | dict(head.named_parameters())
    for key, p in whole.named_parameters():
        torch.testing.assert_close(grads[key].grad, p.grad, rtol=1e-4, atol=1e-5)
    assert set(dict(stem.named_parameters())) | set(dict(head.named_parameters())) == set(
        dict(whole.named_parameters())
    )
    assert not set(dict(stem.named_parameters())) & set(dict(head.named_parameters()))


def test_parts_hold_the_modules_of_the_network():
    whole = create("resnet18")
    stem, head = cut_backbone(whole, "layer2")
    assert stem.layer2 is whole.layer2
    assert head.layer3 is whole.layer3
    assert not hasattr(stem, "layer3")
    assert not hasattr(head, "layer2")


def test_parts_copy_and_pickle():
    stem, head = (part.eval() for part in cut_backbone(create("resnet18"), "layer2.0"))
    expected = head(stem(IMAGES))
    for make in (copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))):
        assert torch.equal(make(head)(make(stem)(IMAGES)), expected)


def test_modes_come_back():
    module = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Sequential(nn.Dropout()))
    with in_mode(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == [True, False, True, True]
    with pytest.raises(KeyError), in_mode(module):
        raise KeyError
    assert module.training
    cut_backbone(module, "1")
    assert [m.training for m in module.modules()] == [True, False, True, True]


def test_cut_points():
    points = cut_points(create("resnet18"))
    assert points[:4] == ["conv1", "bn1", "act1", "maxpool"]
    assert {"layer2", "layer2.1", "global_pool", "fc"} <= set(points)


class Residual(nn.Module):
    """Something bypasses the cut."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Identity()

    def forward(self, images):
        features = self.a(images)
        return self.b(features) + features


class Twice(Residual):
    def forward(self, images):
        return self.b(self.b(self.a(images)))


class Dropping(Residual):
    def forward(self, images):
        return nn.functional.dropout(self.b(self.a(images)), 0.5, self.training)


class Branching(Residual):
    def forward(self, images):
        return self.b(self.a(images)) if images.sum() > 0 else images


class Sized(Residual):
    """A number from before the cut."""

    def forward(self, images):
        length = len(images) if isinstance(images, list) else images.size(0)
        return self.b(self.a(images)).reshape(length, -1)


class InPlace(Residual):
    """Operations whose results nobody takes."""

    def forward(self, images):
        features = self.a(images)
        features.relu_()
        features = self.b(features)
        nn.functional.relu(features, inplace=True)
        return features.flatten(1)


class Normalizing(Residual):
    """Constants made in forward."""

    def forward(self, images):
        features = self.a(images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        return self.b(features) * torch.tensor(2.0)


class Skipping(Residual):
    """The input itself bypasses the cut."""

    def forward(self, images):
        return self.b(self.a(images)).mean(1) + images.mean(1)


@pytest.mark.parametrize(("model", "split"), [(InPlace(), "a"), (InPlace(), "b"), (Normalizing(), "a")])
def test_what_happens_around_the_cut(model, split):
    """In-place operations belong to the side they are on; constants do not stay at the user's model."""
    before = set(vars(model))
    stem, head = cut_backbone(model, split)
    assert set(vars(model)) == before
    assert torch.equal(head(stem(IMAGES)), model(IMAGES))


@pytest.mark.parametrize(
    ("model", "split", "message"),
    [
        (
            Skipping(),
            "a",
            "split must be the only input of the layers behind it, got 'a', which the value 'images' bypasses",
        ),
        (Residual(), "c", r"split must be one of a, b \(or a module in one\), got 'c'"),
        (Residual(), "", "split must be one of a, b"),
        (Residual(), "b", "split must be the only input of the layers behind it, got 'b', which 'a' bypasses"),
        (Residual(), "unused", "split must be a module that runs once, got 'unused', which runs 0 times"),
        (Twice(), "b", "split must be a module that runs once, got 'b', which runs 2 times"),
        (Sized(), "a", "got 'a', which the value 'size' bypasses"),
        (Dropping(), "a", "backbone must do the same in training and in evaluation outside its modules, got a Drop"),
        (Branching(), "a", "backbone must be traceable by torch.fx, got a Branching: symbolically traced variables"),
    ],
)
def test_what_cannot_be_cut(model, split, message):
    with pytest.raises(ValueError, match=message):
        cut_backbone(model, split)


def test_cut_of_a_residual_network_of_its_own():
    stem, head = cut_backbone(Residual(), "a")
    whole = Residual()
    whole.load_state_dict(stem.state_dict() | head.state_dict())
    assert torch.equal(head(stem(IMAGES)), whole(IMAGES))
