import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_ext.class_embeddings import from_text
from pml_ext.datasets import Glyphs, ImageReader, open_data, sources
from tests.datasets.test_in_shop import ROWS, make_in_shop

LABELS = np.array([4, 0, 1, 4, 3, 1, 3, 0])  # 2 is missing
SPLIT = np.array(["test" if label > 1 else "train" for label in LABELS])
ROWS_OF = np.arange(10.0).reshape(5, 2)  # row i is (2 i, 2 i + 1)


def images_of(labels):
    """Gray images with the label as value."""
    return np.asarray(labels, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)


def write_npz(path, **changes):
    arrays = {"images": images_of(LABELS), "labels": LABELS, "split": SPLIT, "strokes": np.zeros((8, 3, 4), np.float16)}
    arrays |= {"class_names": np.array(list("abcde")), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path, **({"quality": 100} if path.suffix == ".jpg" else {}))


def values_of(view):
    """The gray value of each class, by label; one for each class."""
    pixels = {}
    for image, label in view:
        pixel = int(np.asarray(image).flatten()[0])
        assert pixels.setdefault(label, pixel) == pixel
    return [pixels[label] for label in range(view.num_classes)]


def test_npz_with_split(tmp_path):
    data = open_data(write_npz(tmp_path / "toy.npz"))
    assert values_of(data.train) == [0, 1]
    assert values_of(data.test) == [3, 4]
    assert (data.train.class_names, data.test.class_names) == (["a", "b"], ["d", "e"])
    assert (data.name, data.in_channels, data.gallery, data.class_embeddings) == ("toy", 1, None, None)
    assert data.train[0][0].shape == (1, 4, 4)
    assert data.train.transform is None
    color = open_data(
        str(write_npz(tmp_path / "c.npz", images=images_of(LABELS)[..., None].repeat(3, 3), class_names=None))
    )
    assert color.in_channels == 3
    assert color.train.class_names is None


@pytest.mark.parametrize(
    ("test_classes", "train", "test"),
    [(0.5, [0, 1], [3, 4]), (1, [0, 1, 3], [4]), (2, [0, 1], [3, 4]), (0.01, [0, 1, 3], [4]), (0.99, [0, 1], [3, 4])],
)
def test_the_last_classes_of_npz_without_split(tmp_path, test_classes, train, test):
    data = open_data(write_npz(tmp_path / "toy.npz", split=None), test_classes, split_seed=None)
    assert values_of(data.train) == train
    assert values_of(data.test) == test


def write_folder(path, names):
    for i, name in enumerate(names):
        save(path / name / "0.png", i)
    return path


def test_drawn_classes(tmp_path):
    """By seed, whatever is drawn elsewhere; each class is drawn for some seed, and order and sizes stay."""
    names = [f"class {c}" for c in "abcdefgh"]
    write_folder(tmp_path, names)
    torch.manual_seed(1)
    first = open_data(tmp_path, 3)
    assert open_data(tmp_path, 3, seed=5, split_seed=0).test.class_names == first.test.class_names
    others = [open_data(tmp_path, 3, split_seed=seed) for seed in range(12)]
    for data in (first, *others):
        assert (data.num_classes, data.test.num_classes) == (5, 3)
        assert sorted([*data.train.class_names, *data.test.class_names]) == names
        assert data.train.class_names == sorted(data.train.class_names)
        assert [names[i] for i in values_of(data.test)] == data.test.class_names == sorted(data.test.class_names)
    assert {name for data in others for name in data.test.class_names} == set(names)
    assert first.test.class_names == ["class a", "class e", "class h"]  # resumed runs need them again
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{name}/0.png,{name}\n" for name in names))
    assert open_data(tmp_path / "list.csv", 3).test.class_names == first.test.class_names


def test_drawn_classes_of_npz(tmp_path):
    path = write_npz(tmp_path / "toy.npz", split=None)
    tests = {tuple(values_of(open_data(path, 1, split_seed=seed).test)) for seed in range(9)}
    assert tests == {(0,), (1,), (3,), (4,)}


