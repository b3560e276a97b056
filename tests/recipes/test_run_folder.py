import json
import warnings

import pytest
import torch

from pml_ext.recipes import Trainer, load_run, recipe
from pml_ext.recipes.run_config import describe_run, differences, read_config, write_config
from pml_ext.recipes.run_lock import RunLock

IMAGES = torch.rand(12, 1, 28, 28, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(12) // 4
TINY = {"in_channels": 1, "image_size": 28, "width": 4, "batch_size": 12, "epochs": 2}


def trained(folder, name="proxy_anchor", **kwargs):
    torch.manual_seed(0)
    rows = torch.randn(3, 5) if name == "adaptive_margin" else None
    made = recipe(name, 3, class_embeddings=rows, **TINY)
    Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS), LABELS, folder=folder, **kwargs).train()
    return made


@pytest.mark.parametrize("name", ["proxy_anchor", "adaptive_margin"])
def test_what_a_trainer_keeps_is_loaded(name, tmp_path):
    made = trained(tmp_path, name, autocast=torch.bfloat16)
    run = load_run(tmp_path, device="cpu")
    assert torch.equal(run.recipe.trunk(IMAGES), made.trunk.eval()(IMAGES))
    for key, x in made.loss.state_dict().items():
        assert torch.equal(run.recipe.loss.state_dict()[key], x)
    assert (run.epoch, run.autocast, run.recipe.name) == (2, torch.bfloat16, name)
    assert json.dumps(dict(run.recipe.settings)) == json.dumps(dict(made.settings))


def test_what_the_network_cannot_have_is_told_once(tmp_path):
    """The run keeps what it had in the end: who loads it is not warned again."""
    with pytest.warns(UserWarning, match="masks are left out"):
        made = recipe("recommended", 3, backbone="test_vit", embedding_size=16, **TINY)
    Trainer(made, torch.utils.data.TensorDataset(IMAGES, LABELS), LABELS, folder=tmp_path).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = load_run(tmp_path)
    assert run.config["settings"]["masks"] is False
    assert torch.equal(run.recipe.trunk(IMAGES), made.trunk.eval()(IMAGES))


@pytest.mark.parametrize("best_epoch", [1, 2])
def test_a_best_epoch_that_is_missing_is_told(best_epoch, tmp_path):
    values = iter([0.5, 0.1] if best_epoch == 1 else [0.1, 0.5])
    trained(tmp_path, validate=lambda trunk: {"mean_average_precision_at_r": next(values)})
    assert load_run(tmp_path).epoch == best_epoch
    (tmp_path / "best.pt").unlink()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert load_run(tmp_path).epoch == 2
    message = f"{tmp_path / 'best.pt'} is missing, with epoch 1, the best on validation classes: last.pt"
    assert [str(w.message).partition(", with the last")[0] for w in told] == ([message] if best_epoch == 1 else [])


def test_a_config_that_knows_more_is_kept(tmp_path):
    trained(tmp_path / "first")
    config = read_config(tmp_path / "first") | {"seed": 3}
    config["versions"]["torch"] = "of then"
    write_config(tmp_path / "second", config)  # as ``pml-ext train`` does
    trained(tmp_path / "second")
    assert read_config(tmp_path / "second") == config


def test_the_config_of_another_run_is_not(tmp_path):
    trained(tmp_path)
    write_config(tmp_path, read_config(tmp_path) | {"seed": 3})
    trained(tmp_path, "cosface")
    assert read_config(tmp_path)["recipe"] == "cosface" and "seed" not in read_config(tmp_path)
    load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    trained(tmp_path)
    assert load_run(tmp_path).recipe.name == "proxy_anchor"


def written_by(version_settings, folder):
    """Train, then give the config the settings of a former version."""
    made = trained(folder, "intra_batch")
    config = read_config(folder) | {"seed": 3}
    config["settings"] |= version_settings
    write_config(folder, config)
    return made


def test_a_run_of_a_former_version(tmp_path):
    """Settings that are gone and changed nothing: it is loaded, resumed, and what else its config knows is kept."""
    made = written_by({"similarity_gain": 10.0, "depth": 1}, tmp_path)
    run = load_run(tmp_path, device="cpu")
    assert torch.equal(run.recipe.trunk(IMAGES), made.trunk.eval()(IMAGES))
    assert not {"similarity_gain", "depth"} & set(run.config["settings"])
    again = recipe("intra_batch", 3, **TINY)
    trainer = Trainer(again, torch.utils.data.TensorDataset(IMAGES, LABELS), LABELS, folder=tmp_path)
    assert trainer.resume() == 2
    with RunLock(tmp_path):
        trainer._save(better=False)
    assert read_config(tmp_path)["seed"] == 3


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_a_frozen_batch_norm_that_is_not_there(backbone, tmp_path):
    """The preset "finetune" freezes it; the run says that there is none, and so is loaded and resumed."""
    small = {"preset": "finetune", "backbone": backbone, "pretrained": False, "embedding_size": 16}
    small |= {"in_channels": 1, "image_size": 32, "batch_size": 12, "epochs": 2}
    images = torch.utils.data.TensorDataset(torch.rand(12, 1, 32, 32), LABELS)
    made = recipe("proxy_anchor", 3, **small)
    Trainer(made, images, LABELS, folder=tmp_path).train(1)
    run = load_run(tmp_path, device="cpu")
    assert run.config["settings"]["freeze_batch_norm"] is False
    assert torch.equal(run.recipe.trunk(images.tensors[0]), made.trunk.eval()(images.tensors[0]))
    config = read_config(tmp_path)
    del config["format"]
    config["settings"]["freeze_batch_norm"] = True  # as former versions wrote it
    write_config(tmp_path, config)
    with pytest.warns(UserWarning, match="freeze_batch_norm is left out, this network has no batch norm"):
        load_run(tmp_path, device="cpu")
    again = Trainer(recipe("proxy_anchor", 3, **small), images, LABELS, folder=tmp_path)
    assert again.resume() == 1


