import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, samplers
from torch import nn

from pml_ext.learners import split_learners
from pml_ext.losses import DivergenceLoss, EnsembleLoss, HybridLoss, IntraBatchLoss
from pml_ext.recipes import RECIPES, recipe
from pml_ext.recipes.settings import PAPER_PRESETS, settle
from pml_ext.samplers import ShuffledPassSampler
from pml_ext.trunks import AttentionEnsemble, GlobalLocalTrunk, GlobalPool2d, PooledTrunk

CLASSES = 6
TINY = {"in_channels": 1, "image_size": 28, "width": 4, "batch_size": 12, "samples_per_class": 2, "embedding_size": 16}
DESCRIPTIONS = torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(1))
IMAGES, LABELS = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(2)), torch.arange(12) % CLASSES


def tiny(name, **settings):
    return recipe(name, CLASSES, class_embeddings=DESCRIPTIONS, **(TINY | settings))


def loss_of(made):
    embeddings = made.trunk(IMAGES)
    mined = None if made.miner is None else made.miner(embeddings, LABELS)
    return made.loss(embeddings, LABELS, mined)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_all_its_parameters(name):
    made = tiny(name)
    assert made.trunk(IMAGES).shape == (12, 16)
    loss = loss_of(made)
    loss.backward()
    assert loss > 0
    parameters = [*made.trunk.parameters(), *made.loss.parameters()]
    wanted = {id(p) for p in parameters if p.requires_grad}
    grouped = [id(p) for group in made.optimizer().param_groups for p in group["params"]]
    assert set(grouped) == wanted and len(grouped) == len(wanted)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_says_where_it_comes_from(name):
    made = tiny(name)
    assert set(made.notes) == set(made.settings)
    assert all(source.strip() for source in (note.split(": ", 1)[1] for note in made.notes.values()))
    assert made.notes["width"] == "4: given"
    assert "given" not in made.notes["lr"]


NUMBERS = {  # of the papers
    ("mhgl", "paper:cub"): {"lr": 1e-4, "proxy_lr": 1e-2, "proxy_weight": 0.03, "base": 1.0, "epochs": 20},
    ("mhgl", "paper:sop"): {"attention": "printed", "pool_type": "avg+max", "levels": "both"},
    ("intra_batch", "paper:cub"): {"num_layers": 1, "heads": 2, "batch_size": 54, "samples_per_class": 9},
    ("intra_batch", "paper:cars"): {"num_layers": 2, "heads": 8, "output": "cat", "batch_size": 70},
    ("intra_batch", "paper:sop"): {"temperature": 0.6046909, "batch_size": 90, "refined_weight": 1.0},
    ("intra_batch", "paper:inshop"): {"heads": 4, "lr": 1.1265975e-4, "proxy_lr": 1.1265975e-4, "epochs": 70},
    ("attention_ensemble", "paper:cub"): {"num_learners": 8, "divergence_weight": 1.0, "batch_size": 64},
}
METHODS = ("mhgl", "intra_batch", "attention_ensemble", "adaptive_margin", "proxy_anchor")


@pytest.mark.slow
@pytest.mark.parametrize("preset", PAPER_PRESETS)
@pytest.mark.parametrize("name", METHODS)
def test_paper_presets_build(name, preset):
    made = recipe(name, CLASSES, preset=preset, class_embeddings=DESCRIPTIONS, pretrained=False)
    assert made.trunk.out_features == 512
    assert made.settings.backbone == ("googlenet" if name == "attention_ensemble" else "resnet50")
    frozen = [m for m in made.trunk.train().modules() if isinstance(m, nn.BatchNorm2d) and not m.training]
    assert bool(frozen) == (preset in ("paper:cub", "paper:cars") and name not in ("intra_batch", "attention_ensemble"))
    expected = NUMBERS.get((name, preset), {})
    assert {key: made.settings[key] for key in expected} == expected