def test_a_split_is_not_drawn(tmp_path):
    for seed in (0, 1, None):
        assert values_of(open_data(write_npz(tmp_path / "toy.npz"), 1, split_seed=seed).test) == [3, 4]
        assert len(open_data(tmp_path / "toy.npz", 0, split_seed=seed).test) == 4


@pytest.mark.parametrize("split_seed", [0, None])
def test_data_without_a_test(tmp_path, split_seed):
    data = open_data(write_folder(tmp_path, ["ant", "bee"]), test_classes=0, split_seed=split_seed)
    assert (values_of(data.train), data.test, data.gallery) == ([0, 1], None, None)
    write_folder(tmp_path, ["ant", "bee", "cat", "dog", "eel"])
    data = open_data(tmp_path, 0, class_embeddings=ROWS_OF, split_seed=split_seed)
    held = data.hold_out(2)
    assert (held.num_classes, held.test.num_classes, held.test.transform) == (3, 2, None)
    assert held.class_embeddings.tolist() == ROWS_OF[held.train.classes].tolist()
    assert open_data(write_npz(tmp_path / "toy.npz", split=None), 0).num_classes == 4
    with pytest.raises(ValueError, match="must have >= 2 classes, got 1"):
        open_data(write_folder(tmp_path / "one", ["ant"]), test_classes=0)


@pytest.mark.parametrize("split_seed", ["0", 0.5, True])
def test_bad_split_seed(tmp_path, split_seed):
    with pytest.raises(TypeError, match=f"split_seed must be an integer or None, got {split_seed!r}"):
        open_data(tmp_path, split_seed=split_seed)


def test_names_of_classes_as_embeddings(tmp_path):
    write_folder(tmp_path, ["polar_bear", "brown_bear", "grass_hopper", "bear"])
    data = open_data(tmp_path, 1, class_embeddings="names", split_seed=None)  # without the polar bear
    assert data.train.class_names == ["bear", "brown_bear", "grass_hopper"]
    expected = from_text(["bear", "brown bear", "grass hopper"], "tfidf")
    assert torch.equal(data.class_embeddings, expected)
    assert (
        data.class_embeddings[0] @ data.class_embeddings[1] > 0.3 > data.class_embeddings[0] @ data.class_embeddings[2]
    )
    rows = open_data(tmp_path, 0, class_embeddings="names").hold_out(2, seed=1)
    assert rows.class_embeddings.shape[0] == 2
    arrays = write_npz(tmp_path / "toy.npz", class_embeddings=ROWS_OF)
    assert torch.equal(open_data(arrays, class_embeddings="names").class_embeddings, from_text(["a", "b"], "tfidf"))


def test_names_of_classes_by_another_model(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sources, "from_text", lambda *args: calls.append(args) or torch.ones(3, 2))
    write_folder(tmp_path, ["ant", "bee_1", "cat", "dog"])
    open_data(tmp_path, 1, class_embeddings="names:all-MiniLM-L6-v2", split_seed=None)
    assert calls == [(["ant", "bee 1", "cat"], "all-MiniLM-L6-v2")]


def test_names_that_say_nothing(tmp_path):
    write_folder(tmp_path, ["001", "0_2", "3"])
    with pytest.raises(ValueError, match="where the names of classes have no letters, got '001', '0 2', "):
        open_data(tmp_path, 1, class_embeddings="names", split_seed=None)
    with pytest.raises(ValueError, match="where the names of classes have no letters, got none"):
        open_data(write_npz(tmp_path / "toy.npz", class_names=None), class_embeddings="names")


