"""``pml-ext train``: on any data; and what embeds and searches with its run."""

import json
import os
import re
import shutil
import struct
import sys
import zlib
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pml_ext import recipes
from pml_ext.commands import embed, index, opened_data, parser, search, train
from pml_ext.commands.main import main
from pml_ext.commands.tables import METRICS
from pml_ext.datasets import ImageReader, open_data
from pml_ext.datasets.sources import opens_folder
from pml_ext.recipes import load_run, retrieval_metrics
from pml_ext.visualization import retrieval_gallery
from tests.datasets.test_image_reader import write_png
from tests.datasets.test_in_shop import make_in_shop
from tests.processes import run_scripts

pytestmark = pytest.mark.xdist_group("commands")  # they share a trained network

CLASSES, EACH, SIDE = 8, 6, 28
MAIN = Path(recipes.__file__).parents[1] / "__main__.py"
TINY = {"width": 4, "batch_size": 16}


def make_images():
    """A coarse pattern for each class, with noise: what a network can learn in an epoch or two."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (CLASSES, 7, 7)).repeat(4, 1).repeat(4, 2)
    labels = np.arange(CLASSES).repeat(EACH)
    return (coarse[labels] + rng.integers(0, 56, (len(labels), SIDE, SIDE))).astype(np.uint8), labels


def write_folder(folder):
    for i, (image, label) in enumerate(zip(*make_images(), strict=True)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{label}" / f"{i:02}.png")
    return folder


def write_npz(path, **changes):
    images, labels = make_images()
    rows = np.random.default_rng(1).normal(size=(CLASSES, 5))
    np.savez(path, **({"images": images, "labels": labels, "class_embeddings": rows} | changes))
    return path


def run(data, out, recipe="proxy_anchor", pictures=False, **changes):
    """Train; without pictures, whose drawing takes ten times as long as the training."""
    common = {"epochs": 2, "settings": TINY, "validation_classes": 2, "device": "cpu"}
    with ExitStack() as stack:
        for name in () if pictures else ("draw_curves", "draw_gallery", "write_run_report"):
            stack.enter_context(mock.patch.object(train, name))
        result = train.main(data, out, recipe, **(common | changes))
    return {name: x for name, x in result.items() if name not in ("out", "baseline")}


def embed_folder(run, images, out=None, **kwargs):
    embed.main(run, images, out, **kwargs)
    written = index.read_index(Path(run) / "index" if out is None else Path(out))
    return written.embeddings.numpy(), written.paths


def found(*args, **kwargs):
    return [(result["similarity"], result["path"]) for result in search.main(*args, **kwargs)["results"]]


def lines(folder, without=("seconds",)):
    """What metrics.jsonl holds, but for the time."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in entry.items() if name not in without} for entry in entries]


