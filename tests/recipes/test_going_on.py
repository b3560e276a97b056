"""Trainings that are stopped, go on with other settings, fail in the middle, or find files of others."""

import copy
import json
import math
import os
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pml_ext.recipes import Trainer, load_run, recipe
from pml_ext.recipes.run_config import read_config, write_config
from pml_ext.samplers import ShuffledPassSampler

LABELS = torch.arange(24) % 4
IMAGES = torch.rand(24, 1, 12, 12, generator=torch.Generator().manual_seed(2)) + LABELS[:, None, None, None]
SMALL = {"in_channels": 1, "image_size": 12, "width": 4, "batch_size": 8, "samples_per_class": 2, "epochs": 3}
SMALL |= {"embedding_size": 8}


def made(name="proxy_anchor", **settings):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    return recipe(name, 4, **(SMALL | settings))


def trainer_of(made, folder=None, **kwargs):
    return Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS), LABELS, folder=folder, device="cpu", **kwargs)


def same(first, second):
    states = first.trunk.state_dict(), second.trunk.state_dict()
    return all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def rates(trainer):
    return [entry["lr"] for entry in trainer.history]


def score(trunk):
    return {"mean_average_precision_at_r": 0.5}


STEPS = {"schedule": "step", "milestones": (1, 3), "gamma": 0.1}


def test_more_epochs_by_steps_are_as_if_planned(tmp_path):
    whole = made(**STEPS, epochs=4)
    expected = trainer_of(whole).train()
    trainer_of(made(**STEPS, epochs=2), tmp_path).train()
    longer = made(**STEPS, epochs=4)
    trainer = trainer_of(longer, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing differs
        assert trainer.resume() == 2
        trainer.train()
    assert [entry["loss"] for entry in trainer.history] == [entry["loss"] for entry in expected]
    assert rates(trainer) == pytest.approx([2e-3, 2e-4, 2e-4, 2e-5]) and same(whole, longer)
    config = read_config(tmp_path)
    assert (config["settings"]["epochs"], config["resumed"]) == (4, [{"epoch": 2, "epochs": [2, 4]}])


@pytest.mark.parametrize("trained", [1, 3])
def test_more_epochs_by_cosine_have_the_planned_rates(trained, tmp_path):
    trainer_of(made(epochs=3), tmp_path).train(trained)
    trainer = trainer_of(made(epochs=6), tmp_path)
    message = (
        rf"epochs 1 to {trained} had .* cosine schedule of 3 epochs; those from epoch {trained + 1} on are of one of 6"
    )
    with pytest.warns(UserWarning, match=message):
        trainer.resume()
    trainer.train()
    schedule = {n: [1e-3 * (1 + math.cos(math.pi * k / n)) for k in range(n)] for n in (3, 6)}
    assert rates(trainer) == pytest.approx(schedule[3][:trained] + schedule[6][trained:], rel=1e-12)
    proxies = trainer.optimizers["metric_loss_optimizer"].param_groups[0]
    assert proxies["initial_lr"] == 2e-2 and proxies["lr"] < 1e-9  # each group has its own
    assert load_run(tmp_path).recipe.epochs == 6


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        (
            {"lr": 0.1, "weight_decay": 0.5},
            r"settings\.lr: 0\.002, got 0\.1; settings\.weight_decay: 0\.0001, got 0\.5$",
        ),
        ({"optimizer": "SGD"}, r"settings\.optimizer: 'AdamW', got 'SGD'$"),
        ({"schedule": "step", "milestones": (2,)}, r"settings\.schedule: .* settings\.milestones: \[\], got \[2\]$"),
        ({"sampler": "MPerClassSampler"}, r"settings\.sampler: 'ShuffledPassSampler', got 'MPerClassSampler'$"),
        ({"name": "cosface"}, "recipe: 'proxy_anchor', got 'cosface'"),
    ],
)
def test_other_settings_are_refused(changes, differing, tmp_path):
    trainer_of(made(), tmp_path).train(1)
    other = made(**changes)
    before, trainer = copy.deepcopy(other), trainer_of(other, tmp_path)
    with pytest.raises(
        ValueError, match=rf"the recipe must be that of {tmp_path / 'last.pt'} to resume: .*{differing}"
    ):
        trainer.resume()
    assert same(before, other) and not trainer.history and other.settings is not None