@pytest.mark.parametrize(
    ("test_classes", "error", "message"),
    [
        (3, ValueError, "test_classes must be 1 to 2 of 4 classes, got 3"),
        (-1, ValueError, "test_classes must be 1 to 2 of 4 classes, got -1"),
        (False, TypeError, "test_classes must be a share or a number of classes, got False"),
        (1.0, ValueError, r"test_classes must be a share between 0 and 1 or an integer, got 1\.0"),
        (None, TypeError, "test_classes must be a share or a number of classes, got None"),
    ],
)
def test_bad_test_classes(tmp_path, test_classes, error, message):
    with pytest.raises(error, match=message):
        open_data(write_npz(tmp_path / "toy.npz", split=None), test_classes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": None}, ValueError, "must contain 'images', got labels, split, class_names"),
        ({"labels": None}, ValueError, "must contain 'labels', got images"),
        (
            {"labels": LABELS[:5]},
            ValueError,
            r"toy.npz: labels must have one entry for each of 8 images, got shape \(5",
        ),
        ({"labels": LABELS - 1, "class_names": None}, ValueError, "labels must be >= 0, got -1"),
        ({"labels": LABELS * 1.0}, TypeError, "toy.npz: labels must have an integer dtype, got float64"),
        ({"images": images_of(LABELS) / 255}, TypeError, "toy.npz: images must have dtype uint8, got float64"),
        ({"split": SPLIT[:5]}, ValueError, r"split must have shape \(8,\), as labels, got \(5,\)"),
        ({"split": np.array(["train", "val"] * 4)}, ValueError, "split must be 'train' or 'test', got 'val'"),
        ({"split": np.array(["train"] * 7 + ["test"])}, ValueError, "both in training and test, got label 0"),
        ({"split": np.array(["train"] * 8)}, ValueError, ">= 2 training and >= 1 test classes, got 4 and 0"),
        ({"split": np.where(LABELS == 0, "train", "test")}, ValueError, ">= 1 test classes, got 1 and 3"),
        ({"split": None, "labels": np.zeros(8, int)}, ValueError, r"must have >= 3 classes, .*got 1"),
        ({"class_names": np.array(["a", "b"])}, ValueError, "a name for each label, got 2 names and labels 0 to 4"),
        ({"images": np.array([None] * 8)}, ValueError, "cannot read .*toy.npz: .*allow_pickle"),
        ({"class_embeddings": ROWS_OF[:4]}, ValueError, r"must have 5 rows, .* or 2, .*, got 4"),
    ],
)
def test_bad_npz(tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        open_data(write_npz(tmp_path / "toy.npz", **changes))
    assert "\n" not in str(caught.value)


def test_broken_npz(tmp_path):
    for content in (b"", b"PK\x03\x04 no zip", b"text"):
        (tmp_path / "toy.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*toy\.npz: "):
            open_data(tmp_path / "toy.npz")


def test_class_embeddings_by_name(tmp_path):
    """Folders are sorted as text, and rows in the order of numbers would be those of other classes."""
    for name in range(1, 13):
        (tmp_path / "photos" / str(name)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / str(name) / "0.png")
    numbers = np.arange(1.0, 13)
    rows = np.stack([numbers, -numbers], 1)
    np.savez(tmp_path / "rows.npz", class_names=[str(x) for x in range(1, 13)], embeddings=rows)
    by_name = {str(x): [float(x), -float(x)] for x in range(12, 0, -1)}
    given = [by_name, tmp_path / "rows.npz", {int(x): torch.tensor(row) for x, row in by_name.items()}]
    for source in given:
        for test_classes in (0, 5):
            data = open_data(tmp_path / "photos", test_classes, class_embeddings=source)
            assert data.class_embeddings.tolist() == [by_name[name] for name in data.train.class_names]
    in_order = open_data(tmp_path / "photos", 0, class_embeddings=rows)
    assert in_order.train.class_names[1] == "10" and in_order.class_embeddings[1].tolist() == by_name["2"]
    of_training = {name: by_name[name] for name in data.train.class_names}
    assert open_data(tmp_path / "photos", 5, class_embeddings=of_training).class_embeddings.tolist() == list(
        of_training.values()
    )


def test_class_embeddings_by_names_that_do_not_fit(tmp_path):
    path = write_npz(tmp_path / "toy.npz", split=np.where(LABELS % 3 == 1, "train", "test"), class_embeddings=ROWS_OF)
    names = open_data(path).train.class_names
    for given, error, message in (
        ({names[0]: ROWS_OF[0]}, ValueError, f"must have all training classes, got none for '{names[1]}'$"),
        ({}, ValueError, f"must have all training classes, got none for '{names[0]}' and 1 more"),
        (
            {names[0]: [1.0], names[1]: [1.0, 2.0]},
            ValueError,
            rf".* width, got \(1,\) for '{names[0]}' and \(2,\) for '{names[1]}'",
        ),
        ({names[0]: None, names[1]: [1.0]}, ValueError, rf"must be rows of one width, got \(\) for '{names[0]}'"),
        (
            {names[0].upper(): [1.0], names[1]: [1.0]},
            ValueError,
            f"must have all training classes, got none for '{names[0]}' .there is '{names[0].upper()}', of nearly",
        ),
        ({names[0]: [1.0], names[1]: [np.inf]}, ValueError, "must be finite, got .* for training class 1"),
        ({names[0]: ["red"], names[1]: ["blue"]}, TypeError, "must have a floating point dtype, got <U4"),
    ):
        with pytest.raises(error, match=f"class_embeddings {message}"):
            open_data(path, class_embeddings=given)
    with pytest.raises(TypeError, match="must be an array for data whose classes have no names, got a dictionary"):
        open_data(write_npz(tmp_path / "no.npz", class_names=None), class_embeddings={"a": [1.0]})
    np.savez(tmp_path / "rows.npz", class_names=["a", "b", "a"], embeddings=ROWS_OF[:3])
    with pytest.raises(ValueError, match=r"rows.npz must have a class name of its own for each row, got 'a' twice"):
        open_data(path, class_embeddings=tmp_path / "rows.npz")


def test_class_embeddings_with_names_that_say_nothing(tmp_path):
    """Names of all classes beside rows of the training classes, and names where the data has none."""
    path = write_npz(
        tmp_path / "toy.npz", split=np.where(LABELS % 3 == 1, "train", "test"), class_embeddings=ROWS_OF[:2]
    )
    assert open_data(path, class_embeddings=path).class_embeddings.tolist() == ROWS_OF[:2].tolist()
    nameless = write_npz(tmp_path / "no.npz", split=np.where(LABELS % 3 == 1, "train", "test"), class_names=None)
    np.savez(tmp_path / "rows.npz", class_names=list("vwxyz"), embeddings=ROWS_OF)
    assert open_data(nameless, class_embeddings=tmp_path / "rows.npz").class_embeddings.tolist() == [[2, 3], [8, 9]]
    np.savez(
        tmp_path / "rows.npz", class_names=np.array(open_data(path).train.class_names, "S"), embeddings=ROWS_OF[:2]
    )
    assert open_data(path, class_embeddings=tmp_path / "rows.npz").class_embeddings.tolist() == ROWS_OF[:2].tolist()


def test_class_embeddings_follow_the_classes(tmp_path):
    path = write_npz(tmp_path / "toy.npz", split=np.where(LABELS % 3 == 1, "train", "test"), class_embeddings=ROWS_OF)
    data = open_data(path)
    assert data.train.classes == [1, 4]
    assert data.class_embeddings.dtype == torch.float32
    assert data.class_embeddings.tolist() == [[2, 3], [8, 9]]
    np.save(tmp_path / "a.npy", -ROWS_OF)
    np.savez(tmp_path / "b.npz", embeddings=-ROWS_OF, other=np.ones(3))
    np.savez(tmp_path / "c.npz", class_embeddings=-ROWS_OF, other=np.ones(3))
    np.savez(tmp_path / "d.npz", any=-ROWS_OF)
    sources = [tmp_path / "a.npy", str(tmp_path / "b.npz"), tmp_path / "c.npz", tmp_path / "d.npz"]
    for source in [*sources, -ROWS_OF, torch.from_numpy(-ROWS_OF).half().requires_grad_()]:
        data = open_data(path, class_embeddings=source)
        assert data.class_embeddings.tolist() == [[-2, -3], [-8, -9]]
        assert data.class_embeddings.dtype == torch.float32
        assert not data.class_embeddings.requires_grad
    for rows in (ROWS_OF[::-1].copy()[::-1], ROWS_OF.astype(">f4")):  # negative strides, another byte order
        assert open_data(path, class_embeddings=rows).class_embeddings.tolist() == [[2, 3], [8, 9]]
    assert open_data(path, class_embeddings=ROWS_OF[2:4]).class_embeddings.tolist() == [[4, 5], [6, 7]]  # of training
    unfit = write_npz(tmp_path / "unfit.npz", class_embeddings=ROWS_OF[:3])
    assert open_data(unfit, class_embeddings=ROWS_OF).class_embeddings.tolist() == [[0, 1], [2, 3]]  # not looked at
    with_gap = ROWS_OF.copy()
    with_gap[[0, 2]] = np.nan  # nobody needs them
    assert open_data(path, class_embeddings=with_gap).class_embeddings.tolist() == [[2, 3], [8, 9]]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            ROWS_OF[:3],
            ValueError,
            "must have 5 rows, one for each label value, or 2, one for each training class, got 3",
        ),
        (np.full((2, 3), np.nan), ValueError, "class_embeddings must be finite, got .*nan.* for training class 0"),
        (np.array([[1.0], [np.inf]]), ValueError, "class_embeddings must be finite, got .*inf.* for training class 1"),
        (np.ones((5, 2), int), TypeError, "class_embeddings must have a floating point dtype, got int64"),
        (np.array(["a", "b"]), TypeError, "class_embeddings must have a floating point dtype"),
        (np.ones(5), ValueError, r"class_embeddings must have shape \(C, E\), got \(5,\)"),
        (
            torch.ones(5, 2, device="meta"),
            ValueError,
            "class_embeddings must hold numbers, got a tensor on the meta dev",
        ),
        (np.ones((5, 0)), ValueError, r"class_embeddings must have shape \(C, E\), got \(5, 0\)"),
        ("nowhere.npy", FileNotFoundError, "class_embeddings must be an existing file, got nowhere.npy"),
        ("text.csv", ValueError, r"class_embeddings must be a \.npy or \.npz file, got .*text\.csv"),
        ("text.npy", ValueError, r"cannot read .*text\.npy: "),
        ("two.npz", ValueError, r"must contain 'embeddings', 'class_embeddings' or one array, got \['a', 'b'\]"),
    ],
)
def test_bad_class_embeddings(tmp_path, rows, error, message):
    for name in ("text.csv", "text.npy"):
        (tmp_path / name).write_text("text")
    np.savez(tmp_path / "two.npz", a=ROWS_OF, b=ROWS_OF)
    if isinstance(rows, str) and (tmp_path / rows).exists():
        rows = tmp_path / rows
    with pytest.raises(error, match=message):
        open_data(write_npz(tmp_path / "toy.npz"), class_embeddings=rows)