def test_masked_learners_of_a_former_version_pool_by_the_average(tmp_path):
    """They did, on networks of timm, whatever ``pool_type`` said."""
    small = TINY | {"backbone": "test_resnet", "embedding_size": 16, "image_size": 64}
    images = torch.utils.data.TensorDataset(torch.rand(12, 1, 64, 64), LABELS)
    made = recipe("attention_ensemble", 3, **small)
    Trainer(made, images, LABELS, folder=tmp_path).train(1)
    config = read_config(tmp_path)
    del config["format"]
    config["settings"]["pool_type"] = "max"
    write_config(tmp_path, config)
    run = load_run(tmp_path, device="cpu")
    assert torch.equal(run.recipe.trunk(images.tensors[0]), made.trunk.eval()(images.tensors[0]))
    assert run.recipe.settings.pool_type == "avg"
    write_config(tmp_path, config | {"format": 2})
    assert load_run(tmp_path, device="cpu").recipe.settings.pool_type == "max"


def test_a_run_of_recommended_without_proxy_anchor(tmp_path):
    made = trained(tmp_path, "recommended")
    config = read_config(tmp_path)
    del config["format"], config["settings"]["anchor_weight"]
    config["settings"] |= {"num_learners": 1, "masks": True}
    write_config(tmp_path, config)
    read = read_config(tmp_path)["settings"]
    assert (read["anchor_weight"], read["masks"]) == (0.0, False)
    config["settings"] |= {"num_learners": 4}
    write_config(tmp_path, config)
    assert torch.equal(load_run(tmp_path).recipe.trunk(IMAGES), made.trunk.eval()(IMAGES))


def test_a_run_of_recommended_without_mining_goes_on_without(tmp_path):
    made = recipe("recommended", 3, preset="finetune", backbone="test_resnet", pretrained=False)
    assert made.loss.pair_loss.epsilon == 0.1
    old = describe_run(made)
    del old["settings"]["epsilon"]
    write_config(tmp_path, old)
    assert read_config(tmp_path)["settings"]["epsilon"] is None
    assert differences(old, describe_run(made)) == ["settings.epsilon: None, got 0.1"]
    same = recipe("recommended", 3, preset="finetune", backbone="test_resnet", pretrained=False, epsilon=None)
    assert differences(old, describe_run(same)) == []


def test_what_differs_from_a_run_of_a_former_version():
    """What the network could not have is no difference; a pooling that did not act is that which did."""
    made = recipe("attention_ensemble", 3, **TINY | {"backbone": "test_resnet", "image_size": 64})
    now = describe_run(made)
    before = {name: value for name, value in now.items() if name != "format"}
    before["settings"] = now["settings"] | {"freeze_batch_norm": True, "pool_type": "max"}
    assert differences(before, now) == []
    now["settings"] = now["settings"] | {"pool_type": "max"}
    assert differences(before, now) == ["settings.pool_type: 'avg', got 'max'"]
    assert differences(before | {"format": 2}, now) == ["settings.freeze_batch_norm: True, got False"]
    old = describe_run(recipe("recommended", 3, **TINY))
    assert differences({name: x for name, x in old.items() if name != "format"}, old) == []
    del old["format"], old["settings"]["anchor_weight"]
    assert differences(old, describe_run(recipe("recommended", 3, **TINY))) == []


def test_a_run_with_what_is_gone(tmp_path):
    written_by({"depth": 2}, tmp_path)
    with pytest.raises(ValueError, match="the setting 'depth' no longer exists and must have been 1, got 2"):
        load_run(tmp_path)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a run's folder must hold config\.json, got .* without"):
        load_run(tmp_path)
    write_config(tmp_path, {"recipe": "proxy_anchor"})
    with pytest.raises(FileNotFoundError, match=r"a run's folder must hold config\.json, got the file .*config\.json$"):
        load_run(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json must have 'num_classes', got none"):
        load_run(tmp_path)
    trained(tmp_path)
    config = read_config(tmp_path)
    config["settings"]["width"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"last\.pt must hold the network of config\.json, got another"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="device must be available, got 'nowhere'"):
        load_run(tmp_path, device="nowhere")
    (tmp_path / "last.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold best\.pt or last\.pt"):
        load_run(tmp_path)