def test_what_else_cannot_go_on(tmp_path):
    trainer_of(made(), tmp_path).train(2)
    with pytest.raises(ValueError, match=r"epochs must be >= 2, which .*last\.pt has been trained, got 1"):
        trainer_of(made(epochs=1), tmp_path).resume()
    with pytest.raises(ValueError, match=r"autocast: None, got 'bfloat16'"):
        trainer_of(made(), tmp_path, autocast=torch.bfloat16).resume()
    frozen = made()
    frozen.trunk.backbone.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"must have the parameters of trunk_optimizer, .* other layers are frozen now than then"
    ):
        trainer_of(frozen, tmp_path).resume()
    trainer = Trainer(made(), torch.utils.data.TensorDataset(IMAGES[:20], LABELS[:20]), LABELS[:20], folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"dataset must have the images and labels that .* or other_data=True be given"
    ):
        trainer.resume()
    assert trainer.resume(other_data=True) == 2
    assert len(trainer.train()) == 3
    assert read_config(tmp_path)["training_images"] == trainer._fingerprint


def of_former_version(folder, made):
    """Take out of a run what former versions did not write."""
    state = torch.load(folder / "last.pt", weights_only=True)
    for name in ("config", "validated", "sampler"):
        state.pop(name, None)
    torch.save(state, folder / "last.pt")
    config = json.loads((folder / "config.json").read_text())
    del config["settings"]["sampler"], config["training_images"]
    (folder / "config.json").write_text(json.dumps(config | {"seed": 7}))


def test_a_run_of_a_former_version_goes_on_with_its_sampler(tmp_path):
    whole = made(sampler="MPerClassSampler")
    expected = trainer_of(whole).train()
    trainer_of(made(sampler="MPerClassSampler"), tmp_path).train(1)
    of_former_version(tmp_path, whole)
    assert load_run(tmp_path).recipe.settings.sampler == "MPerClassSampler"
    parts = made()
    trainer = trainer_of(parts, tmp_path)
    trainer.resume()
    assert parts.notes["sampler"] == "MPerClassSampler: as in the version that began the training"
    assert [entry["loss"] for entry in trainer.train()] == [entry["loss"] for entry in expected] and same(whole, parts)
    config = read_config(tmp_path)
    assert (config["settings"]["sampler"], config["seed"]) == ("MPerClassSampler", 7)
    with pytest.raises(ValueError, match=r"settings\.sampler: 'MPerClassSampler', got 'ShuffledPassSampler'"):
        trainer_of(made(sampler="ShuffledPassSampler"), tmp_path).resume()


def test_a_checkpoint_of_a_former_version_alone(tmp_path):
    """Without config.json, optimizers are compared."""
    trainer_of(made(sampler="MPerClassSampler"), tmp_path).train(1)
    of_former_version(tmp_path, None)
    (tmp_path / "config.json").unlink()
    for changes, differing in (
        ({"lr": 0.1}, r"initial_lr of trunk_optimizer: 0\.002, got 0\.1"),
        ({"optimizer": "SGD"}, "momentum of trunk_optimizer: none, got 0.9"),
    ):
        with pytest.raises(ValueError, match=differing):
            trainer_of(made(**changes)).resume(tmp_path / "last.pt")
    assert trainer_of(made()).resume(tmp_path / "last.pt") == 1


def test_each_epoch_sees_every_class_by_default():
    seen = []
    trainer = trainer_of(made(batch_size=4), data_and_label_getter=lambda batch: (seen.append(batch[1]), batch)[1])
    trainer.train(1)
    assert isinstance(trainer.sampler, ShuffledPassSampler)
    assert torch.cat(seen).bincount().tolist() == [6, 6, 6, 6]
    given = torch.utils.data.SequentialSampler(LABELS)
    trainer = trainer_of(made(), sampler=given, iterations_per_epoch=2)
    trainer.train(1)
    assert trainer.sampler is given
    assert trainer._config()["sampler"] == "SequentialSampler"
    trainer = trainer_of(made(), iterations_per_epoch=5)
    trainer.train(1)
    assert len(trainer.sampler) == 5 * 8