@pytest.mark.slow
def test_the_papers_presets_of_recommended_have_one_head():
    made = recipe("recommended", CLASSES, preset="paper:cub", pretrained=False)
    assert isinstance(made.trunk, PooledTrunk) and isinstance(made.loss, HybridLoss)
    assert (made.trunk.out_features, made.settings.pool_type, made.settings.masks) == (512, "avg+max", False)


def test_each_number_is_of_a_preset_that_is_built():
    assert set(NUMBERS) <= set(itertools.product(METHODS, PAPER_PRESETS))


def test_methods_have_names():
    """``RECIPES`` tells what each of them is made of."""
    assert RECIPES["mhgl"].numbers["paper"]["epochs"] == (20, "paper")
    assert set(RECIPES["mhgl"].numbers["all"]) <= set(tiny("mhgl").settings)
    parts = RECIPES["triplet"].build(tiny("triplet").settings, CLASSES, None)
    assert isinstance(parts.trunk, PooledTrunk) and isinstance(parts.miner, miners.TripletMarginMiner)


def test_what_the_recipes_are_made_of():
    assert isinstance(tiny("mhgl").trunk, GlobalLocalTrunk)
    assert tiny("mhgl").loss.proxy_weight == 0.03
    assert isinstance(tiny("mhgl", levels="global", attention="none").trunk.attention, nn.Identity)
    assert tiny("mhgl").trunk.local_head[0].style == "normalized"
    for attention in ("solar", "normalized"):
        one_level = tiny("mhgl", levels="global", attention=attention).trunk.attention
        two_levels = tiny("mhgl", attention=attention).trunk
        assert one_level.reduction == two_levels.global_head[0].reduction == 2  # SOLAR's
        assert two_levels.local_head[0].reduction == 4
        assert one_level.style == two_levels.local_head[0].style == attention
    assert isinstance(tiny("attention_ensemble").trunk, AttentionEnsemble)
    assert isinstance(tiny("intra_batch").loss, IntraBatchLoss)
    assert tiny("intra_batch", refined_weight=0.0).loss.refiner is None
    assert tiny("adaptive_margin", direction="similarity").loss.direction == "similarity"
    assert isinstance(tiny("triplet").miner, miners.TripletMarginMiner)
    assert isinstance(tiny("cosface").loss, losses.CosFaceLoss) and tiny("cosface").loss.scale == 16
    assert recipe("cosface", 3, preset="paper:cub", pretrained=False).loss.scale == 64


def test_plain_heads_of_an_ensemble_have_slices_of_length_one():
    slices = split_learners(tiny("attention_ensemble", masks=False).trunk(IMAGES), 4)
    torch.testing.assert_close(slices.norm(dim=2), torch.ones(12, 4))


def test_recommended_has_masks_where_the_network_can_be_cut():
    assert isinstance(tiny("recommended").trunk, AttentionEnsemble)
    assert isinstance(tiny("recommended", backbone="resnet18").trunk, AttentionEnsemble)
    own = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
    own.num_features = 8
    with pytest.warns(UserWarning, match="masks are left out, this network cannot have them: backbone must be trace"):
        transformer = tiny("recommended", backbone="test_vit")
    for made in (
        transformer,
        tiny("recommended", backbone=own),
        tiny("recommended", masks=False),
        recipe("recommended", CLASSES, preset="finetune", backbone="test_vit", pretrained=False, num_learners=4),
    ):
        assert isinstance(made.trunk, PooledTrunk) and made.trunk.num_learners == 4
        assert made.settings.masks is False
    assert transformer.notes["masks"] == "False: left out, see the warning"
    plain = recipe("recommended", CLASSES, preset="finetune", backbone="test_vit", pretrained=False)
    assert isinstance(plain.trunk, PooledTrunk) and isinstance(plain.loss, HybridLoss)