def test_folder(tmp_path):
    for i, name in enumerate(["ant", "bee", "cat", "dog"]):
        save(tmp_path / name / "0.png", i)
        save(tmp_path / name / "more" / "1.jpg", i)
    data = open_data(tmp_path, test_classes=1, split_seed=None)
    assert (values_of(data.train), values_of(data.test)) == ([0, 1, 2], [3])
    assert (data.train.class_names, data.test.class_names) == (["ant", "bee", "cat"], ["dog"])
    assert (data.in_channels, data.name) == (3, tmp_path.name)
    assert data.train[0][0].mode == "RGB"
    assert open_data(str(tmp_path), split_seed=None).test.class_names == ["cat", "dog"]
    rows = open_data(tmp_path, class_embeddings=ROWS_OF[:4], split_seed=None).class_embeddings
    assert rows.tolist() == [[0, 1], [2, 3]]


def test_folder_with_halves(tmp_path):
    for i, name in enumerate(["test/ant", "train/bee", "test/cat", "train/dog", "train/eel", "other/fox"]):
        save(tmp_path / name / "0.png", i)
    save(tmp_path / "val" / "gnu" / "0.png", 9)
    with pytest.warns(UserWarning, match=r"left out of .* \(2 folders\): other/, val/$"):
        data = open_data(tmp_path, test_classes=1)
    assert (values_of(data.train), values_of(data.test)) == ([1, 3, 4], [0, 2])
    assert (data.train.class_names, data.test.class_names) == (["bee", "dog", "eel"], ["ant", "cat"])
    assert open_data(tmp_path, class_embeddings=ROWS_OF).class_embeddings.tolist() == ROWS_OF[:3].tolist()
    save(tmp_path / "test" / "dog" / "0.png", 9)
    with pytest.raises(ValueError, match="no class may be both in train and test, got 'dog'"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("Zo\u00eb", "Zoe\u0308", r"'Zo\xeb' in train and 'Zoe\u0308' in test"),  # as Linux and macOS write it
        ("Cat", "cat ", "'Cat' in train and 'cat ' in test"),
        ("cat", "cats", None),
    ],
)
def test_names_that_are_nearly_the_same(first, second, told, tmp_path):
    for i, name in enumerate([f"train/{first}", "train/dog", f"test/{second}"]):
        save(tmp_path / "split" / name / "0.png", i)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert open_data(tmp_path / "split").test.class_names == [second]
    assert [told in str(w.message) and "are they the same?" in str(w.message) for w in warned] == (
        [True] if told else []
    )
    for i, name in enumerate(["train/ant", "train/dog", f"query/{first}", f"gallery/{second}"]):
        save(tmp_path / "shop" / name / "0.png", i)
    hint = f"of nearly the same name as {first!a})" if told else "'cat'"
    with pytest.raises(ValueError, match=rf"query classes must have gallery images, got none of .*{re.escape(hint)}$"):
        open_data(tmp_path / "shop")


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="source must have a sub-folder for each class"):
        open_data(tmp_path)
    for name in ("train/ant", "train/bee", "train", "val"):
        save(tmp_path / name / "0.png", 0)
    for _ in range(2):  # also where there are three folders
        with pytest.raises(ValueError, match=r"folders of splits in .* must be train and test, or .*, got 'val'"):
            open_data(tmp_path)
        save(tmp_path / "more" / "0.png", 0)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"source must have a sub-folder for each class, got .*test without any"):
        open_data(tmp_path)