def test_a_folder_that_holds_another_run(tmp_path):
    """Of other size, and better: its best.pt is not taken for the new one's, and nothing of it is lost."""
    trainer_of(made(width=8), tmp_path, validate=score).train(1)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = made()
    with pytest.warns(UserWarning, match=f"{tmp_path} held another run, which was moved to {tmp_path / 'replaced-1'}"):
        trainer_of(second, tmp_path).train(1)
    assert same(load_run(tmp_path, "cpu").recipe, second)
    assert {path.name: path.read_bytes() for path in (tmp_path / "replaced-1").iterdir()} == first
    assert load_run(tmp_path / "replaced-1").recipe.settings.width == 8
    trainer = trainer_of(made(), tmp_path)
    trainer.resume()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(2)
        trainer.train(3)
    write_config(tmp_path, read_config(tmp_path) | {"data": {"source": "of that run"}})
    with pytest.warns(UserWarning, match="held another run"):
        trainer_of(made(), tmp_path).train(1)
    assert "data" not in read_config(tmp_path) and "data" in read_config(tmp_path / "replaced-2")
    trainer_of(made(), tmp_path / "elsewhere").train(1)
    trainer = trainer_of(made(epochs=4, **STEPS), tmp_path / "elsewhere")  # goes on in a folder of others
    trainer_of(made(**STEPS), tmp_path / "here").train(1)
    trainer.resume(tmp_path / "here" / "last.pt")
    with pytest.warns(UserWarning, match=r"elsewhere held another run, which was moved to .*replaced-1"):
        trainer.train(2)


def test_files_of_two_runs_that_former_versions_have_mixed(tmp_path):
    trainer_of(made(name="cosface"), tmp_path / "a", validate=score).train(1)
    second = made()
    trainer_of(second, tmp_path / "b").train(2)
    os.replace(tmp_path / "a" / "best.pt", tmp_path / "b" / "best.pt")
    with pytest.warns(UserWarning, match=r"best\.pt is of another run than .*last\.pt, which is used instead"):
        run = load_run(tmp_path / "b", "cpu")
    assert run.epoch == 2 and same(run.recipe, second)


@pytest.mark.parametrize("kind", [np.float32, np.array, torch.tensor, float])
def test_metrics_of_any_kind_of_number(kind, tmp_path):
    name = "mean_average_precision_at_r"
    metrics = {np.str_(name): kind(0.25), "count": np.int64(3)}  # a name of NumPy is a string, which no file knows
    trainer = trainer_of(made(), tmp_path, validate=lambda trunk: metrics)
    trainer.train(1)
    assert load_run(tmp_path).epoch == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["count"] == 3
    again = trainer_of(made(), tmp_path)
    again.resume()
    assert again.best[name] == 0.25 and type(again.best[name]) is float


@pytest.mark.parametrize("name", ["epoch", "loss", "seconds", "lr"])
def test_metrics_do_not_take_the_place_of_what_history_has(name, tmp_path):
    trainer = trainer_of(made(), tmp_path, validate=lambda trunk: score(trunk) | {name: 77.0})
    with pytest.raises(ValueError, match=f"validate must not return '{name}', which history has of each epoch"):
        trainer.train(1)
    assert trainer.history[0][name] != 77 and load_run(tmp_path).epoch == 1


def test_metrics_that_are_no_dictionary():
    with pytest.raises(TypeError, match=r"validate must return a dictionary of numbers, got \[0\.5\]"):
        trainer_of(made(), validate=lambda trunk: [0.5]).train(1)


def test_going_on_with_another_metric(tmp_path):
    """The best epoch by the former one counts no longer."""
    trainer_of(made(), tmp_path, validate=score).train(1)
    trainer = trainer_of(made(), tmp_path, validate=lambda trunk: {"p1": 0.1}, metric="p1")
    trainer.resume()
    trainer.train(2)
    assert trainer.best["epoch"] == 2 == load_run(tmp_path).epoch


def test_metrics_that_json_does_not_know(tmp_path):
    trainer = trainer_of(made(), tmp_path, validate=lambda trunk: {"mean_average_precision_at_r": float("nan")})
    with pytest.warns(UserWarning, match="mean_average_precision_at_r of epoch 1 is NaN"):
        trainer.train(1)
    assert '"mean_average_precision_at_r": null' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), "a text", torch.ones(2)])
