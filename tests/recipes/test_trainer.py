import copy
import json
import random
import warnings

import numpy as np
import pytest
import torch
from pytorch_metric_learning.trainers import MetricLossOnly

from pml_ext.recipes import Trainer, recipe

CLASSES = 6
IMAGES = torch.rand(36, 1, 28, 28, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(36) % CLASSES


class Images(torch.utils.data.Dataset):
    """What a user's data set looks like; its random transform shows whether a resumed run draws the same numbers."""

    def __init__(self):
        self.labels = LABELS
        self.transform = None

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        return self.transform((255 * IMAGES[index]).byte()), int(LABELS[index])


def tiny(name="proxy_anchor", **settings):
    _seed()  # PML's sampler draws from NumPy
    common = {"in_channels": 1, "image_size": 28, "width": 4, "batch_size": 12, "samples_per_class": 2, "epochs": 3}
    return recipe(name, CLASSES, **(common | settings))


def state_of(made):
    modules = (made.trunk, made.loss)
    return {f"{i}.{name}": x.clone() for i, module in enumerate(modules) for name, x in module.state_dict().items()}


def test_trunk_and_proxies_are_trained(caplog):
    made = tiny()
    before = state_of(made)
    trainer = Trainer(made, Images())
    assert isinstance(trainer, MetricLossOnly)
    history = trainer.train()
    after = state_of(made)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[0]["lr"] == 2e-3 > history[1]["lr"] and history[0]["seconds"] > 0
    assert not caplog.records  # PML warns of what a user has left out
    assert {"trunk_optimizer", "metric_loss_optimizer"} == set(trainer.optimizers)


def test_the_mean_loss_of_an_epoch():
    """With learning rates near 0 and no batch norm statistics in it, it is the mean over the batches of the hook."""
    seen = []
    trainer = Trainer(tiny(), Images(), end_of_iteration_hook=lambda t: seen.append(t.losses["total_loss"].item()))
    entry = trainer.train(1)[0]
    assert len(seen) == 3
    assert entry["loss"] == pytest.approx(sum(seen) / 3)


def test_validation_chooses_the_epoch(tmp_path):
    scores, states = iter([0.2, 0.9, 0.5]), []
    made = tiny()

    def validate(trunk):
        assert trunk is made.trunk
        states.append(copy.deepcopy(trunk.state_dict()))
        return {"mean_average_precision_at_r": next(scores)}

    trainer = Trainer(made, Images(), validate=validate, folder=tmp_path)
    trainer.train()
    assert trainer.best["epoch"] == 2 and trainer.best["mean_average_precision_at_r"] == 0.9
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(torch.equal(best["trunk"][name], x) for name, x in states[1].items())
    assert all(torch.equal(last["trunk"][name], x) for name, x in states[2].items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == trainer.history and len(lines) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "config.json", "last.pt", "metrics.jsonl"}


@pytest.mark.parametrize(  # one that draws nothing, one with dropout, also in chunks
    ("name", "settings"), [("proxy_anchor", {}), ("intra_batch", {}), ("intra_batch", {"chunk_size": 5})]
)
def test_a_resumed_run_is_the_uninterrupted_one(name, settings, tmp_path):
    whole, parts = tiny(name, **settings), tmp_path / "parts"
    _seed()
    expected = Trainer(whole, Images()).train()
    first = tiny(name, **settings)
    _seed()
    Trainer(first, Images(), folder=parts).train(1)
    second = tiny(name, **settings)
    torch.manual_seed(99)  # another process knows nothing of the first one's generators
    trainer = Trainer(second, Images(), folder=parts)
    assert trainer.resume() == 1
    history = trainer.train()
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in expected]
    assert all(torch.equal(x, state_of(second)[key]) for key, x in state_of(whole).items())


def _seed():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def test_a_hook_can_end_the_training():
    trainer = Trainer(tiny(), Images(), end_of_epoch_hook=lambda t: len(t.history) < 2)
    assert len(trainer.train()) == 2
    assert len(trainer.train(3)) == 3  # and it can go on