def weights(folder, name):
    return torch.load(folder / name, weights_only=True)["trunk"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def scripted_scores(monkeypatch, scores):
    """Let the validation of one epoch after the other find these scores."""
    scores = iter(scores)

    def scripted(embedded):
        return opened_data.metrics_of(embedded) | {"mean_average_precision_at_r": next(scores)}

    monkeypatch.setattr(train, "metrics_of", lambda x, *m: opened_data.metrics_of(x, *m) if m else scripted(x))
    monkeypatch.setattr(train, "measure_baseline", lambda *args: {"title": "raw", "test": {"precision_at_1": 0.12}})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_npz(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run on the folder; the tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "deeper" / "photos"
    return folder, run(photos, folder, recipe="mhgl", pictures=True)


def test_what_a_run_leaves(trained, photos):
    folder, result = trained
    names = {"config.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png", "gallery.png", "report.html"}
    assert {path.name for path in folder.iterdir()} - {"index", "search.png"} == names
    for name in ("curves.png", "gallery.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    *epochs, last = lines(folder)
    assert [entry["epoch"] for entry in epochs] == [1, 2]
    assert all({"loss", "lr", *recipes.METRICS} <= set(entry) for entry in epochs)
    assert last == result
    assert set(result) == {"split", "epoch", *METRICS}
    assert result["precision_at_1"] > 0.5  # 0.2 by chance
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["image_size"] == SIDE  # of the images; the preset has 32
    assert config["data"]["images"] == {"train": 12, "validation": 12, "test": 24}
    assert (config["recipe"], config["num_classes"], config["seed"]) == ("mhgl", 2, 0)
    assert config["data"]["source"] == str(photos)


def test_the_config_builds_the_run_again(trained, photos):
    folder, result = trained
    loaded = load_run(folder, "cpu")
    opened = open_data(photos)
    opened.test.transform = loaded.recipe.transforms.test
    metrics = retrieval_metrics(*recipes.embed(loaded.recipe.trunk, opened.test), metrics=tuple(METRICS))
    assert metrics == {name: result[name] for name in METRICS}
    assert loaded.epoch == result["epoch"]
    assert dict(loaded.recipe.settings) | {"milestones": []} == loaded.config["settings"]
    assert same(loaded.recipe.trunk.state_dict(), weights(folder, "best.pt"))
    assert not loaded.recipe.trunk.training


@pytest.mark.trains
def test_resume_ends_where_an_uninterrupted_run_does(data, tmp_path, monkeypatch, capsys):
    whole = run(data, tmp_path / "whole", epochs=3)
    validations = []

    def killed(*args, **kwargs):
        validations.append(1)
        if len(validations) == 2:  # within epoch 2, before it is saved
            raise KeyboardInterrupt
        return opened_data.metrics_of(*args, **kwargs)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(train, "metrics_of", killed)
        patch.setattr(train, "measure_baseline", lambda *args: {"title": "none"})
        with pytest.raises(KeyboardInterrupt):
            run(data, parts, epochs=3)
    assert len(lines(parts)) == 1
    np.random.rand(7), torch.rand(7)  # noqa: NPY002 (the generators stand elsewhere in another process)
    assert run(data, parts, epochs=3, resume=True) == whole
    assert lines(parts) == lines(tmp_path / "whole")
    assert same(weights(parts, "last.pt"), weights(tmp_path / "whole", "last.pt"))
    assert "nothing is trained" not in capsys.readouterr().out
    assert run(data, parts, epochs=3, resume=True) == whole
    assert "all 3 epochs are done: nothing is trained (more: --epochs)" in capsys.readouterr().out
    assert lines(parts) == lines(tmp_path / "whole")


@pytest.mark.trains
def test_a_run_killed_between_its_two_checkpoints(data, tmp_path, monkeypatch):
    """The second epoch is the best; its files are the fourth, before validation, the fifth and the sixth."""
    scripted_scores(monkeypatch, [0.1, 0.9])
    replace, replaced = os.replace, []

    def killed(source, target):
        if target.suffix == ".pt":
            replaced.append(target.name)
            if len(replaced) == 6:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path, epochs=3)
    assert replaced == ["last.pt", "best.pt", "last.pt"] * 2
    scripted_scores(monkeypatch, [0.9, 0.3])
    assert run(data, tmp_path, epochs=3, resume=True)["epoch"] == 2
    assert [entry["epoch"] for entry in lines(tmp_path)] == [1, 2, 3, 2]


@pytest.mark.trains
def test_resume_of_a_run_killed_in_its_first_epoch(data, tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "a")
    assert run(data, tmp_path / "a", resume=True) == run(data, tmp_path / "b")


@pytest.mark.trains
def test_a_run_killed_in_its_first_epoch_begins_again_with_its_weights(photos, tmp_path, monkeypatch):
    run(photos, tmp_path / "first", epochs=1)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run(photos, tmp_path / "a", weights=str(tmp_path / "first"), split_seed=1)
    expected = run(photos, tmp_path / "b", weights=str(tmp_path / "first"), split_seed=1)
    assert run(photos, tmp_path / "a", resume=True, split_seed=1) == expected
    assert same(weights(tmp_path / "a", "last.pt"), weights(tmp_path / "b", "last.pt"))
    run(photos, tmp_path / "a", epochs=3, resume=True, split_seed=1)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["start"] == {"weights": str(tmp_path / "first"), "pretrained": False}


@pytest.mark.trains
def test_a_split_is_not_drawn_where_there_is_one(photos, tmp_path, capsys):
    for part, names in (("train", "0123"), ("test", "4567")):
        for name in names:
            shutil.copytree(photos / f"class{name}", tmp_path / "split" / part / f"class{name}")
    for data, asked, told in ((photos, 3, False), (tmp_path / "split", 0.5, False), (tmp_path / "split", 3, True)):
        run(data, tmp_path / f"run-{told}-{asked}-{data.name}", epochs=1, test_classes=asked)
        warned = "warning: --test-classes and --split-seed change nothing, since DATA has a split"
        assert (warned in capsys.readouterr().err) == told


@pytest.mark.trains
def test_a_network_that_knows_test_classes(photos, tmp_path, capsys):
    run(photos, tmp_path / "first", epochs=1)
    copied, first = shutil.copytree(photos, tmp_path / "copied"), tmp_path / "first"
    for data in (photos, copied):
        for split_seed in (0, 1):
            out = tmp_path / f"{data.name}-{split_seed}"
            run(data, out, epochs=1, weights=str(first), split_seed=split_seed)
            told = f"of the images that the network of {first} was trained on are among the test images"
            assert (told in capsys.readouterr().err) == (split_seed == 1)


@pytest.mark.trains
def test_a_network_that_knows_test_classes_of_arrays(data, tmp_path, capsys):
    run(data, tmp_path / "first", epochs=1)
    for split_seed in (0, 1):
        run(data, tmp_path / str(split_seed), epochs=1, weights=str(tmp_path / "first"), split_seed=split_seed)
        told = "may have been trained on some of the test classes, which were others then" in capsys.readouterr().err
        assert told == (split_seed == 1)


@pytest.mark.trains
@pytest.mark.parametrize("recipe", ["proxy_anchor", "adaptive_margin"])
def test_class_embeddings_that_a_recipe_does_not_use(recipe, photos, tmp_path, capsys):
    run(photos, tmp_path, recipe, epochs=1, class_embeddings="names")
    told = "warning: the recipe proxy_anchor makes no use of --class-embeddings" in capsys.readouterr().err
    assert told == (recipe == "proxy_anchor")


@pytest.mark.trains
def test_a_run_of_a_former_version_keeps_its_test_classes(photos, tmp_path, monkeypatch):
    """It tested on the last classes, and kept nothing of a seed that draws them."""
    run(photos, tmp_path / "new", epochs=1)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["data"]["split_seed"] == 0
    with pytest.raises(ValueError, match=r"--resume must go on with the data\.split_seed of config\.json, 0, got 1"):
        run(photos, tmp_path / "new", epochs=2, resume=True, split_seed=1)
    run(photos, tmp_path / "old", epochs=1, split_seed=None)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert config["data"].pop("split_seed") is None
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    run(photos, tmp_path / "old", epochs=2, resume=True)
    fingerprints = load_run(tmp_path / "old", "cpu").config["data"]["fingerprints"]
    assert fingerprints == train.fingerprints(open_data(photos, split_seed=None))


@pytest.mark.trains
def test_seeds(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(data, tmp_path / name, seed=seed, epochs=1, validation_classes=0)  # whose choice depends on the seed, too
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a")[0]["loss"] != lines(tmp_path / "c")[0]["loss"]
    first, again, other = (load_run(tmp_path / name).checksum for name in "abc")
    assert first == again != other


@pytest.mark.trains
def test_validation_chooses_the_epoch(data, tmp_path, monkeypatch):
    scripted_scores(monkeypatch, [0.1, 0.9, 0.3])
    result = run(data, tmp_path, epochs=3)
    assert result["epoch"] == 2
    assert not same(weights(tmp_path, "best.pt"), weights(tmp_path, "last.pt"))
    opened = open_data(data)
    loaded = load_run(tmp_path, "cpu")
    opened.test.transform = loaded.recipe.transforms.test
    tested, others = {}, {}
    for state, metrics in ((weights(tmp_path, "best.pt"), tested), (weights(tmp_path, "last.pt"), others)):
        loaded.recipe.trunk.load_state_dict(state)
        metrics |= retrieval_metrics(*recipes.embed(loaded.recipe.trunk, opened.test), metrics=tuple(METRICS))
    assert {name: result[name] for name in METRICS} == tested != others


@pytest.mark.trains
def test_without_validation_the_last_epoch_is_tested(data, tmp_path):
    result = run(data, tmp_path, validation_classes=0)
    assert (result["epoch"], (tmp_path / "best.pt").exists()) == (2, False)
    assert same(load_run(tmp_path).recipe.trunk.cpu().state_dict(), weights(tmp_path, "last.pt"))
    assert set(lines(tmp_path)[0]) == {"epoch", "loss", "lr"}
    assert load_run(tmp_path).config["num_classes"] == 4


@pytest.mark.trains
@pytest.mark.parametrize(("test_classes", "images"), [(4, [12, 12, 24]), (5, [18, 0, 30])])
def test_validation_classes_unless_there_are_too_few(test_classes, images, photos, tmp_path, capsys):
    run(photos, tmp_path, test_classes=test_classes, validation_classes=None, epochs=1)
    few = "the last epoch is kept, since there are no validation classes: 3 training classes are too few"
    assert (few in capsys.readouterr().out.splitlines()) == (test_classes == 5)
    config = load_run(tmp_path).config["data"]
    assert [config["images"][name] for name in ("train", "validation", "test")] == images
    assert config["validation_classes"] == (0.2 if test_classes == 4 else 0)
    assert (tmp_path / "best.pt").exists() == (test_classes == 4)


@pytest.mark.trains
def test_what_a_run_prints(data, tmp_path, monkeypatch, capsys):
    scripted_scores(monkeypatch, [0.9, 0.3])
    result = run(data, tmp_path / "a")
    printed = capsys.readouterr().out.splitlines()
    first, second, _ = lines(tmp_path / "a")
    assert re.fullmatch(r"proxy_anchor: convnet, 28 x 28 pixels, 0\.0 million parameters", printed[0])
    assert printed[1:-4] == [
        "12 images of 2 classes to train, 12 images of 2 classes to validate, 24 images of 4 classes to test",
        "2 steps in 2 epochs, in batches of 8 images",
        f"epoch 1/2: loss {first['loss']:.3g}, validation P@1 {100 * first['precision_at_1']:.1f}, MAP@R 90.0",
        f"epoch 2/2: loss {second['loss']:.3g}, validation P@1 {100 * second['precision_at_1']:.1f}, MAP@R 30.0",
    ]
    assert printed[-4].split() == ["test", "classes,", "percent", "P@1", "R-precision", "MAP@R", "NMI"]
    assert printed[-3].split() == ["raw", "12.0"]
    row = "epoch 1 of 2 (best on validation classes)"
    assert printed[-2].startswith(row)
    assert printed[-2][len(row) :].split() == [f"{100 * result[name]:.1f}" for name in METRICS]
    assert (
        printed[-1]
        == f"network, metrics and pictures: {tmp_path / 'a'}, {tmp_path / 'a' / 'report.html'} to open in a browser"
    )
    run(data, tmp_path / "b", validation_classes=0, epochs=1)
    printed = capsys.readouterr().out.splitlines()
    assert printed[3] == "the last epoch is kept, since there are no validation classes"
    assert printed[4] == f"epoch 1/1: loss {lines(tmp_path / 'b')[0]['loss']:.3g}"
    assert printed[-2].startswith("epoch 1 of 1 (the last) ")


@pytest.mark.trains
def test_no_class_is_seen_twice(tmp_path, monkeypatch):
    """Images of class c have the value 10 c everywhere."""
    _, labels = make_images()
    images = (10 * labels)[:, None, None].repeat(8, 1).repeat(8, 2).astype(np.uint8)
    np.savez(tmp_path / "flat.npz", images=images, labels=labels)
    seen = {"trained": [], "embedded": []}

    def values(view):
        return {int(view.dataset[int(i)][0].max()) // 10 for i in view.indices}

    def watched(trunk, view, **kwargs):
        seen["embedded"].append(values(view))
        return recipes.embed(trunk, view, **kwargs)

    def trainer(made, view, **kwargs):
        seen["trained"].append(values(view))
        return recipes.Trainer(made, view, **kwargs)

    monkeypatch.setattr(opened_data, "embed", watched)
    monkeypatch.setattr(train, "Trainer", trainer)
    run(tmp_path / "flat.npz", tmp_path / "run", test_classes=3, split_seed=None)
    untrained, before, validation, again, test = seen["embedded"]
    assert before == test == {5, 6, 7}  # before the training, and once, at the end
    assert untrained == validation == again
    assert len(validation) == 2
    assert seen["trained"] == [set(range(5)) - validation]


def test_queries_search_the_gallery(tmp_path):
    """Query, gallery and training images of In-Shop."""
    rows = [f"img/id_{c}/{i}.png id_{c} {s}" for c in range(5) for i, s in enumerate(["train"] * 3)]
    rows += [f"img/id_{c}/{i}.png id_{c} {s}" for c in (5, 6, 7) for i, s in enumerate(["query", "gallery", "gallery"])]
    root = make_in_shop(tmp_path / "shop", rows=rows)
    result = run("in_shop", tmp_path / "run", root=root, epochs=1, pictures=True)
    loaded, opened = load_run(tmp_path / "run", "cpu"), open_data("in_shop", root=tmp_path / "shop")
    opened.test.transform = opened.gallery.transform = loaded.recipe.transforms.test
    query, gallery = (recipes.embed(loaded.recipe.trunk, view) for view in (opened.test, opened.gallery))
    metrics = retrieval_metrics(*query, gallery, metrics=tuple(METRICS))
    assert metrics == {name: result[name] for name in METRICS}
    assert (tmp_path / "run" / "gallery.png").exists()


def test_a_gallery_of_some_images():
    images = (torch.arange(4)[:, None, None] * 50).expand(4, 4, 4).to(torch.uint8)
    angles = torch.arange(4) / 4
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    figure = retrieval_gallery(embeddings, torch.arange(4), images, queries=[0, 1], searched=[2, 3])
    shown = [int(axes.images[0].get_array().flat[0]) // 50 for axes in figure.axes]
    assert shown == [0, 2, 3, 1, 2, 3]


@pytest.mark.trains
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe(name, data, tmp_path):
    result = run(data, tmp_path, recipe=name, epochs=1, embedding_size=16)
    assert all(0 <= result[metric] <= 1 for metric in METRICS)
    state = torch.load(tmp_path / "best.pt", weights_only=True)["loss"]
    loaded = load_run(tmp_path, "cpu").recipe.loss.state_dict()
    assert same(loaded, state)
    assert set(loaded) == set(state)
    assert ("class_embeddings" in state) == (name == "adaptive_margin")


@pytest.mark.trains
def test_options(data, tmp_path):
    settings = TINY | dict([parser.setting("warmup_epochs=1"), parser.setting("clip_value=0.5")])
    given = {"backbone": "resnet10t", "image_size": 16, "chunk_size": 6, "autocast": "bfloat16", "workers": 1}
    result = run(data, tmp_path, **given, settings=settings)
    loaded = load_run(tmp_path, "cpu")
    assert (loaded.autocast, loaded.recipe.settings.image_size) == (torch.bfloat16, 16)
    set_ = loaded.recipe.settings
    assert (set_.backbone, set_.clip_value, set_.chunk_size) == ("resnet10t", 0.5, 6)
    opened = open_data(data)
    opened.test.transform = loaded.recipe.transforms.test
    metrics = retrieval_metrics(*recipes.embed(loaded.recipe.trunk, opened.test, autocast=torch.bfloat16))
    assert metrics == {name: result[name] for name in metrics}


@pytest.mark.parametrize(("size", "side"), [((28, 28), 28), ((30, 20), 32), ((105, 9), 64), ((3, 5), 8)])
def test_side_of_small_images(size, side):
    assert train.side_of(Image.new("L", size)) == side
    assert train.side_of(torch.zeros(1, *size)) == side


def test_embed_and_search(trained, photos, tmp_path, capsys):
    folder, _ = trained
    embeddings, paths = embed_folder(folder, photos, device="cpu", batch_size=10)
    place = folder / "index"
    assert {path.name for path in place.iterdir()} == {"embeddings.npy", "paths.txt", "index.faiss", "index.json"}
    assert (place / "paths.txt").read_text().splitlines() == paths
    assert paths == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    written = np.load(place / "embeddings.npy")
    assert (written.dtype, written.shape) == (np.float32, (CLASSES * EACH, 64))
    np.testing.assert_array_equal(written, embeddings)
    np.testing.assert_allclose(np.linalg.norm(written, axis=1), 1, rtol=1e-5)
    origin = json.loads((place / "index.json").read_text())
    assert (origin["folder"], origin["images"]) == (str(photos), CLASSES * EACH)
    capsys.readouterr()
    for path in ("class0/03.png", "class3/20.png", "class7/47.png"):
        results = found(folder, photos / path, k=3, out=tmp_path / "found" / "search.png", device="cpu")
        assert len(results) == 3
        assert results[0] == (pytest.approx(1, abs=1e-5), path)
        assert results[0][0] > results[1][0] >= results[2][0]
        row = embeddings[paths.index(path)]
        assert [value for value, _ in results] == pytest.approx(np.sort(embeddings @ row)[:-4:-1].tolist(), abs=1e-5)
        printed = capsys.readouterr().out.splitlines()
        assert printed[1].split() == ["1", "1.0000", path]
    assert (tmp_path / "found" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert len(found(folder, photos / "class0/03.png", k=1000, out=tmp_path / "all.png")) == CLASSES * EACH


def test_the_picture_of_a_search(photos, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    files = sorted(photos.rglob("*.png"))[:13]
    search.draw(files[0], [(0.5, file) for file in files[1:]], tmp_path / "search.png", ImageReader())
    axes = [axis for axis in drawn[0].axes if axis.images]
    titles = ["query", *(f"{rank}: 0.500" for rank in range(1, 13))]
    names = [f"{file.parent.name}/{file.name}" for file in files]
    assert [axis.get_title() for axis in axes] == [f"{a}\n{b}" for a, b in zip(titles, names, strict=True)]
    assert search._end_of("a$b/a name that is too long.png") == "...is too long.png"
    assert search._end_of(os.fsdecode(b"a$/\xe9.png")) == r"a\$/?.png"
    for axis, file in zip(axes, files, strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array()[..., 0], np.asarray(Image.open(file)))


def test_skip_broken(trained, tmp_path, capsys):
    folder, _ = trained
    photos = write_folder(tmp_path / "photos")
    for name in ("class2/13.png", "class5/31.png"):
        (photos / name).write_bytes(b"no image")
    with pytest.raises(
        ValueError,
        match=r"cannot read 2 of 48 images \(--skip-broken: leave them out\): .*class2/13\.png, .*31\.png; the first",
    ):
        embed_folder(folder, photos, tmp_path / "index", device="cpu")
    embeddings, paths = embed_folder(folder, photos, tmp_path / "index", skip_broken=True, device="cpu")
    both = ", ".join(str(photos / name) for name in ("class2/13.png", "class5/31.png"))
    assert capsys.readouterr().err.splitlines()[-1] == f"warning: skipped 2 of 48 images that cannot be read: {both}"
    assert len(embeddings) == len(paths) == 46
    assert not {"class2/13.png", "class5/31.png"} & set(paths)
    for query in ("class2/14.png", "class7/47.png"):
        results = found(folder, photos / query, 1, tmp_path / "index", tmp_path / "found.png", "cpu")
        assert results == [(pytest.approx(1, abs=1e-5), query)]
    for path in photos.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="must have at least one image that can be read, got 48 that cannot"):
        embed_folder(folder, photos, tmp_path / "index", skip_broken=True)


@pytest.mark.trains
def test_broken_images_are_found_before_the_training(tmp_path, capsys):
    photos, out = write_folder(tmp_path / "photos"), tmp_path / "run"
    names = ["class0/00.png", "class1/06.png", "class2/13.png", "class3/18.png", "class5/31.png", "class7/47.png"]
    broken = [photos / name for name in names]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    five = ", ".join(map(str, broken[:5]))
    with pytest.raises(ValueError, match="cannot read") as error:
        run(photos, out, split_seed=None)
    assert str(error.value).startswith(
        f"cannot read 6 of 48 images (--skip-broken: leave them out): {five} and 1 more; "
    )
    assert not out.exists()
    result = run(photos, out, skip_broken=True, split_seed=None)
    assert f"warning: skipped 6 of 48 images that cannot be read: {five} and 1 more" in capsys.readouterr().err
    counts = load_run(out).config["data"]["images"]
    assert (counts["train"] + counts["validation"], counts["test"]) == (20, 22)
    for path in broken:
        path.unlink()
    assert run(photos, out, resume=True, split_seed=None) == result


@pytest.mark.trains
def test_resume_with_more_epochs_and_without_a_file_that_broke(tmp_path, monkeypatch, capsys):
    photos, out = write_folder(tmp_path / "photos"), tmp_path / "run"
    given = [
        photos,
        "--recipe",
        "triplet",
        "--preset",
        "small",
        "--out",
        out,
        "--validation-classes",
        0,
        "--device",
        "cpu",
    ]
    given += ["--set", "width=4", "batch_size=16", "--resume", "--epochs"]
    run(photos, out, recipe="triplet", validation_classes=0, epochs=1, settings=TINY | {"schedule": "step"})
    given += [2, "--set", "schedule=step"]
    (photos / "class1" / "09.png").write_bytes(b"no image")
    assert "--skip-broken: leave them out" in command("train", given, capsys)[1]
    os.rename(photos / "class2" / "12.png", photos / "class2" / "99.png")
    message = (
        "pml-ext train: error: DATA must have the images that the run began with, got other files or labels for train "
    )
    assert command("train", [*given, "--skip-broken"], capsys)[1].startswith(message)
    os.rename(photos / "class2" / "99.png", photos / "class2" / "12.png")
    (out / "lock.json").write_text(json.dumps({"process": 7, "host": "elsewhere", "since": "noon"}))
    message = (
        f"pml-ext train: error: --out must be free, got {out}, which another process writes to (process 7 on elsewhere"
    )
    assert command("train", [*given, "--skip-broken"], capsys)[1].startswith(message)
    (out / "lock.json").unlink()
    changes = {"validation_classes": 0, "settings": TINY | {"schedule": "step"}, "resume": True}
    run(photos, out, recipe="triplet", epochs=2, skip_broken=True, **changes)
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["left_out"] == ["train/class1/09.png"] and config["data"]["images"]["train"] == 23
    assert config["resumed"] == [{"epoch": 1, "epochs": [1, 2]}] and config["settings"]["epochs"] == 2
    assert [entry["epoch"] for entry in lines(out)] == [1, 2, 2]
    assert not list(out.glob("*lock*"))
    given[given.index("--epochs") + 1] = 1
    status, line = command("train", given, capsys)  # the file stays left out
    assert (status, line.startswith("pml-ext train: error: --epochs must be >= 2, which ")) == (2, True)


@pytest.mark.trains
def test_resume_with_a_changed_image(tmp_path, capsys):
    """Of training, validation or test: figures of other images could not be compared with the former ones."""
    photos, out = write_folder(tmp_path / "photos"), tmp_path / "run"
    run(photos, out, recipe="triplet", validation_classes=2, epochs=1, settings=TINY | {"schedule": "step"})
    given = [photos, "--recipe", "triplet", "--preset", "small", "--out", out, "--validation-classes", 2, "--device"]
    given += ["cpu", "--resume", "--epochs", 2, "--set", "width=4", "batch_size=16", "schedule=step"]
    named = set()
    for folder in sorted(photos.iterdir()):
        path = sorted(folder.iterdir())[0]
        before = path.read_bytes()
        Image.new("L", (90, 90), 7).save(path)
        status, line = command("train", given, capsys)
        start = "pml-ext train: error: DATA must have the images that the run began with, got files of other sizes for "
        assert status == 2 and line.startswith(start)
        named.add(line.removeprefix(start).split()[0])
        path.write_bytes(before)
    assert named == {"train", "test"}
    assert len(lines(out)) == 2  # nothing was trained
    run(
        photos, out, recipe="triplet", validation_classes=2, epochs=2, resume=True, settings=TINY | {"schedule": "step"}
    )
    assert [entry["epoch"] for entry in lines(out)][:2] == [1, 2]


def test_broken_images_of_a_gallery(tmp_path):
    """Files lie elsewhere in each of the three lists."""
    rows = [f"img/id_{c}/{i}.png id_{c} train" for c in range(3) for i in range(3)]
    rows += [f"img/id_{c}/{i}.png id_{c} {s}" for c in (5, 6) for i, s in enumerate(["query", "gallery", "gallery"])]
    make_in_shop(tmp_path, rows=rows)
    next(tmp_path.rglob("id_5/2.png")).write_text("no image")
    opened = open_data("in_shop", root=tmp_path)
    with pytest.raises(ValueError, match=r"cannot read 1 of 15 images .*id_5/2\.png; the first: cannot identify"):
        opened_data.readable_part(opened, False)
    kept = opened_data.readable_part(opened, True)
    assert [len(view) for view in (kept.train, kept.test, kept.gallery)] == [9, 2, 3]
    assert kept.gallery.labels.tolist() == [0, 1, 1]
    assert [image.size for image, _ in kept.gallery] == 3 * [opened.train[0][0].size]
    assert len(opened.gallery) == 4


def test_an_index_of_another_network(trained, photos, tmp_path):
    folder, _ = trained
    embed_folder(folder, photos, tmp_path / "index")
    origin = json.loads((tmp_path / "index" / "index.json").read_text())
    assert origin["weights"] == load_run(folder).checksum
    (tmp_path / "index" / "index.json").write_text(json.dumps(origin | {"weights": "0"}))
    with pytest.raises(ValueError, match="--index must be made with the network of RUN"):
        found(folder, photos / "class0/03.png", index=tmp_path / "index")


def command(name, arguments, capsys):
    """Run a command as a program does; return the exit status and the last line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([name, *map(str, arguments)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return stopped.value.code, error.splitlines()[-1]


def bad_data(kind, folder):
    images, labels = make_images()
    if kind == "empty folder":
        folder.mkdir()
        return folder
    if kind == "one class":
        (folder / "a").mkdir(parents=True)
        Image.fromarray(images[0]).save(folder / "a" / "0.png")
        return folder
    if kind == "no npz":
        folder.with_suffix(".npz").write_text("text")
        return folder.with_suffix(".npz")
    changes = {"shape": {"images": images[:, :, None, :2]}, "labels": {"labels": labels[1:]}, "plain": {}}
    changes |= {"no rows": {"class_embeddings": np.zeros((3, 2))}, "floats": {"images": images / 255}}
    return write_npz(folder.with_suffix(".npz"), **changes[kind])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("missing/toy.npz", "", "error: DATA must exist, got missing/toy.npz"),
        ("cub", "", "error: --root must be the folder of cub, got None"),
        ("empty folder", "", "error: DATA must have a sub-folder for each class, got "),
        ("one class", "", "must have >= 3 classes, 2 of them to train with, got 1"),
        ("no npz", "", "cannot read "),
        ("shape", "", "images must have shape (N, H, W) or (N, H, W, 3), got (48, 28, 1, 2)"),
        ("floats", "", "images must have dtype uint8, got float64"),
        ("labels", "", "labels must have one entry for each of 48 images, got shape (47,)"),
        ("no rows", "", "error: --class-embeddings must have 8 rows"),
        ("plain", "--recipe proxy", "error: --recipe must be one of recommended, "),
        ("plain", "--backbone resnet1", "error: --backbone must be a timm model such as resnet1"),
        ("plain", "--preset big", "error: --preset must be one of small, finetune, paper:cub, "),
        ("plain", "--set widths=3", "error: --set must be one of the recipe's settings, such as width"),
        ("plain", "--set lr=0.1 lr=0.2", "error: --set must name a setting once, got lr more than once"),
        ("plain", "--set lr=0.1 --set width=4 --set lr=0.2", "error: --set must name a setting once, got lr more"),
        ("plain", "--set lr=fast", "lr must be a number, such as 0.002, got 'fast'"),
        ("plain", "--set schedule=3", "schedule must be a name, such as 'cosine', got 3"),
        ("plain", "--set freeze_batch_norm=yes", "freeze_batch_norm must be True or False, such as False, got 'yes'"),
        ("plain", "--set milestones=ten", "milestones must be a list, such as (), got 'ten'"),
        ("plain", "--set width", "must be name=value, got 'width'"),
        ("plain", "--set epochs=3 --epochs 2", "--set must not repeat --epochs, got epochs=3"),
        ("plain", "--chunk-size 0", "error: --chunk-size must be an integer >= 1, got 0"),
        ("plain", "--white bright", "argument --white: must be an integer or largest, got 'bright'"),
        ("plain", "--white 0", "error: --white must be 1 to 65535 or 'largest', got 0"),
        (
            "plain",
            "--background nothing",
            "error: --background must be a color, such as 'white' or '#ffffff', got 'nothing'",
        ),
        ("plain", "--epochs two", "argument --epochs: invalid int value: 'two'"),
        (
            "plain",
            "--validation-classes 9",
            "error: --validation-classes must be 2 to 2 of 4 classes, got 9: there are 4 "
            "training classes (of 8; the others are test classes)",
        ),
        (
            "plain",
            "--test-classes 5 --validation-classes 0.2",
            "3 training classes (of 8; the others are test classes) "
            "are too few for --validation-classes 0.2: give 0 or, for data without a split, fewer --test-classes",
        ),
        ("plain", "--device nowhere", "error: --device must be available, got 'nowhere'"),
        (
            "plain",
            "--class-embeddings missing.npy",
            "error: --class-embeddings must be an existing file, got missing.npy",
        ),
        ("plain", "--resume", "error: --out must hold config.json, got "),
        (
            "glyphs",
            "--recipe adaptive_margin",
            "error: --class-embeddings names (or FILE) must be given for adaptive margins (or --set margin_scale=0)",
        ),
    ],
)
def test_bad_input(kind, arguments, message, tmp_path, monkeypatch, capsys):
    source = kind if kind in ("missing/toy.npz", "cub", "glyphs") else bad_data(kind, tmp_path / "data")
    given = [source, "--recipe", "triplet", "--preset", "small", "--out", tmp_path / "run", *arguments.split()]
    status, line = command("train", given, capsys)
    assert status == 2
    assert line.startswith("pml-ext train: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_mixed(trained, photos, monkeypatch, capsys):
    folder, _ = trained
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = [photos, "--recipe", "mhgl", "--epochs", 2, "--validation-classes", 2, "--out", folder]
    given += ["--set", "width=4", "batch_size=16", "--device", "cpu"]
    for more, message in (
        ([], f"{folder} holds a run already: give another --out, or --resume to go on with it"),
        (["--resume", "--seed", 1], "--resume must go on with the seed of config.json, 0, got 1"),
        (["--resume", "--set", "lr=0.1"], "--resume must go on with the settings.lr of config.json, 0.002, got 0.1"),
        (["--resume", "--test-classes", "3"], "--resume must go on with the num_classes of config.json, 2, got 3"),
    ):
        status, line = command("train", given + more, capsys)
        assert (status, line[: len("pml-ext train: error: " + message)]) == (2, "pml-ext train: error: " + message)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_bad_input_of_embed_and_search(trained, photos, data, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_bytes((folder / "config.json").read_bytes())
    query = photos / "class0" / "03.png"
    place = tmp_path / "index"
    embed_folder(folder, photos, place)
    refused = []
    for name, given, message in (
        ("embed", [tmp_path / "empty", photos], "RUN must hold config.json, got "),
        ("embed", [tmp_path / "torn", photos], "RUN must hold best.pt or last.pt, "),
        ("embed", [folder, tmp_path / "no"], "IMAGES must be a folder, got "),
        ("embed", [folder, tmp_path / "empty"], "IMAGES must be a folder with images in it "),
        ("search", [folder, query, "--k", 0], "--k must be >= 1, got 0"),
        ("search", [folder, query, "--index", tmp_path / "empty"], "--index must be made by "),
        ("search", [folder, data, "--index", place], f"cannot read image {data}: "),
        ("search", [folder, "no.png", "--index", place], "QUERY must be an image, got no.png, which does not exist"),
    ):
        status, line = command(name, given, capsys)
        refused.append((status, line.startswith(f"pml-ext {name}: error: {message}")))
    assert refused == [(2, True)] * 8
    for name in ("best.pt", "config.json"):
        (tmp_path / "torn" / name).write_text("{")
        status, line = command("embed", [tmp_path / "torn", photos], capsys)
        assert (status, line.startswith(f"pml-ext embed: error: cannot read {tmp_path / 'torn' / name}: ")) == (2, True)


def test_classes_that_lose_all_images(tmp_path, capsys):
    """Of training, gallery and queries; labels and rows follow."""
    rows = [f"img/id_{c}/{i}.png id_{c} train" for c in range(4) for i in range(2)]
    rows += [f"img/id_{c}/{i}.png id_{c} {s}" for c in (5, 6, 7, 8) for i, s in enumerate(["query", "gallery"])]
    rows.append("img/id_4/0.png id_4 gallery")
    make_in_shop(tmp_path, rows=rows)
    broken = ["id_1/0", "id_1/1", "id_5/1", "id_7/0"]  # of training, gallery, queries
    for name in broken:
        next(tmp_path.rglob(f"{name}.png")).write_text("no image")
    vectors = np.arange(9.0)[:, None]
    kept = opened_data.readable_part(open_data("in_shop", root=tmp_path, class_embeddings=vectors), True)
    lost = "warning: left out 3 classes without images that can be read: id_1, id_5, id_7"
    assert capsys.readouterr().err.splitlines()[-1] == lost
    assert kept.class_embeddings.tolist() == [[0], [2], [3]]
    assert kept.train.class_names == ["id_0", "id_2", "id_3"]
    assert kept.test.class_names == ["id_6", "id_8"]
    assert kept.gallery.class_names == ["id_6", "id_8", "id_7", "id_4"]
    assert (kept.test.labels.tolist(), kept.gallery.labels.tolist()) == ([0, 1], [0, 2, 1, 3])
    for view in (kept.train, kept.test, kept.gallery):
        names = [view.dataset.class_names[int(view.dataset.labels[i])] for i in view.indices]
        assert names == [view.class_names[label] for label in view.labels]
    for name in ("id_6/0", "id_8/1"):
        next(tmp_path.rglob(f"{name}.png")).write_text("no image")
    with pytest.raises(ValueError, match="test classes that can be read, got 3 and 0, and not id_1, id_5, id_6"):
        opened_data.readable_part(open_data("in_shop", root=tmp_path), True)


@pytest.mark.trains
def test_images_that_turn_out_to_be_broken_are_skipped(tmp_path, capsys):
    """In training, validation and test: their checksums are right, their pixels cut."""
    photos = write_folder(tmp_path / "photos")
    opened = open_data(photos, split_seed=None).hold_out(2)
    trained, validated = opened.train.class_names[0], opened.test.class_names[0]
    broken = [sorted((photos / name).iterdir())[2] for name in (trained, validated, "class6")]
    for path in broken:
        write_png(path, 8, 0, [[9] * SIDE] * SIDE, keep=12)
    with pytest.warns(UserWarning, match=f"cannot read image {broken[0]}: .*; another image of its class") as warned:
        result = run(photos, tmp_path / "run", skip_broken=True, split_seed=None)
    assert len([w for w in warned if "cannot read image" in str(w.message)]) == 1  # though there are two epochs
    printed = capsys.readouterr().err
    one = f"warning: 1 of 12 images to train with cannot be read, others took their places: {broken[0]}"
    assert one in printed.splitlines()
    one = f"warning: tested without 1 of 24 images that cannot be read: {broken[2]}"
    assert one in printed.splitlines()
    broken[2].unlink()
    opened = open_data(photos, split_seed=None)
    loaded = load_run(tmp_path / "run", "cpu")
    opened.test.transform = loaded.recipe.transforms.test
    metrics = retrieval_metrics(*recipes.embed(loaded.recipe.trunk, opened.test), metrics=tuple(METRICS))
    assert metrics == pytest.approx({name: result[name] for name in METRICS})


@pytest.mark.trains
def test_copies_of_test_images_are_told_first(tmp_path, capsys):
    """A test image that lies among the test images again, and among those to train with."""
    photos = write_folder(tmp_path / "photos")
    tested = photos / "class6" / "36.png"
    for name in ("class1", "class6"):
        shutil.copy(tested, photos / name / "zz.png")
    run(photos, tmp_path / "run", split_seed=None, validation_classes=0, epochs=1)
    told = "2 of 50 images are byte-for-byte copies of others, 1 of them in another class"
    pairs = f"{photos}/class6/zz.png = {tested}, {photos}/class1/zz.png = {tested}"
    assert f"warning: {told}: {pairs}" in capsys.readouterr().err.replace("\r", "\n").splitlines()


@pytest.mark.trains
def test_a_class_whose_pixels_are_all_broken_is_left_out(tmp_path, capsys):
    """The checksums are right, so that only decoding tells."""
    photos = write_folder(tmp_path / "photos")
    lost = [path for name in ("class1", "class6") for path in (photos / name).iterdir()]
    for path in [*lost, photos / "class0" / "00.png"]:  # one of another class, which is the first of it
        write_png(path, 8, 0, [[9] * SIDE] * SIDE, keep=12)
    result = run(photos, tmp_path / "run", skip_broken=True, validation_classes=0, split_seed=None)
    assert result["epoch"] == 2
    printed = capsys.readouterr().err.splitlines()
    assert "warning: left out 2 classes without images that can be read: class1, class6" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_classes"], config["data"]["images"]) == (3, {"train": 17, "validation": 0, "test": 18})
    main(["evaluate", str(tmp_path / "run"), "--skip-broken", "--device", "cpu"])
    assert "test classes: 18 images of 3 classes" in capsys.readouterr().out
    options = {"skip_broken": True, "validation_classes": 0, "split_seed": None}
    assert run(photos, tmp_path / "run", epochs=3, resume=True, **options)["epoch"] == 3


def write_10_bits(folder):
    for i, (image, label) in enumerate(zip(*make_images(), strict=True)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint16) * 4).save(folder / f"class{label}" / f"{i:02}.png")
    return folder


@pytest.mark.trains
def test_images_are_read_everywhere_as_in_the_training(tmp_path):
    photos = write_10_bits(tmp_path / "photos")
    images, labels = make_images()
    largest = 4 * int(images[labels < CLASSES // 2].max())
    given = {"background": "black", "turn": False, "white": "largest", "split_seed": None}
    run(photos, tmp_path / "run", **given)
    reader = ImageReader("black", False, largest)
    loaded = load_run(tmp_path / "run", "cpu")
    assert loaded.reader == reader
    embeddings, paths = embed_folder(tmp_path / "run", photos, device="cpu")
    opened = open_data(photos, reader=reader, split_seed=None)
    opened.train.transform = loaded.recipe.transforms.test
    expected = recipes.embed(loaded.recipe.trunk, opened.train)[0].numpy()
    np.testing.assert_allclose(embeddings[: len(expected)], expected, atol=1e-5)
    assert found(tmp_path / "run", photos / paths[3], k=1, device="cpu")[0] == (pytest.approx(1), paths[3])
    plain = open_data(photos, split_seed=None)
    plain.train.transform = loaded.recipe.transforms.test
    assert np.abs(recipes.embed(loaded.recipe.trunk, plain.train)[0].numpy() - expected).max() > 0.01

    for path in photos.rglob("*.png"):  # darker now, of which the run that goes on takes no notice
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    with pytest.raises(ValueError, match="must have the images"):  # but of their sizes
        run(photos, tmp_path / "run", resume=True, epochs=3, **given)
    photos = write_10_bits(tmp_path / "photos")
    with pytest.raises(ValueError, match=rf"reader.background: 'black', got 'white'; .*white: {largest}, got 65535"):
        run(photos, tmp_path / "run", resume=True, split_seed=None)
    with pytest.warns(UserWarning, match="cosine schedule"):
        assert run(photos, tmp_path / "run", resume=True, epochs=3, **given)["epoch"] >= 1
    assert load_run(tmp_path / "run").reader == reader


def test_a_run_among_the_images(photos, tmp_path, monkeypatch, capsys):
    message = "pml-ext train: error: --out must not lie in DATA, whose images its pictures would join, got "
    assert command("train", [photos, "--out", photos / "run"], capsys)[1].startswith(message)
    monkeypatch.chdir(tmp_path)
    Path("glyphs").mkdir()
    assert not opens_folder("glyphs") and opens_folder("./glyphs") and opens_folder(Path("glyphs"))


@pytest.mark.processes
def test_a_broken_image_ends_the_training_with_its_name(tmp_path):
    """One whose checksums are right; also where a worker process finds it, whose traceback the error brings along."""
    photos = write_folder(tmp_path / "photos")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)), (b"IDAT", bytes(99)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks]
    (photos / "class1" / "09.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    given = [MAIN, "train", photos, "--recipe", "triplet", "--preset", "small", "--validation-classes", 0]
    given += ["--epochs", 3, "--set", "width=4", "batch_size=16"]
    commands = [[*given, "--out", tmp_path / f"run{workers}", "--workers", workers] for workers in (0, 2)]
    printed, errors = run_scripts(commands, tmp_path)
    assert re.findall(r"exit status: (.+)", printed) == ["2", "2"]
    assert "Traceback" not in errors
    message = f"pml-ext train: error: cannot read image {photos / 'class1' / '09.png'}: "
    assert [line.startswith(message) for line in errors.splitlines() if "error: " in line] == [True, True]


@pytest.mark.trains
def test_finetuning_tells_what_frozen_features_find(tmp_path, capsys):
    photos = write_folder(tmp_path / "photos")
    for i, path in enumerate(photos.rglob("*.png")):  # noise, in which no network finds all
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    donor = timm.create_model("test_efficientnet")
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    options = {"preset": "finetune", "backbone": "test_efficientnet", "weights": str(tmp_path / "w.pth")}
    options |= {"image_size": 32, "settings": {"batch_size": 16, "embedding_size": 16}}
    run(photos, tmp_path / "run", **options)
    printed = capsys.readouterr().out
    frozen = json.loads((tmp_path / "run" / "config.json").read_text())["baseline"]
    opened = open_data(photos, 0.5)
    opened.test.transform = load_run(tmp_path / "run", "cpu").recipe.transforms.test
    x, labels = torch.utils.data.default_collate(list(opened.test))
    with torch.no_grad():
        features = torch.nn.functional.normalize(donor.eval().forward_intermediates(x)[1][-1].mean((2, 3)))
    expected = retrieval_metrics(features, labels)
    assert frozen["test"] == pytest.approx(expected) and 0 < expected["mean_average_precision_at_r"] < 1
    told = f"before training (frozen features), test classes: P@1 {100 * expected['precision_at_1']:.1f}"
    assert told in printed and set(frozen) == {"title", "validation", "test"}
    (row,) = [line for line in printed.splitlines() if line.startswith("frozen features ")]
    assert row.split()[2:] == [f"{100 * value:.1f}" for value in expected.values()]
    (tmp_path / "w.pth").unlink()  # what goes on has its weights in the checkpoint
    with pytest.raises(FileNotFoundError, match="weights must be a file"):
        run(photos, tmp_path / "other", **options)
    run(photos, tmp_path / "run", resume=True, **(options | {"epochs": 3}))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["baseline"] == frozen
    run(photos, tmp_path / "next", **(options | {"weights": str(tmp_path / "run")}))


@pytest.mark.trains
@pytest.mark.parametrize(("before", "is_worse"), [(1.01, True), (0.0, False)])
def test_a_training_that_makes_retrieval_worse_is_told(before, is_worse, photos, tmp_path, capsys):
    values = dict.fromkeys(train.METRICS, before)
    baseline = {"title": "frozen features", "validation": values, "test": values}
    given = {"preset": "small", "epochs": 1, "settings": TINY, "validation_classes": 2, "device": "cpu"}
    with mock.patch.object(train, "measure_baseline", return_value=baseline):
        train.main(photos, tmp_path, "proxy_anchor", **given)
    found = 100 * lines(tmp_path)[0]["mean_average_precision_at_r"]
    told = f"training has made retrieval worse: MAP@R {found:.1f}, before {100 * before:.1f}"
    assert (told in capsys.readouterr().err) == is_worse


@pytest.mark.trains
def test_several_seeds(data, tmp_path, capsys):
    with mock.patch.multiple(train, draw_curves=mock.DEFAULT, draw_gallery=mock.DEFAULT, write_run_report=mock.DEFAULT):
        given = {"preset": "small", "epochs": 1, "settings": TINY, "validation_classes": 0, "device": "cpu"}
        result = train.main(data, tmp_path, "proxy_anchor", seeds=3, seed=4, **given)
        again = train.main(data, tmp_path, "proxy_anchor", seeds=3, seed=4, resume=True, **given)
    assert again == result
    assert [load_run(tmp_path / f"seed-{seed}").config["seed"] for seed in (4, 5, 6)] == [4, 5, 6]
    values = [lines(tmp_path / f"seed-{seed}")[-1]["r_precision"] for seed in (4, 5, 6)]
    assert len(set(values)) > 1
    assert result["mean"]["r_precision"] == pytest.approx(np.mean(values))
    assert result["std"]["r_precision"] == pytest.approx(np.std(values, ddof=1))
    shown = f"{100 * np.mean(values):.1f} ({100 * np.std(values, ddof=1):.1f})"
    assert shown in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.trains
def test_all_classes_are_trained(photos, tmp_path, capsys):
    result = run(photos, tmp_path / "run", test_classes=0, validation_classes=None)
    assert result == {"epoch": 2}
    assert "there is no test: all classes are trained on" in capsys.readouterr().out.splitlines()
    config = load_run(tmp_path / "run").config
    assert (config["num_classes"], config["data"]["images"]) == (CLASSES, {"train": 48, "validation": 0, "test": 0})
    assert len(lines(tmp_path / "run")) == 2
    assert run(photos, tmp_path / "run", test_classes=0, validation_classes=None, resume=True) == result
    run(photos, tmp_path / "validated", test_classes=0)
    assert load_run(tmp_path / "validated").config["num_classes"] == CLASSES - 2
    (tmp_path / "split").mkdir()
    for part, names in (("train", "012"), ("test", "34")):
        for name in names:
            shutil.copytree(photos / f"class{name}", tmp_path / "split" / part / name)
    with pytest.raises(ValueError, match="--test-classes 0 must be used with data without a split"):
        run(tmp_path / "split", tmp_path / "other", test_classes=0)


def test_a_wrong_setting_is_told_before_images_are_checked(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "readable_part", mock.Mock(side_effect=AssertionError("checks images")))
    for message, changes in (
        ("^backbone must be a timm model", {"backbone": "resnet1"}),
        ("^levels must be 'both' or 'global'", {"settings": {"levels": "some"}}),
        ("^val_classes must be", {"validation_classes": 9}),
    ):
        with pytest.raises(ValueError, match=message):
            run(photos, tmp_path, recipe="mhgl", **changes)


@pytest.mark.trains
def test_the_baseline_changes_nothing(data, tmp_path, monkeypatch):
    run(data, tmp_path / "with")
    monkeypatch.setattr(train, "measure_baseline", lambda *args: {"title": "none"})
    run(data, tmp_path / "without")
    assert lines(tmp_path / "with")[:-1] == lines(tmp_path / "without")[:-1]
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    assert config["baseline"]["title"] == "untrained network"
    assert set(config["baseline"]["test"]) == set(recipes.METRICS)


@pytest.mark.trains
def test_a_network_goes_on_with_new_classes(photos, tmp_path, capsys):
    run(photos, tmp_path / "first")
    shutil.copytree(photos, tmp_path / "new")
    shutil.rmtree(tmp_path / "new" / "class0")
    words = [tmp_path / "new", "--init-from", tmp_path / "first", "--out", tmp_path / "second", "--epochs", "1"]
    main(["train", *map(str, words), "--test-classes", "3", "--device", "cpu"])
    row = f"the network of {tmp_path / 'first'}"
    assert any(line.startswith(f"{row} ") for line in capsys.readouterr().out.splitlines())
    first, second = (load_run(tmp_path / name, "cpu") for name in ("first", "second"))
    assert second.config["settings"]["width"] == first.config["settings"]["width"] == TINY["width"]
    assert second.checksum != first.checksum
    opened = open_data(tmp_path / "new", 3)
    opened.test.transform = first.recipe.transforms.test
    expected = retrieval_metrics(*recipes.embed(first.recipe.trunk, opened.test))
    assert second.config["baseline"]["test"] == pytest.approx(expected)


@pytest.mark.trains
def test_a_run_and_its_data_may_be_moved(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos, tmp_path / "a" / "photos")
    monkeypatch.chdir(tmp_path / "a")
    run("photos", "run", epochs=1)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="cosine schedule"):
        assert run("b/photos", "b/run", epochs=2, resume=True)["split"] == "test"
    main(["embed", "b/run", "b/photos", "--device", "cpu"])
    (tmp_path / "b").rename(tmp_path / "c")
    found = search.main("c/run", "c/photos/class3/20.png", k=1, device="cpu")
    assert found["results"][0]["path"] == "class3/20.png"


def test_without_matplotlib_nothing_is_drawn(trained, photos, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    embed_folder(folder, photos, tmp_path / "index", device="cpu")
    for module in (train, search):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(photos, tmp_path / "run", pictures=True, epochs=1)
    assert {path.suffix for path in (tmp_path / "run").iterdir()} == {".json", ".jsonl", ".pt", ".html"}
    assert search.main(folder, photos / "class0/03.png", 2, tmp_path / "index")["out"] is None
    assert capsys.readouterr().out.count("pip install 'pml-ext[visualization]'") == 2