def test_an_epoch_whose_validation_fails_is_kept(failure, tmp_path):
    """The validation is made up for, and the training ends where one does that has not failed."""
    expected = trainer_of(made(), validate=score).train()

    def fail(trunk):
        if isinstance(failure, Exception):
            raise failure
        return {"mean_average_precision_at_r": failure}

    message = "out of memory|validate must return numbers by name, got 'mean_average_precision_at_r': "
    with pytest.raises((RuntimeError, TypeError), match=message):
        trainer_of(made(), tmp_path, validate=fail).train()
    assert load_run(tmp_path).epoch == 1
    assert not (tmp_path / "metrics.jsonl").exists()
    ended = []
    trainer = trainer_of(made(), tmp_path, validate=score, end_of_epoch_hook=lambda t: ended.append(t.epochs_done))
    assert trainer.resume() == 1
    history = trainer.train()
    assert [{**entry, "seconds": 0} for entry in history] == [{**entry, "seconds": 0} for entry in expected]
    assert ended == [1, 2, 3]
    assert trainer.best["epoch"] == 1 == load_run(tmp_path).epoch


def test_numbers_of_numpy_as_settings(tmp_path):
    numbers = {"width": np.int64(4), "lr": np.float64(0.01), "epochs": torch.tensor(1), "milestones": np.array([2])}
    run = made(**numbers | {"milestones": (np.int64(2),)})
    trainer_of(run, tmp_path).train()
    assert read_config(tmp_path)["settings"]["milestones"] == [2]
    steps = {"schedule": "step", "milestones": (np.int64(1),)}  # a scheduler keeps them as they are
    trainer_of(made(**numbers | steps), tmp_path / "steps").train()
    assert trainer_of(made(**numbers | steps | {"milestones": [1]}), tmp_path / "steps").resume() == 1
    assert type(load_run(tmp_path).recipe.settings.lr) is type(run.settings.width) is float or run.settings.width == 4
    assert trainer_of(made(**numbers | {"milestones": (2,)}), tmp_path).resume() == 1


class Unsavable(nn.Linear):
    def get_extra_state(self):
        return np.float64(1)

    def set_extra_state(self, state):
        pass


def test_what_cannot_be_saved_is_noticed_before_the_first_epoch(tmp_path):
    run, seen = made(), []
    run.trunk.linear = Unsavable(16, 8)
    trainer = trainer_of(run, tmp_path, end_of_iteration_hook=lambda t: seen.append(1))
    with pytest.raises(TypeError, match=r"what is trained must be savable, .*, got trunk with numpy"):
        trainer.train()
    assert not seen
    trainer = trainer_of(made(milestones=(2,)), tmp_path / "b", end_of_iteration_hook=lambda t: seen.append(1))
    trainer.recipe.settings._values["milestones"] = {1, 2}
    with pytest.raises(TypeError, match=r"JSON must be made of numbers, texts, lists and the like, got \{1, 2\}"):
        trainer.train()
    assert not seen


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, pytest.param(partial(torch.compile, backend="eager"), marks=pytest.mark.compiles)]
)
def test_the_network_is_kept_without_its_wrapper(wrap, tmp_path):
    plain = made(warmup_epochs=1)
    expected, wrapped = trainer_of(plain).train(2), made(warmup_epochs=1)
    inner = wrapped.trunk
    wrapped.trunk = wrap(inner)
    trainer = trainer_of(wrapped, tmp_path)
    start = inner.backbone.stage1[0].weight.clone()
    trainer.train(1)
    assert torch.equal(inner.backbone.stage1[0].weight, start)  # new layers warm up
    history = trainer.train(2)
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in expected], rel=1e-6)
    assert load_run(tmp_path).recipe.trunk.state_dict().keys() == plain.trunk.state_dict().keys()
    again = made(warmup_epochs=1)
    again.trunk = wrap(again.trunk)
    assert trainer_of(again, tmp_path).resume() == 2