@pytest.mark.parametrize("name", ["recommended", "attention_ensemble"])
def test_learners_with_masks_pool_as_they_are_told(name):
    """Behind the same weights, timm's half of the sum of average and maximum points where our sum does."""
    given = {"backbone": "resnet18", "image_size": 64, "embedding_size": 16}
    of_both, average = (tiny(name, **given, pool_type=pool_type).trunk.eval() for pool_type in ("avg+max", "avg"))
    average.load_state_dict(of_both.state_dict())
    features = average.stem(torch.rand(2, 1, 64, 64))
    maps = []
    hook = average.head.get_submodule("layer4").register_forward_hook(lambda *args: maps.append(args[2]))
    average.head(features)
    hook.remove()
    torch.testing.assert_close(2 * of_both.head(features), GlobalPool2d("avg+max")(maps[0]))
    torch.testing.assert_close(average.head(features), GlobalPool2d("avg")(maps[0]))


@pytest.mark.parametrize("name", ["recommended", "attention_ensemble"])
@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "lcnet_050", "mobilenetv4_conv_small"])
def test_learners_on_networks_that_know_no_stride(name, backbone):
    """Timm's features of these take ``output_stride``, the networks themselves do not."""
    made = recipe(name, CLASSES, backbone=backbone, image_size=64, embedding_size=16)
    assert isinstance(made.trunk, AttentionEnsemble)
    assert made.trunk.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 16)


@pytest.mark.filterwarnings("ignore:masks are left out")
def test_recommended_refuses_images_that_do_not_fit():
    with pytest.raises(ValueError, match="backbone must take images of image_size = 28, 'mixer_s32_224'"):
        recipe("recommended", CLASSES, backbone="mixer_s32_224", image_size=28)


def test_recommended_is_a_pair_loss_and_a_softmax_for_each_learner():
    made = tiny("recommended", proxy_weight=0.5, divergence_weight=0.25, temperature=0.2)
    embeddings = made.trunk(IMAGES).detach()
    divergence = DivergenceLoss(num_learners=4)(embeddings, LABELS)
    assert divergence > 0
    wanted = 0.25 * divergence
    for learner, loss in zip(embeddings.chunk(4, 1), made.loss.losses.values(), strict=True):
        softmax = losses.NormalizedSoftmaxLoss(CLASSES, 4, temperature=0.2)
        softmax.load_state_dict(loss.proxy_loss.state_dict())
        wanted += losses.MultiSimilarityLoss()(learner, LABELS) + 0.5 * softmax(learner, LABELS)
    torch.testing.assert_close(made.loss(embeddings, LABELS), wanted)
    one = tiny("recommended", num_learners=1)
    assert isinstance(one.loss, HybridLoss) and isinstance(one.trunk, PooledTrunk)


def test_recommended_has_proxy_anchor_beside_the_softmax_where_it_is_told():
    made = tiny("recommended", num_learners=1, proxy_weight=0.5, anchor_weight=0.25)
    embeddings = made.trunk(IMAGES).detach()
    both, size = made.loss.proxy_loss, made.settings.embedding_size
    softmax = losses.NormalizedSoftmaxLoss(CLASSES, size, temperature=0.1)
    anchors = losses.ProxyAnchorLoss(CLASSES, size)
    softmax.load_state_dict(both.proxy_loss.state_dict())
    anchors.load_state_dict(both.pair_loss.state_dict())
    proxies = softmax(embeddings, LABELS) + 0.25 * anchors(embeddings, LABELS)
    torch.testing.assert_close(
        made.loss(embeddings, LABELS), losses.MultiSimilarityLoss()(embeddings, LABELS) + 0.5 * proxies
    )
    names = {group["name"]: group for group in made.param_groups}
    assert len(names["proxies"]["params"]) == 2


def test_recommended_takes_hard_pairs_behind_a_pretrained_network():
    made = recipe("recommended", CLASSES, preset="finetune", backbone="test_resnet", pretrained=False)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(LABELS), made.settings.embedding_size, generator=generator)
    embeddings += (LABELS == 0)[:, None] * embeddings[0] * 3  # one class is apart
    mined = losses.MultiSimilarityLoss()(embeddings, LABELS, miners.MultiSimilarityMiner(0.1)(embeddings, LABELS))
    both = made.loss.proxy_loss
    proxies = both.proxy_loss(embeddings, LABELS) + 0.3 * both.pair_loss(embeddings, LABELS)
    torch.testing.assert_close(made.loss(embeddings, LABELS), 10 * mined + proxies)
    plain = recipe("recommended", CLASSES, preset="finetune", backbone="test_resnet", pretrained=False, epsilon=None)
    plain.loss.load_state_dict(made.loss.state_dict())
    everything = losses.MultiSimilarityLoss()(embeddings, LABELS)
    torch.testing.assert_close(plain.loss(embeddings, LABELS), 10 * everything + proxies)
    assert abs(mined - everything) > 1e-3  # this batch has pairs that are left out


