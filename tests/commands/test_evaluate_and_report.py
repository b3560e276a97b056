"""``pml-ext evaluate`` and ``report``: on the run's own test classes, other data, queries and gallery, two runs."""

import json
import shutil
from unittest import mock

import pytest
import torch
from PIL import Image

from pml_ext import recipes
from pml_ext.commands import report, run_report
from pml_ext.commands.main import main
from pml_ext.commands.tables import METRICS
from pml_ext.datasets import ImageFolder, open_data
from pml_ext.datasets.content import file_names
from tests.commands.test_train import run, write_folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "photos"
    return folder, run(photos, folder, test_classes=3, seed=1)


def printed(capsys, *words):
    capsys.readouterr()
    main([*map(str, words), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


def metrics(result):
    return {name: result[name] for name in METRICS}


def of_dataset(folder, dataset, gallery=None):
    loaded = recipes.load_run(folder, "cpu")
    parts = []
    for part in (dataset, gallery):
        if part is not None:
            part.transform = loaded.recipe.transforms.test
            parts.append(recipes.embed(loaded.recipe.trunk, part))
    return recipes.retrieval_metrics(*parts[0], *parts[1:], metrics=tuple(METRICS))


def test_the_test_classes_of_the_run(trained, photos, capsys):
    folder, tested = trained
    for words in ([], [photos]):
        result = printed(capsys, "evaluate", folder, *words)
        assert metrics(result) == pytest.approx({name: tested[name] for name in METRICS})
        assert (result["images"], result["classes"], result["epoch"]) == (18, 3, tested["epoch"])
    main(["evaluate", str(folder), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{photos}, test classes: 18 images of 3 classes"
    assert lines[1].split() == ["percent", "P@1", "R-precision", "MAP@R", "NMI"]
    assert lines[2].split()[-4:] == [f"{100 * tested[name]:.1f}" for name in METRICS]


def test_all_classes(trained, photos, tmp_path, capsys):
    folder, _ = trained
    expected = of_dataset(folder, ImageFolder(photos))
    result = printed(capsys, "evaluate", folder, photos, "--all-classes")
    assert metrics(result) == pytest.approx(expected)
    assert result["images"] == 48
    copied = shutil.copytree(photos, tmp_path / "others")
    assert metrics(printed(capsys, "evaluate", folder, copied, "--all-classes")) == pytest.approx(expected)
    for name in "012345":
        shutil.rmtree(copied / f"class{name}")
    assert printed(capsys, "evaluate", folder, copied)["classes"] == 2
    for name in ("train", "test"):
        shutil.copytree(copied, tmp_path / "split" / name)
        for path in (tmp_path / "split" / name).iterdir():
            path.rename(path.with_name(f"{name}-{path.name}"))
    assert printed(capsys, "evaluate", folder, tmp_path / "split")["images"] == 12
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), str(tmp_path / "split"), "--all-classes"])
    assert "--all-classes must be used with data without a split" in capsys.readouterr().err


@pytest.mark.trains
def test_images_that_are_alone_in_their_class(trained, photos, tmp_path, capsys):
    folder, _ = trained
    for name in ("class0", "class1"):
        shutil.copytree(photos / name, tmp_path / "pairs" / name)
    for name in "ab":
        (tmp_path / "singles" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "singles" / name / "0.png")
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), str(tmp_path / "singles")])
    assert capsys.readouterr().err.endswith("DATA must have a class with two images, got 2 classes of one image each\n")
    shutil.copytree(tmp_path / "singles", tmp_path / "pairs", dirs_exist_ok=True)
    main(["evaluate", str(folder), str(tmp_path / "pairs"), "--device", "cpu"])
    assert "14 images of 4 classes, 2 of them without another of their class to be found\n" in capsys.readouterr().out
    result = printed(capsys, "evaluate", folder, tmp_path / "pairs")
    found = metrics(result)
    assert (result["images"], result["queries"]) == (14, 12)
    assert found == pytest.approx(of_dataset(folder, ImageFolder(tmp_path / "pairs")))
    shutil.copytree(tmp_path / "pairs", tmp_path / "split" / "test")
    shutil.copytree(photos, tmp_path / "split" / "train", ignore=shutil.ignore_patterns("class[01]"))
    run(tmp_path / "split", tmp_path / "run", epochs=1, validation_classes=0)
    assert "no queries: 2 images to test without another of their class to be found\n" in capsys.readouterr().out