def test_new_layers_that_are_not_known():
    run = made(warmup_epochs=1)
    run.trunk = nn.Sequential(nn.Flatten(), nn.Linear(144, 8))
    with pytest.raises(
        ValueError, match="warmup_epochs must be 0 for a network whose new layers are not known, got 1 for"
    ):
        trainer_of(run)


def test_fewer_gpus(tmp_path, monkeypatch):
    """Of three states of generators, the one device that is there gets its own."""
    trainer_of(made(), tmp_path).train(1)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["random"]["cuda"] = [torch.full((16,), i, dtype=torch.uint8) for i in range(3)]
    torch.save(state, tmp_path / "last.pt")
    trainer, given = trainer_of(made(), tmp_path), {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, device: given.update({device: int(x[0])}))
    assert trainer.resume() == 1
    assert given == {0: 0}


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_float16_scales_its_gradients(chunk_size, tmp_path):
    """Scaled or not, the step is the same; one that overflows is left out and halves the scale."""
    grads = []
    for scale in (1.0, 256.0):
        run = made(clip_value=1e-3, chunk_size=chunk_size)
        trainer = trainer_of(run, autocast=torch.float16, iterations_per_epoch=1)
        trainer._scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train(1)
        grads.append(run.trunk.linear.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=1e-5)
    assert 0 < grads[1].abs().max() <= 1e-3

    run = made(chunk_size=chunk_size)
    start, trainer = copy.deepcopy(run), trainer_of(run, tmp_path, autocast=torch.float16)
    trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer.train(1)
    assert trainer._scaler.get_scale() == 2.0**37  # three batches
    assert all(torch.equal(x, y) for x, y in zip(run.trunk.parameters(), start.trunk.parameters(), strict=True))
    again = trainer_of(made(chunk_size=chunk_size), tmp_path, autocast=torch.float16)
    again.resume()
    assert again._scaler.get_scale() == 2.0**37
    assert load_run(tmp_path).autocast == torch.float16
    with pytest.raises(
        ValueError, match=r"autocast must be torch\.bfloat16, torch\.float16 or None, got torch\.float32"
    ):
        trainer_of(made(), autocast=torch.float32)


def test_two_trainings_in_one_folder(tmp_path):
    first, refused = trainer_of(made(), tmp_path), []

    def second(trainer):
        import threading

        def train():
            with pytest.raises(ValueError, match=r"a run's folder must be free, got .*, which another process writes"):
                trainer_of(made(), tmp_path).train()
            refused.append(1)

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    first._users_hooks = None, second
    first.train(1)
    assert refused == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "last.pt", "metrics.jsonl"}
    saved = (tmp_path / "last.pt").read_bytes()

    def deletes_the_lock(trainer):
        (tmp_path / "lock.json").unlink(missing_ok=True)

    first._users_hooks = deletes_the_lock, None
    with pytest.raises(ValueError, match=r"a run's folder must stay this process's, got .*, which another"):
        first.train(2)
    assert (tmp_path / "last.pt").read_bytes() == saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autocast": ["bfloat16"]}, r"autocast must be one of bfloat16, float16 or null, got \['bfloat16'\]"),
        ({"autocast": "bogus"}, "autocast must be one of bfloat16, float16 or null, got 'bogus'"),
        ({"settings": {}}, "settings must have 'augmentation', got none"),
        ({"settings": None}, "settings must have 'augmentation', got none"),
        ({"num_classes": "four"}, "must describe a recipe: num_classes must be an integer >= 1, got 'four'"),
        ({"preset": 3}, "must describe a recipe: preset must be one of .*, got 3"),
        ({"recipe": ["x"]}, "must describe a recipe: "),
    ],
)
def test_configurations_that_make_no_sense(changes, message, tmp_path):
    trainer_of(made(), tmp_path).train(1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=rf"config\.json:? {message}") as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_damage_is_named(tmp_path):
    trainer_of(made(), tmp_path).train(1)
    data = bytearray((tmp_path / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(data)
    for read in (lambda: load_run(tmp_path), lambda: trainer_of(made(), tmp_path).resume()):
        with pytest.raises(ValueError, match=r"^cannot read .*last\.pt: its checksum is wrong: it is damaged"):
            read()
    with pytest.raises(ValueError, match="device must hold data, got 'meta'"):
        load_run(tmp_path, "meta")