def test_messages_are_the_only_thing_that_the_control_lacks():
    """In eval mode, a sample's refined embedding depends on the others with messages and not without."""
    for messages in (True, False):
        refiner = tiny("intra_batch", messages=messages).loss.refiner.eval()
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
        changed = torch.cat([x[:1], x[1:] + 1])
        same = torch.allclose(refiner(x)[0], refiner(changed)[0], atol=1e-6)
        assert same != messages
        assert sum(p.numel() for p in refiner.parameters()) == sum(
            p.numel() for p in tiny("intra_batch").loss.refiner.parameters()
        )


@pytest.mark.parametrize("proxy_loss", ["proxy_anchor", "adaptive_margin"])
@pytest.mark.parametrize("refined_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    "network",
    [
        {},
        {"levels": "both", "attention": "solar"},
        {"num_learners": 4},
        {"num_learners": 4, "masks": False, "divergence_weight": 0.5},
    ],
)
def test_all_ideas_combine(proxy_loss, refined_weight, network):
    made = tiny("combined", proxy_loss=proxy_loss, refined_weight=refined_weight, **network)
    loss_of(made).backward()
    grads = [p.grad for p in (*made.trunk.parameters(), *made.loss.parameters()) if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert isinstance(made.loss, IntraBatchLoss) == bool(refined_weight)
    inner = made.loss.raw_loss if refined_weight else made.loss
    printed = tiny("combined", negative_sign="printed", refined_weight=0.0).loss.pair_loss
    assert printed.negative_sign == "printed"
    assert isinstance(inner, EnsembleLoss) == ("num_learners" in network)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_timm_backbones(backbone):
    made = recipe("multi_similarity", CLASSES, backbone=backbone, image_size=32, embedding_size=16)
    assert made.trunk.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 16)
    features = made.trunk.backbone(torch.rand(2, 3, 32, 32))
    assert features.shape[1] == made.trunk.backbone.num_features
    if backbone == "resnet18":
        assert features.shape[2:] == (4, 4)  # stride 8 instead of 32


def test_learning_rates():
    made = tiny("proxy_anchor", lr=0.5, head_lr=0.25, proxy_lr=0.125)
    rates = {group["name"].split(",")[0]: group["lr"] for group in made.param_groups}
    assert rates == {"backbone": 0.5, "new layers": 0.25, "proxies": 0.125}


def test_the_refiner_of_a_combination_learns_at_its_own_rate():
    made = tiny("combined", refiner_lr=0.5, proxy_lr=0.25, lr=0.125)
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in made.loss.refiner.parameters()} == {0.5}
    assert {rates[id(p)] for p in made.loss.refined_loss.parameters()} == {0.5}
    assert {rates[id(p)] for p in made.loss.raw_loss.parameters()} == {0.25}
    assert {rates[id(p)] for p in made.trunk.parameters()} == {0.125}


def test_resize_follows_the_image_size():
    for name, size, resize in (("proxy_anchor", 64, 73), ("intra_batch", 454, 512)):
        made = recipe(name, 3, preset="paper:cub", pretrained=False, backbone="resnet18", image_size=size)
        assert made.settings.resize == resize
    assert recipe("proxy_anchor", 3, preset="paper:sop", pretrained=False, backbone="resnet18").settings.resize == 256