def test_backbone_stands_still_while_new_layers_warm_up():
    made = tiny(warmup_epochs=1)
    start = copy.deepcopy(made.trunk.state_dict())
    trainer = Trainer(made, Images())
    told = r"only the new layers are trained in 1 of \d+ epochs: the backbone begins to learn after warmup_epochs = 1"
    with pytest.warns(UserWarning, match=told):
        trainer.train(1)
    names = [name for name, _ in made.trunk.named_parameters()]
    changed = {name: not torch.equal(start[name], made.trunk.state_dict()[name]) for name in names}
    assert {name for name in names if changed[name]} == {"linear.weight", "linear.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(2)
        Trainer(tiny(), Images()).train(1)
    assert all(not torch.equal(start[name], made.trunk.state_dict()[name]) for name in names)


def test_warming_up_leaves_no_trace():
    """Another trainer of the same modules finds them as they were, and what the user has frozen stays frozen."""
    made = tiny(warmup_epochs=1)
    made.trunk.backbone.stage1.requires_grad_(False)
    frozen = copy.deepcopy(made.trunk.backbone.stage1[0].weight)
    Trainer(made, Images()).train(1)
    start = made.trunk.backbone.stage2[1].weight.clone()
    Trainer(made, Images()).train(2)
    assert not torch.equal(made.trunk.backbone.stage2[1].weight, start)
    assert torch.equal(made.trunk.backbone.stage1[0].weight, frozen)
    assert not any(p.requires_grad for p in made.trunk.backbone.stage1.parameters())


def test_an_interrupted_warm_up_leaves_no_trace():
    made = tiny(warmup_epochs=1)

    def interrupt(trainer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(made, Images(), end_of_iteration_hook=interrupt).train(1)
    assert all(p.requires_grad for p in made.trunk.parameters())


def test_what_pml_takes_is_passed_on():
    made = tiny()
    start = copy.deepcopy(made.trunk.state_dict())
    trainer = Trainer(made, Images(), freeze_these=("trunk",), loss_weights={"metric_loss": 2.0})
    proxies = made.loss.proxies.detach().clone()
    trainer.train(1)
    assert all(torch.equal(start[name], p) for name, p in made.trunk.named_parameters())
    assert not torch.equal(made.loss.proxies, proxies)
    assert not any(p.requires_grad for p in made.trunk.parameters())
    assert trainer.loss_weights == {"metric_loss": 2.0}


def test_metrics_that_are_no_numbers_are_not_the_best():
    scores = iter([float("nan"), 0.3, float("nan")])
    trainer = Trainer(tiny(), Images(), validate=lambda trunk: {"mean_average_precision_at_r": next(scores)})
    trainer.train()
    assert trainer.best["epoch"] == 2


@pytest.mark.parametrize(("returned", "names"), [({"p1": 0.5, "r": 0.25}, "p1, r"), (None, "none")])
def test_a_metric_that_validate_does_not_return(tmp_path, returned, names):
    """What has been trained is kept."""
    made = tiny()
    trainer = Trainer(made, Images(), validate=lambda trunk: returned, metric="map", folder=tmp_path)
    with pytest.raises(ValueError, match=f"metric must be one that validate returns, {names}, got 'map'"):
        trainer.train()
    trainer = Trainer(made, Images(), validate=lambda trunk: {"p1": 0.5, "r": 0.25}, metric="p1", folder=tmp_path)
    assert trainer.resume() == 1
    assert trainer.train()[-1]["epoch"] == 3 and trainer.best["epoch"] == 2


def test_gradients_are_clipped():
    largest = []

    def look(trainer):
        modules = (trainer.models["trunk"], trainer.loss_funcs["metric_loss"])
        largest.append(max(p.grad.abs().max().item() for module in modules for p in module.parameters()))

    Trainer(tiny(), Images(), end_of_iteration_hook=look).train(1)
    free, largest = max(largest), []
    Trainer(tiny(clip_value=free / 2), Images(), end_of_iteration_hook=look).train(1)
    assert max(largest) == pytest.approx(free / 2)


def test_frozen_batch_norms_keep_their_statistics():
    made = tiny(freeze_batch_norm=True)
    Trainer(made, Images()).train(1)
    norm = made.trunk.backbone.stage1[1]
    assert not norm.running_mean.any() and norm.weight.ne(1).any()


def trained(name, chunk_size, **settings):
    """Return what is trained in an epoch, its losses, and the largest number of images that the network has seen."""
    made, seen = tiny(name, chunk_size=chunk_size, freeze_batch_norm=True, optimizer="SGD", **settings), []
    made.trunk.register_forward_hook(lambda module, images, embeddings: seen.append(len(images[0])))
    losses = []
    trainer = Trainer(
        made,
        Images(),
        loss_weights={"metric_loss": 0.5},
        end_of_iteration_hook=lambda t: losses.append((t.losses["metric_loss"].item(), t.losses["total_loss"].item())),
    )
    _seed()
    trainer.train(1)
    return state_of(made), losses, max(seen)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("triplet", {}), ("intra_batch", {}), ("proxy_anchor", {"warmup_epochs": 1, "clip_value": 1e-3})],
)
def test_batches_in_chunks(name, settings):
    """The training is that of whole batches: with miner, dropout in the loss, a frozen backbone, clipped gradients."""
    start, (whole, losses, largest) = state_of(tiny(name)), trained(name, None, **settings)
    chunked, losses_in_chunks, largest_chunk = trained(name, 5, **settings)
    assert (largest, largest_chunk, len(losses)) == (12, 5, 3) and min(min(losses)) > 0
    torch.testing.assert_close(losses_in_chunks, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-5)
    assert any((whole[key] - x).abs().max() > 1e-4 for key, x in start.items() if x.is_floating_point())