def names_of_run(folder):
    """Return the names of the classes that a run was trained on, and of its test classes, which were drawn."""
    config = json.loads((folder / "config.json").read_text())
    how = config["data"]
    data = open_data(how["source"], how["test_classes"], seed=config["seed"], split_seed=how["split_seed"])
    return data.hold_out(how["validation_classes"], config["seed"]).train.class_names, data.test.class_names


def test_data_that_has_moved(trained, photos, tmp_path, capsys):
    folder, tested = trained
    moved = shutil.copytree(photos, tmp_path / "moved")
    main(["evaluate", str(folder), str(moved), "--device", "cpu", "--json"])
    done = capsys.readouterr()
    assert metrics(json.loads(done.out)) == pytest.approx({name: tested[name] for name in METRICS})
    assert f"{moved}, test classes: 18 images of 3 classes" in done.err
    assert "was trained on" not in done.err
    trained_on, names = names_of_run(folder)
    new, old = moved / trained_on[0], moved / names[0]
    shutil.copy(min(old.iterdir()), new / "more.png")  # in a training class: the test classes are still known
    assert metrics(printed(capsys, "evaluate", folder, moved)) == pytest.approx(
        {name: tested[name] for name in METRICS}
    )
    shutil.copy(min(new.iterdir()), old / "more.png")  # which is other data, and all of it is taken
    main(["evaluate", str(folder), str(moved), "--device", "cpu"])
    done = capsys.readouterr()
    assert f"{moved}: 50 images of 8 classes" in done.out
    known = "warning: about 100% of the images that the network was trained on are among the test images"
    assert known in done.err
    for name in trained_on[1:]:
        shutil.rmtree(moved / name)
    main(["evaluate", str(folder), str(moved), "--device", "cpu"])
    assert "warning: about 33% of the images that the network was trained on" in capsys.readouterr().err
    shutil.rmtree(new)
    main(["evaluate", str(folder), str(moved), "--device", "cpu"])
    assert "was trained on" not in capsys.readouterr().err


@pytest.mark.trains
@pytest.mark.parametrize("with_split", [False, True])
def test_data_that_has_changed_since(with_split, photos, tmp_path, capsys):
    """Classes are drawn anew where one comes, and those of the test may be ones of the training."""
    data, folder = tmp_path / "photos", tmp_path / "run"
    if with_split:
        for part, names in (("train", "0123"), ("test", "4567")):
            for name in names:
                shutil.copytree(photos / f"class{name}", data / part / f"class{name}")
    else:
        shutil.copytree(photos, data)
    run(data, folder, epochs=1)
    if with_split:
        shutil.copytree(photos / "class0", data / "test" / "class8")
        assert printed(capsys, "evaluate", folder)["classes"] == 5
        return
    shutil.copytree(photos / "class0", data / "class8")
    for words in ([], [str(data)]):
        with pytest.raises(SystemExit):
            main(["evaluate", str(folder), *words])
        message = "DATA must have the images that the run began with, or its test classes are not known, got other"
        assert message in capsys.readouterr().err
    assert printed(capsys, "evaluate", folder, "--all-classes")["classes"] == 9


def test_queries_and_gallery(trained, photos, tmp_path, capsys):
    folder, _ = trained
    for name in ("class6", "class7", "class5"):
        for part, files in (("query", [0, 1]), ("gallery", [2, 3, 4, 5])):
            if (part, name) != ("query", "class5"):
                (tmp_path / "shop" / part / name).mkdir(parents=True)
                for i in files:
                    shutil.copy(sorted((photos / name).iterdir())[i], tmp_path / "shop" / part / name)
    queries, gallery = (ImageFolder(tmp_path / "shop" / part) for part in ("query", "gallery"))
    queries.labels = queries.labels + 1  # class5 is the first of the gallery
    expected = of_dataset(folder, queries, gallery)
    result = printed(capsys, "evaluate", folder, tmp_path / "shop")
    assert metrics(result) == pytest.approx(expected)
    assert (result["images"], result["classes"], result["queries"]) == (4, 2, 4)
    shutil.copytree(photos, tmp_path / "shop" / "train", ignore=shutil.ignore_patterns("class[567]"))
    assert metrics(printed(capsys, "evaluate", folder, tmp_path / "shop")) == pytest.approx(expected)
    shutil.rmtree(tmp_path / "shop" / "train")
    shutil.rmtree(tmp_path / "shop" / "gallery" / "class6")
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), str(tmp_path / "shop")])
    assert "query classes must have gallery images, got none of 'class6'" in capsys.readouterr().err