def test_contrastive_is_pml_loss():
    """The value to the last bit, the gradient to rounding: it is added up in another order."""
    ours, theirs = tiny("contrastive").loss, losses.ContrastiveLoss(pos_margin=0.0, neg_margin=1.0)
    rng = torch.Generator().manual_seed(0)
    for size in (16, 64, 400):
        emb, labels = torch.randn(size, 32, generator=rng).requires_grad_(), torch.randint(8, (size,), generator=rng)
        values = ours(emb, labels), theirs(emb, labels)
        assert values[1] > 0
        assert torch.equal(*values)
        grads = [torch.autograd.grad(value, emb)[0] for value in values]
        assert grads[1].any()
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_numbers_that_no_paper_has_do_not_claim_one():
    for name in ("contrastive", "adaptive_margin"):
        made = recipe(name, 3, preset="paper:cub", pretrained=False, class_embeddings=DESCRIPTIONS[:3])
        assert not [note for note in made.notes.values() if note.endswith(": paper")]
    assert "'printed'" in tiny("mhgl").notes["negative_sign"]


def test_schedules():
    made = tiny("proxy_anchor", epochs=4)
    optimizer = made.optimizer()
    scheduler, rates = made.scheduler(optimizer), []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 2e-3 and rates == sorted(rates, reverse=True) and optimizer.param_groups[0]["lr"] < 1e-9
    made = tiny("proxy_anchor", schedule="step", milestones=(1, 3), gamma=0.1, lr=1.0)
    optimizer = made.optimizer()
    scheduler, rates = made.scheduler(optimizer), []
    for _ in range(4):
        rates.append(round(optimizer.param_groups[0]["lr"], 9))
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 0.1, 0.1, 0.01]