def test_folders_in_class_folders(tmp_path):
    message = r"without a split \(train and test\) must have >= 3 classes, .*got 2"
    for name in ("warm", "cold"):
        save(tmp_path / name / "0.png", 0)
    with pytest.raises(ValueError, match=f"{message}$"):
        open_data(tmp_path)
    (tmp_path / "warm" / "0.png").unlink()
    save(tmp_path / "warm" / "cat" / "0.png", 0)
    hint = f"got some only in cat: each folder directly in {tmp_path} is one class; a CSV file of paths and labels can"
    with pytest.raises(ValueError, match=f"class folder .*warm must contain images of its own, {hint}"):
        open_data(tmp_path)


@pytest.mark.slow
def test_glyphs():
    data = open_data("Glyphs", seed=2)
    assert (data.num_classes, data.test.num_classes, data.in_channels, data.name) == (267, 267, 1, "glyphs")
    for view, split in ((data.train, "train"), (data.test, "test")):
        glyphs = Glyphs(split, seed=2)
        assert view.class_names == glyphs.class_names
        assert len(view) == len(glyphs)
        assert np.array_equal(view[100][0], glyphs.data[100])
        assert view.labels.tolist() == (glyphs.targets - glyphs.targets[0]).tolist()


def make_cub(root):
    root = root / "CUB_200_2011"
    folders = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 101: "101.White_Pelican"}
    rows = [(1, 2, "a.jpg"), (2, 1, "b.jpg"), (3, 101, "c.jpg"), (4, 1, "d.jpg"), (5, 101, "e.jpg")]
    for _, label, name in rows:
        save(root / "images" / folders[label] / name, label)
    (root / "images.txt").write_text("".join(f"{i} {folders[label]}/{name}\n" for i, label, name in rows))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {label}\n" for i, label, _ in rows))