def test_broken_images(trained, photos, tmp_path, capsys):
    folder, _ = trained
    copied = shutil.copytree(photos, tmp_path / "photos")
    broken = sorted((copied / "class3").iterdir())[1]
    broken.write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(folder), str(copied), "--all-classes"])
    assert stopped.value.code == 2
    assert f"cannot read 1 of 48 images (--skip-broken: leave them out): {broken}" in capsys.readouterr().err
    main(["evaluate", str(folder), str(copied), "--skip-broken", "--all-classes", "--json"])
    done = capsys.readouterr()
    assert json.loads(done.out)["images"] == 47
    assert f"warning: tested without 1 of 48 images that cannot be read: {broken}" in done.err.replace("\r", "\n")


@pytest.mark.trains
def test_images_that_the_training_left_out(tmp_path, capsys):
    photos, out = write_folder(tmp_path / "photos"), tmp_path / "run"
    left_out = [sorted((photos / name).iterdir())[2] for name in ("class0", "class6")]
    content = [path.read_bytes() for path in left_out]
    for path in left_out:
        path.write_text("no image")
    run(photos, out, skip_broken=True, split_seed=None)
    for path, restored in zip(left_out, content, strict=True):
        path.write_bytes(restored)
    capsys.readouterr()
    main(["evaluate", str(out), "--device", "cpu"])
    done = capsys.readouterr()
    assert "test classes: 23 images of 4 classes" in done.out
    name = f"test/class6/{left_out[1].name}"
    assert f"warning: left out 1 image that could not be read when the run was trained: {name}" in done.err
    main(["evaluate", str(out), str(photos), "--all-classes", "--device", "cpu"])
    done = capsys.readouterr()
    assert ": 48 images of 8 classes" in done.out and "left out" not in done.err


@pytest.mark.parametrize("name", ["evaluate", "report"])
def test_copies_are_told(name, trained, photos, tmp_path, capsys):
    copied = shutil.copytree(photos, tmp_path / "photos")
    first = sorted((copied / "class3").iterdir())[1]
    for name_of_class in ("class3", "class5"):
        shutil.copy(first, copied / name_of_class / "zz.png")
    main([name, str(trained[0]), str(copied), "--all-classes", *(["--out", str(tmp_path / "it")] * (name == "report"))])
    told = "2 of 50 images are byte-for-byte copies of others, 1 of them in another class"
    line = f"warning: {told}: {copied}/class3/zz.png = {first}, {copied}/class5/zz.png = {first}"
    assert line in capsys.readouterr().err.replace("\r", "\n").splitlines()
    main([name, str(trained[0]), str(photos)])
    assert "copies" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "/not/there"}, "DATA must be given: /not/there is not there any more"),
        (None, "DATA must be given: the run does not tell what it was trained on"),
    ],
)
def test_a_run_without_its_data(change, message, trained, photos, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["data"] = {} if change is None else config["data"] | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder)])
    assert capsys.readouterr().err.splitlines()[-1] == f"pml-ext evaluate: error: {message}"
    assert printed(capsys, "evaluate", folder, photos)["images"] == (48 if change is None else 18)


def test_report(trained, photos, tmp_path, capsys):
    folder, tested = trained
    result = printed(capsys, "report", folder, "--out", tmp_path / "mine.html")
    assert result["out"] == str(tmp_path / "mine.html")
    assert result["metrics"][str(folder)]["precision_at_1"] == pytest.approx(tested["precision_at_1"])
    page = (tmp_path / "mine.html").read_text(encoding="utf-8").replace("<wbr>", "")
    for text in ("proxy_anchor", "class7/47.png", str(folder), f"{photos}: 18 images of 3 classes"):
        assert text in page