@pytest.mark.parametrize("kind", [ShuffledPassSampler, samplers.MPerClassSampler])
def test_sampler(kind):
    made = tiny("proxy_anchor", batch_size=8, samples_per_class=4, sampler=kind.__name__)
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 8)
    assert type(made.sampler(labels)) is kind and len(made.sampler(labels)) == 16
    assert len(made.sampler(labels, length=41)) == 40
    batch = list(made.sampler(labels))[:8]
    assert sorted(torch.bincount(labels[batch], minlength=3).tolist()) == [0, 4, 4]
    assert made.batch_size(labels) == 8
    assert tiny("proxy_anchor", batch_size=96, samples_per_class=4).batch_size(labels) == 12  # three classes only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mhg"}, "name must be one of recommended, mhgl, .*, got 'mhg'"),
        ({"preset": "paper"}, "preset must be one of small, finetune, paper:cub, .* got 'paper'"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        (
            {"proxy_weigth": 1},
            "a setting must be one of the recipe's settings, such as proxy_weight.*, got 'proxy_weigth'",
        ),
        ({"learning_rate": 1e-3}, "a setting must be one of the recipe's settings, such as lr, got 'learning_rate'"),
        ({"backbone": "resnet19"}, "backbone must be a timm model such as .*resnet18.*, got 'resnet19'"),
        ({"batch_size": 10, "samples_per_class": 4}, "batch_size must be a multiple of samples_per_class = 4.* got 10"),
        ({"optimizer": "Adagrad"}, "optimizer must be one of AdamW, RAdam, SGD, got 'Adagrad'"),
        ({"sampler": "random"}, "sampler must be one of ShuffledPassSampler, MPerClassSampler, got 'random'"),
        ({"schedule": "line"}, "schedule must be one of cosine, step, got 'line'"),
        ({"levels": "local"}, "levels must be 'both' or 'global', got 'local'"),
        ({"in_channels": 2}, "in_channels must be 1 or 3, got 2"),
        ({"augmentation": "mixup"}, "augmentation must be one of .*, got 'mixup'"),
        ({"pretrained": True}, "pretrained must be False for the backbone 'convnet'"),
        ({"name": "combined", "proxy_loss": "none"}, "proxy_loss must be 'proxy_anchor' or 'adaptive_margin'"),
        ({"name": "combined", "num_learners": 4, "levels": "both"}, "levels must be 'global' for an ensemble"),
        ({"name": "attention_ensemble", "learner_loss": "triplet"}, "learner_loss must be 'contrastive' or"),
        ({"name": "recommended", "temperature": 0}, "temperature must be a number > 0, got 0"),
        ({"name": "normalized_softmax", "temperature": -1.0}, "temperature must be a number > 0, got -1.0"),
        ({"name": "recommended", "num_learners": 0}, "num_learners must be an integer >= 1, got 0"),
        ({"name": "recommended", "num_learners": 3}, "embedding_size must be a multiple of num_learners = 3, got 256"),
        ({"name": "recommended", "backbone": "resnet18", "split": "layer9"}, "split must be one of .*, got 'layer9'"),
        ({"name": "mhgl", "freeze_batch_norm": 2}, "freeze_batch_norm must be True or False, got 2"),
        ({"name": "recommended", "masks": 7}, "masks must be True or False, got 7"),
        ({"name": "recommended", "split": [1]}, r"split must be a module's name, a reduction or None, got \[1\]"),
        ({"name": "recommended", "num_learners": 1, "masks": True}, "masks must be False for one learner, got True"),
        (
            {"name": "recommended", "backbone": "googlenet", "num_learners": 1},
            "num_learners must be of several learners with masks for the backbone 'googlenet', got 1 and masks = True",
        ),
        ({"name": "recommended", "anchor_weight": -1}, "anchor_weight must be a number >= 0, got -1"),
        ({"name": "recommended", "anchor_weight": True}, "anchor_weight must be a number >= 0, got True"),
        ({"name": "recommended", "backbone": "googlenet"}, "pool_type must be 'avg' for the backbone 'googlenet', got"),
        (
            {"name": "attention_ensemble", "backbone": "resnet18", "pool_type": "gem"},
            "pool_type must be one that timm's resnet18 has, or 'avg', for learners with masks, got 'gem'",
        ),
        ({"name": "combined", "num_learners": 0}, "num_learners must be an integer >= 1, got 0"),
        ({"name": "adaptive_margin"}, "class_embeddings must be given for adaptive margins"),
        ({"name": "combined", "proxy_loss": "adaptive_margin"}, "class_embeddings must be given for adaptive margins"),
        ({"name": "combined", "num_learners": 4, "attention": "solar"}, "attention must be 'none' for learners"),
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"resize": 20}, "resize must be >= image_size = 32, got 20"),
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        (
            {"name": "intra_batch", "similarity_gain": 5.0},
            "a setting must be one of the recipe's settings, .*'similarity_gain'",
        ),
        ({"name": "intra_batch", "output": "every"}, "output must be one of last, cat, got 'every'"),
        ({"lr": -1.0}, "lr must be a number > 0, got -1.0"),
        ({"clip_value": "much"}, "clip_value must be a number > 0, got 'much'"),
        ({"flip": "yes"}, "flip must be True, False or None, got 'yes'"),
        ({"warmup_epochs": -1}, "warmup_epochs must be an integer >= 0, got -1"),
        ({"warmup_epochs": 1.5}, "warmup_epochs must be an integer >= 0, got 1.5"),
        ({"gamma": -1.0}, "gamma must be a number > 0, got -1.0"),
        ({"milestones": 5}, "milestones must be a list of epochs, got 5"),
        ({"name": "triplet", "type_of_triplets": "most"}, "type_of_triplets must be all, hard, semihard or easy"),
        (
            {"backbone": "inception_v4", "image_size": 28},
            "backbone must take images of image_size = 28, 'inception_v4'",
        ),
        ({"backbone": "mixer_b16_224", "image_size": 28}, "backbone must take images of image_size = 28, 'mixer_b16"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipe(**({"name": "mhgl", "num_classes": CLASSES, "width": 4} | arguments))


@pytest.mark.parametrize("name", ["mhgl", "combined", "adaptive_margin", "triplet"])
@pytest.mark.parametrize("kind", [torch.zeros, np.zeros])
def test_class_embeddings_of_the_wrong_shape(name, kind):
    """Also where a recipe makes no use of them."""
    message = rf"class_embeddings must have shape \({CLASSES}, E\), got \({CLASSES + 1}, 3\)"
    with pytest.raises(ValueError, match=message):
        recipe(name, CLASSES, class_embeddings=kind((CLASSES + 1, 3)))
    with pytest.raises(ValueError, match=rf"E\), got \({CLASSES},\)"):
        recipe(name, CLASSES, class_embeddings=kind(CLASSES))


def test_none_is_a_value():
    """Where there is none, it is refused; only the arguments of ``recipe`` stand for the preset's."""
    finetune = {"preset": "finetune", "backbone": "test_resnet", "pretrained": False}
    given = {"augmentation": None, "flip": None, "head_lr": None, "split": None}
    settings = recipe("recommended", CLASSES, embedding_size=None, **finetune, **given).settings
    assert {name: settings[name] for name in given} == given and settings.embedding_size == 256
    assert recipe("recommended", CLASSES, preset="finetune", weights=None).settings.weights is None
    papers = {"preset": "paper:cub", "backbone": "test_resnet", "pretrained": False, "image_size": 64}
    assert recipe("proxy_anchor", CLASSES, **papers).settings.resize == 73
    settings = recipe("proxy_anchor", CLASSES, **papers, clip_value=None, resize=None).settings
    assert (settings.clip_value, settings.resize) == (None, None)
    assert tiny("multi_similarity", epsilon=None).settings.epsilon is None
    for name in ("lr", "backbone", "sampler"):
        with pytest.raises(ValueError, match=f"{name} must not be None; leave it out for that of the preset"):
            settle("small", RECIPES["mhgl"].numbers, {name: None})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("recommended", {"num_learners": 1, "masks": False, "split": 4}, "the setting has no effect here: split"),
        (
            "recommended",
            {"num_learners": 1, "masks": False, "split": 4, "divergence_weight": 0.5},
            "the settings have no effect here: split, divergence_weight",
        ),
        ("attention_ensemble", {"masks": False, "split": 4}, "the setting has no effect here: split"),
        ("attention_ensemble", {"learner_loss": "contrastive", "base": 1.0}, "the setting has no effect here: base"),
        ("combined", {"proxy_loss": "proxy_anchor", "margin_scale": 0.1}, "the setting has no effect here: marg"),
        ("contrastive", {"proxy_lr": 0.5}, "the setting has no effect here: proxy_lr"),
        (
            "proxy_anchor",
            {"milestones": torch.tensor([3]), "gamma": 0.5, "crop_scale": 0.5},
            "the settings have no effect here: crop_scale, milestones, gamma",
        ),
        (
            "proxy_anchor",
            {"backbone": "test_resnet", "width": 4},
            "the setting has no effect here: width",
        ),
    ],
)
def test_settings_without_effect_are_told(name, given, message):
    with pytest.warns(UserWarning, match=f"^{message}"):
        tiny(name, **given)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("recommended", {"num_learners": 2, "divergence_weight": 0.5}),
        ("combined", {"refined_weight": 1.0, "refiner_lr": 0.5}),
        ("proxy_anchor", {"proxy_lr": 0.5, "schedule": "step", "milestones": (3,), "gamma": 0.5, "width": 4}),
        ("proxy_anchor", {"augmentation": "crop", "crop_scale": 0.5, "milestones": []}),  # no milestones, as the preset
        ("recommended", {"num_learners": 1, "masks": False, "split": None}),  # as the preset has it
        (
            "recommended",
            {"preset": "finetune", "backbone": "test_resnet", "pretrained": False, "in_channels": 3, "width": 32},
        ),
    ],
)
def test_settings_with_effect_are_not_told(name, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(name, **given)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_lists_may_be_arrays(kind):
    made = tiny(
        "proxy_anchor", schedule="step", milestones=kind([1, 2]), pixel_mean=kind([0.5]), pixel_std=kind([0.25])
    )
    assert made.settings.milestones == [1, 2]
    assert (made.settings.pixel_mean, made.settings.pixel_std) == ([0.5], [0.25])


def test_settings_are_a_mapping_that_can_be_copied():
    settings = tiny("mhgl").settings
    assert dict(copy.deepcopy(settings)) == dict(settings)
    with pytest.raises(AttributeError, match="settings have no 'nothing'"):
        settings.nothing  # noqa: B018