def make_cars(root):
    names = [f"Car {i}/b" for i in range(1, 197)]
    (root / "names.csv").write_text("\n".join(names))
    for split, rows in (
        ("train", [("0.jpg", 2), ("1.jpg", 98), ("2.jpg", 99)]),
        ("test", [("0.jpg", 2), ("1.jpg", 196)]),
    ):
        for file, label in rows:
            save(root / "car_data" / "car_data" / split / f"Car {label}-b" / file, label)
        (root / f"anno_{split}.csv").write_text("".join(f"{file},1,2,3,4,{label}\n" for file, label in rows))


def make_sop(root):
    root = root / "Stanford_Online_Products"
    for split, labels in (("train", [1, 1, 2]), ("test", [11319, 11320, 11319])):
        lines = ["image_id class_id super_class_id path"]
        for i, label in enumerate(labels):
            path = f"bicycle_final/{label}_{i}.JPG"
            save(root / path, label % 200)
            lines.append(f"{i + 1} {label} 1 {path}")
        (root / f"Ebay_{split}.txt").write_text("\n".join(lines))


def make_inaturalist(root):
    files = {0: (5, "train"), 1: (7, "test"), 2: (5, "train"), 3: (3, "train"), 4: (9, "test")}
    (root / "Inat_dataset_splits").mkdir()
    for part, ids in (("train", [0, 1, 2]), ("val", [3, 4])):
        images = [{"id": i, "file_name": f"train_val2018/Aves/{files[i][0]}/{i}.jpg"} for i in ids]
        annotations = [{"image_id": i, "category_id": files[i][0]} for i in ids]
        (root / f"{part}2018.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for split in ("train", "test"):
        paths = [f"train_val2018/Aves/{label}/{i}.jpg" for i, (label, where) in files.items() if where == split]
        (root / "Inat_dataset_splits" / f"Inaturalist_{split}_set1.txt").write_text("\n".join(paths))
    for i, (label, _) in files.items():
        save(root / f"train_val2018/Aves/{label}/{i}.jpg", label)


@pytest.mark.parametrize(
    ("names", "make", "train", "test", "class_names"),
    [
        ("cub CUB", make_cub, [1, 2], [101], ["Black footed Albatross", "Laysan Albatross", "White Pelican"]),
        ("cars196 Cars196", make_cars, [2, 98], [99, 196], ["Car 2-b", "Car 98-b", "Car 99-b", "Car 196-b"]),
        ("sop stanford_online_products StanfordOnlineProducts", make_sop, [1, 2], [119, 120], None),
        ("inaturalist2018 INaturalist2018", make_inaturalist, [3, 5], [7, 9], None),
    ],
)
def test_data_sets_of_pml(tmp_path, names, make, train, test, class_names):
    make(tmp_path)
    for source in names.split():
        data = open_data(source, root=tmp_path)
        assert (values_of(data.train), values_of(data.test)) == (train, test)
        assert data.train.classes + data.test.classes == list(range(len(train) + len(test)))  # count from 0
        assert data.train[0][0].mode == "RGB"  # though the files are gray
        assert (data.in_channels, data.gallery) == (3, None)
        if class_names:
            assert data.train.class_names + data.test.class_names == class_names
        else:
            assert data.train.class_names is None
        rows = np.arange(len(train) + len(test), dtype=float)[:, None]
        assert open_data(source, root=tmp_path, class_embeddings=rows).class_embeddings.tolist() == [[0], [1]]
        assert data.name == {"sop": "stanford_online_products"}.get(names.split()[0], names.split()[0])
    first = Path(data.train.dataset.paths[0])
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot read image .*{first.name}"):
        data.train[0]


@pytest.mark.parametrize("source", ["cub", "cars196", "sop", "inaturalist2018"])
def test_roots_of_pml(tmp_path, source):
    with pytest.raises(ValueError, match=f"root must be the folder of {source}, got None"):
        open_data(source)
    with pytest.raises(FileNotFoundError, match=f"root must be the folder of {source}, got .*nowhere, which does not"):
        open_data(source, root=tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"root must have the layout of .*'s download, .* without .*\.(txt|json|csv)"
    ):
        open_data(source, root=tmp_path)


def test_download_is_passed_to_pml(tmp_path, monkeypatch):
    from pytorch_metric_learning.datasets import CUB

    def download_and_remove(self):
        make_cub(Path(self.root))

    monkeypatch.setattr(CUB, "download_and_remove", download_and_remove)
    assert len(open_data("cub", root=tmp_path / "new", download=True).train) == 3


def test_pml_without_test_images(tmp_path):
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "image_class_labels.txt").write_text("1 2\n2 1\n")
    with pytest.raises(ValueError, match="root must have training and test images, got 2 and 0"):
        open_data("cub", root=tmp_path)