def test_a_report_of_two_runs_reads_each_image_as_each_run_does(trained, photos, tmp_path, capsys):
    folder, other = trained[0], tmp_path / "other"
    photos = shutil.copytree(photos, tmp_path / "photos")
    for path in photos.rglob("*.png"):
        image = Image.open(path).convert("LA")
        image.putalpha(99)  # the backgrounds show
        image.save(path)
    run(photos, other, test_classes=3, seed=1, image_size=16, background="black", epochs=1)
    with mock.patch.object(run_report, "retrieval_report", return_value=tmp_path / "x.html") as wrote:
        result = report.main(folder, photos, all_classes=True, against=other, device="cpu")
    (embeddings, labels, *_, path), given = wrote.call_args
    assert path == folder / "report-photos-against-other.html"
    opened = open_data(photos, 0)
    for one, run_folder in ((embeddings, folder), (given["other"], other)):
        loaded = recipes.load_run(run_folder, "cpu")
        opened.train.transform, opened.train.dataset.reader = loaded.recipe.transforms.test, loaded.reader
        torch.testing.assert_close(one, recipes.embed(loaded.recipe.trunk, opened.train)[0])
    assert labels.tolist() == opened.train.labels.tolist()
    assert (given["title"], given["other_title"]) == (str(folder), str(other))
    assert given["names"] == file_names(opened.train)
    assert given["about"]["settings"]["image_size"] != given["other_about"]["settings"]["image_size"] == 16
    assert list(result["metrics"]) == [str(folder), str(other)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("runs/none", "--against must hold config.json, got runs/none without"),
        (None, "--against must be another run than RUN, got "),
    ],
)
def test_a_run_that_cannot_be_compared(other, message, trained, capsys):
    folder, _ = trained
    with pytest.raises(SystemExit):
        main(["report", str(folder), "--against", other or f"{folder}/../{folder.name}"])
    assert capsys.readouterr().err.startswith(f"pml-ext report: error: {message}")


def test_where_the_report_goes(trained, photos, tmp_path):
    folder, _ = trained
    with mock.patch.object(run_report, "retrieval_report", side_effect=lambda *given, **_: given[4]):
        assert report.main(folder, device="cpu")["out"] == str(folder / "report.html")
        assert report.main(folder, photos, all_classes=True)["out"] == str(folder / "report-photos.html")
        copied = shutil.copytree(photos, tmp_path / "more.v1", ignore=shutil.ignore_patterns("class7"))
        other = shutil.copytree(folder, tmp_path / "other")
        assert report.main(folder, copied, against=other)["out"] == str(folder / "report-more.v1-against-other.html")


@pytest.mark.trains
def test_other_data_that_has_the_names_of_the_run(photos, tmp_path, capsys):
    """Files of fixed size, such as those of BMP, differ in their content alone; and a training part may be shared."""
    generator = torch.Generator().manual_seed(0)
    for data in ("first", "other"):
        for i in range(24):
            path = tmp_path / data / f"class{i // 4}" / f"{i % 4}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(path)
    run(tmp_path / "first", tmp_path / "run", epochs=1, validation_classes=0)
    folder = tmp_path / "run"
    main(["evaluate", str(folder), str(tmp_path / "other"), "--device", "cpu"])
    told = capsys.readouterr()
    assert "other, test classes: 12 images of 3 classes\n" in told.out
    images = "the images have the names of those that the run was trained on, but none the content"
    assert f"warning: {images}: their test classes are taken (all images: --all-classes)\n" in told.err
    main(["evaluate", str(folder), str(tmp_path / "other"), "--device", "cpu", "--all-classes"])
    assert "other: 24 images of 6 classes\n" in capsys.readouterr().out
    moved = shutil.copytree(tmp_path / "first", tmp_path / "moved")
    main(["evaluate", str(folder), str(moved), "--device", "cpu"])
    told = capsys.readouterr()
    assert "moved, test classes: 12 images of 3 classes\n" in told.out and "was trained on" not in told.err

    for part, classes in (("train", "012"), ("test", "345")):
        for i in classes:
            shutil.copytree(tmp_path / "first" / f"class{i}", tmp_path / "split" / part / f"class{i}")
    run(tmp_path / "split", tmp_path / "run-split", epochs=1, validation_classes=0)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "split" / "train", again / "train")
    for i in "45":
        shutil.copytree(tmp_path / "other" / f"class{i}", again / "test" / f"new{i}")
    with mock.patch.object(run_report, "retrieval_report", side_effect=lambda *given, **_: given[4]):
        made = report.main(tmp_path / "run-split", again, device="cpu")
    assert made["out"] == str(tmp_path / "run-split" / "report-again.html")


@pytest.mark.trains
def test_a_run_that_was_tested_on_other_classes(trained, photos, tmp_path, capsys):
    folder, _ = trained
    for split_seed in (0, 1):
        other = tmp_path / f"other{split_seed}"
        run(photos, other, test_classes=3, split_seed=split_seed, epochs=1)
        with mock.patch.object(run_report, "retrieval_report", return_value=tmp_path / "x.html"):
            main(["report", str(folder), "--against", str(other), "--device", "cpu"])
        told = f"warning: {other} has other test classes than {folder}: it may have been trained on some of these"
        assert (told in capsys.readouterr().err) == (split_seed == 1)