def test_a_chunk_is_counted_once():
    made = tiny(chunk_size=5)
    Trainer(made, Images()).train(1)
    assert made.trunk.backbone.stage1[1].num_batches_tracked == 3 * 3  # batches of 5 + 5 + 2


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_autocast_and_channels_last(chunk_size):
    made = tiny(width=8, chunk_size=chunk_size)
    dtypes = []
    trainer = Trainer(
        made,
        Images(),
        autocast=torch.bfloat16,
        channels_last=True,
        end_of_iteration_hook=lambda t: dtypes.append(t.losses["total_loss"].dtype),
    )
    seen = {}
    made.trunk.backbone.stage2[1].register_forward_hook(lambda m, i, o: seen.update(dtype=o.dtype, x=o))
    history = trainer.train()
    assert history[-1]["loss"] < history[0]["loss"]
    assert seen["dtype"] == torch.bfloat16 and seen["x"].is_contiguous(memory_format=torch.channels_last)
    assert set(dtypes) == {torch.float32}
    assert {p.dtype for p in made.trunk.parameters()} == {torch.float32}


def test_a_transform_of_the_users_is_kept():
    dataset, made = Images(), tiny()
    Trainer(made, dataset)
    assert dataset.transform is made.transforms.train  # where there was none
    dataset.transform = own = lambda image: image.float() / 255
    Trainer(tiny(), dataset)
    assert dataset.transform is own


@pytest.mark.parametrize(
    "kind",
    [
        lambda labels: labels.numpy().astype(np.uint64),
        lambda labels: labels.to(torch.uint64),
        lambda labels: labels.numpy().astype(">i2"),
        lambda labels: labels.flip(0).numpy()[::-1],
        lambda labels: tuple(labels.tolist()),
    ],
)
def test_labels_of_any_kind_of_integer(kind):
    trainer = Trainer(tiny(), torch.utils.data.TensorDataset(IMAGES, LABELS), kind(LABELS))
    assert trainer._labels.dtype == torch.int64 and torch.equal(trainer._labels, LABELS)


def test_labels_in_another_order_are_told():
    made = tiny()
    dataset = torch.utils.data.TensorDataset(IMAGES, LABELS)
    dataset.labels = LABELS
    with pytest.warns(UserWarning, match="labels make other classes than those of the dataset: .* same order"):
        Trainer(made, dataset, LABELS.sort().values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(made, dataset, CLASSES - 1 - LABELS)  # other numbers of the same classes
        dataset.target_transform = lambda label: label // 2
        Trainer(made, dataset, LABELS // 2)
        del dataset.target_transform
        dataset.labels = ["a", "b"]
        Trainer(made, dataset, LABELS)


@pytest.mark.parametrize(
    ("sample", "got"),
    [
        (lambda image, label: {"pixels": image, "label": label}, "a dictionary of pixels, label"),
        (lambda image, label: (image, label, 7), "3 things"),
    ],
)
def test_samples_that_are_no_pairs(sample, got):
    samples = [sample(image, label) for image, label in zip(IMAGES, LABELS.tolist(), strict=True)]
    message = f"an image and a label for each index, got {got}: data_and_label_getter takes them out of a batch"
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(), samples, LABELS).train(1)
    taken = {"data_and_label_getter": lambda batch: tuple(batch.values() if isinstance(batch, dict) else batch)[:2]}
    assert len(Trainer(tiny(), samples, LABELS, **taken).train(1)) == 1


def test_errors(tmp_path):
    made = tiny()
    with pytest.raises(ValueError, match="labels must be given for a dataset without the attribute"):
        Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS))
    with pytest.raises(ValueError, match=r"labels must lie in 0 to num_classes - 1 = 5, got 1 to 6"):
        Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS), LABELS + 1)
    with pytest.raises(ValueError, match="labels must lie in 0 to num_classes - 1 = 5, got none"):
        Trainer(made, torch.utils.data.TensorDataset(IMAGES[:0], LABELS[:0]), LABELS[:0])
    for labels in (LABELS[:-1], torch.cat([LABELS, LABELS]), LABELS[:, None]):
        with pytest.raises(ValueError, match=f"labels must have one entry for each of {len(LABELS)} images, got shape"):
            Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS), labels)
    for labels in (LABELS + 0.5, LABELS > 1, [str(label) for label in LABELS.tolist()]):
        with pytest.raises(TypeError, match="labels must have an integer dtype"):
            Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS), labels)
    with pytest.raises(TypeError, match="batch_size must be a setting of the recipe, got 4 for the trainer"):
        Trainer(made, Images(), batch_size=4)
    with pytest.raises(TypeError, match="dataset must have a length, so that batches can be drawn, got a generator"):
        Trainer(made, (x for x in range(3)))
    with pytest.raises(ValueError, match="device must be available, got 'nowhere'"):
        Trainer(made, Images(), device="nowhere")
    with pytest.raises(ValueError, match="path must be given for a trainer without folder"):
        Trainer(made, Images()).resume()
    with pytest.raises(ValueError, match="num_epochs must be <= 3, where the cosine schedule ends, got 4"):
        Trainer(made, Images()).train(4)
    for number in (1.5, -1, 0, True):
        with pytest.raises(ValueError, match=f"num_epochs must be an integer >= 1, got {number}"):
            Trainer(made, Images()).train(number)
    with pytest.raises(FileNotFoundError):
        Trainer(made, Images(), folder=tmp_path).resume()