def test_in_shop(tmp_path):
    extra = "img/MEN/Denim/id_00000000/01_1_front.jpg id_00000000 gallery"  # asked for by no query
    make_in_shop(tmp_path, rows=[*ROWS, extra])
    data = open_data("In_Shop", root=tmp_path)
    assert data.name == "in_shop"
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.class_names == ["id_00000001", "id_00000005"]
    assert data.gallery.class_names == ["id_00000001", "id_00000005", "id_00000000"]
    assert data.test.labels.tolist() == [0, 1]
    assert data.gallery.labels.tolist() == [0, 1, 2]
    assert [image.getpixel((0, 0))[0] for image, _ in data.gallery] == [30, 50, 70]
    rows = np.arange(5.0)[:, None]
    assert open_data("InShop", root=tmp_path, class_embeddings=rows).class_embeddings.tolist() == [[0], [1]]


def test_bad_in_shop(tmp_path):
    with pytest.raises(ValueError, match="root must be the folder of in_shop, got None"):
        open_data("in_shop")
    with pytest.raises(ValueError, match=r"download must be False for in_shop: .*DeepFashion project page"):
        open_data("in_shop", root=tmp_path, download=True)
    with pytest.raises(FileNotFoundError, match="DeepFashion project page"):
        open_data("in_shop", root=tmp_path)
    make_in_shop(tmp_path, rows=[row for row in ROWS if not ("id_00000001" in row and "gallery" in row)])
    with pytest.raises(ValueError, match="query items must have gallery images, got none of id_00000001"):
        open_data("in_shop", root=tmp_path)


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    known = "glyphs, cub, cars196, stanford_online_products, sop, inaturalist2018, in_shop"
    for source in ("mnist", tmp_path / "text.txt"):
        with pytest.raises(
            ValueError, match=f"source must be one of {known}, a folder, a .npz or a .csv file, got '.*"
        ):
            open_data(source)
    for source in ("toy.npz", "folder/toy", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"source must exist, got .*{Path(source).name}"):
            open_data(source)
    for source in (None, "", 3):
        with pytest.raises(TypeError, match="source must be a name or a path, got "):
            open_data(source)


def test_a_folder_with_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate("abc"):
        save(tmp_path / "cub" / name / "0.png", i)
    for source in ("./cub", Path("cub")):
        assert open_data(source).name == "cub"
        assert open_data(source).train.class_names == ["a", "b"]
    with pytest.raises(ValueError, match="root must be the folder of cub, got None"):
        open_data("cub")


@pytest.mark.parametrize("layout", ["classes", "splits"])
def test_the_largest_value_of_the_training_images_becomes_white(layout, tmp_path):
    """Of the whole data, whose test images may have larger ones."""
    for i, name in enumerate(("ant", "bee", "cat", "dog")):
        folder = tmp_path / ("train" if i < 2 else "test") / name if layout == "splits" else tmp_path / name
        folder.mkdir(parents=True)
        Image.fromarray(np.array([[0, 500 * (i + 1)]], dtype=np.uint16)).save(folder / "0.png")
    data = open_data(tmp_path, reader=ImageReader(turn=False, white="largest"), split_seed=None)
    for view in (data.train, data.test):
        assert view.dataset.reader == ImageReader(turn=False, white=1000)
    assert [np.asarray(image).max() for image, _ in data.train] == [128, 255]
    assert [np.asarray(image).max() for image, _ in data.test] == [255, 255]
