import numpy as np
import pytest
from PIL import Image

from pml_ext.datasets import open_data


def write(folder, text, name="photos.csv", encoding="utf-8"):
    """Write a list, and the images a.png to l.png with the values 10, 20, ..."""
    (folder / "all").mkdir(exist_ok=True)
    for i in range(12):
        Image.new("L", (4, 4), 10 * (i + 1)).save(folder / "all" / f"{chr(ord('a') + i)}.png")
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def values(view):
    return [(int(np.asarray(image)[0, 0, 0]), label) for image, label in view]


def test_without_split(tmp_path):
    text = "path,label\nall/a.png,10\nall/b.png,9\nall/c.png,-1\n\nall/d.png,10\nall/e.png,200\n"
    data = open_data(write(tmp_path, text), split_seed=None)
    assert data.train.class_names + data.test.class_names == ["-1", "9", "10", "200"]  # as numbers
    assert (values(data.train), values(data.test)) == ([(30, 0), (20, 1)], [(10, 0), (40, 0), (50, 1)])
    assert (data.name, data.in_channels, data.gallery) == ("photos", 3, None)
    assert open_data(str(tmp_path / "photos.csv"), test_classes=1).num_classes == 3
    rows = np.arange(8.0).reshape(4, 2)
    assert open_data(tmp_path / "photos.csv", class_embeddings=rows, split_seed=None).class_embeddings.tolist() == [
        [0, 1],
        [2, 3],
    ]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "10", "9"], ["10", "9", "a", "b"]),
        (["07", "7", "1", "6"], ["1", "6", "07", "7"]),  # no two are merged
        ([str(2**64), str(2**64 + 1), "0", "1"], ["0", "1", str(2**64), str(2**64 + 1)]),
        (["Öl", "cat, gray", "é", " z "], ["cat, gray", "z", "Öl", "é"]),
    ],
)
def test_labels_of_any_kind(labels, names, tmp_path):
    rows = "".join(f'"{label}", all/{name}.png\r\n' for label, name in zip(labels, "abcd", strict=True))
    data = open_data(write(tmp_path, f"label, path\r\n{rows}", encoding="utf-8-sig"), split_seed=None)
    assert data.train.class_names + data.test.class_names == names


def test_with_test_split(tmp_path):
    text = "split,extra,label,path\ntest,x,0,all/a.png\ntrain,x,2,all/b.png\ntrain,,1,all/c.png\ntest,,0,all/d.png\n"
    data = open_data(write(tmp_path, text))
    assert (values(data.train), values(data.test)) == ([(30, 0), (20, 1)], [(10, 0), (40, 0)])
    assert (data.train.classes, data.test.classes) == ([0, 1], [2])


GALLERY = [("a", "x", "train"), ("b", "y", "train"), ("c", "q", "query"), ("d", "p", "query")]
GALLERY += [("e", "p", "gallery"), ("f", "o", "gallery"), ("g", "q", "gallery"), ("h", "q", "gallery")]


def check_gallery(data):
    assert (data.train.class_names, data.test.class_names) == (["x", "y"], ["p", "q"])
    assert data.gallery.class_names == ["p", "q", "o"]  # those of the queries first
    assert sorted(values(data.train)) == [(10, 0), (20, 1)]
    assert sorted(values(data.test)) == [(30, 1), (40, 0)]
    assert sorted(values(data.gallery)) == [(50, 0), (60, 2), (70, 1), (80, 1)]
    assert len(data.train.class_names) == data.num_classes
    assert data.in_channels == 3


@pytest.mark.parametrize("way", ["absolute", "through a link to the folder", "a link"])
def test_an_image_that_is_listed_twice_would_find_itself(way, tmp_path):
    file = write(tmp_path, "")
    (tmp_path / "linked").symlink_to("all", target_is_directory=True)
    (tmp_path / "all" / "link.png").symlink_to("a.png")
    again = {"absolute": f"{tmp_path}/all/a.png", "a link": "all/link.png"}.get(way, "linked/a.png")
    file.write_text(f"path,label\nall/a.png,0\nlinked/b.png,0\n{again},1\n")
    with pytest.raises(ValueError, match=rf"line 4: an image must be listed once, got {again}, that of line 2"):
        open_data(file)


def test_queries_and_gallery(tmp_path):
    rows = [f"all/{name}.png,{label},{split}" for name, label, split in GALLERY]
    check_gallery(open_data(write(tmp_path, "\n".join(["path,label,split", *rows]))))


def test_queries_and_gallery_in_folders(tmp_path):
    for i, (name, label, split) in enumerate(GALLERY):
        folder = tmp_path / split / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * (i + 1)).save(folder / f"{name}.png")
    data = open_data(tmp_path)
    check_gallery(data)
    assert open_data(tmp_path, class_embeddings=np.arange(5.0)[:, None]).class_embeddings.tolist() == [[0], [1]]
    for path in (tmp_path / "gallery" / "p").iterdir():
        path.unlink()
    with (
        pytest.raises(ValueError, match="query classes must have gallery images, got none of 'p'"),
        pytest.warns(UserWarning, match="gallery/p/"),
    ):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: must name the columns path, label and perhaps split, with commas between them, got \[\]"),
        ("file,label\n", r"line 1: must name the columns path, .*, got \['file', 'label'\]"),
        ("path;label\n", r"line 1: must name the columns path, .*, got \['path;label'\]"),
        ("path,label,label\n", r"line 1: must name the columns path, "),
        ("path,label\n", "must list images, got none"),
        ("path,label\nall/a.png\n", "line 2: must have 2 values, got 1"),
        ("path,label\nall/a.png,0\nall/b.png,0,train\n", "line 3: must have 2 values, got 3"),
        ("path,label\nall/a.png, \n", "line 2: label must not be empty"),
        ("path,label\n,0\n", "line 2: path must not be empty"),
        ("path,label,split\nall/a.png,0,\n", "line 2: split must not be empty"),
        (
            "path,label\nall/a.png,0\nall/../all/a.png,1\n",
            r"line 3: an image must be listed once, got all/\.\./all/a\.png, that of line 2",
        ),
        ('path,label\n"all/a.png,0\n', "unexpected end of data"),
        ("path,label,split\nall/a.png,0,train\nall/b.png,1,val\n", "split must be train and test, or .*, got 'val'$"),
        ("path,label,split\nall/a.png,0,train\nall/b.png,1,queries\n", r", got 'queries' \(query\?\)$"),
        ("path,label,split\nall/a.png,0,train\nall/b.png,1,query\n", "got query and train$"),
        ("path,label,split\nall/a.png,0,train\nall/b.png,0,test\n", "may be both in train and test, got '0'"),
        (
            "path,label,split\nall/a.png,0,train\nall/b.png,1,query\nall/c.png,0,gallery\n",
            "may be both in train and gallery, got '0'",
        ),
        ("path,label,split\nall/a.png,0,train\nall/b.png,1,test\n", ">= 2 training and >= 1 test classes, got 1 and 1"),
        (
            "path,label\nall/a.png,0\nall/b.png,1\n",
            r"without a split \(train and test\) must have >= 3 classes, .*got 2",
        ),
    ],
)
def test_bad_lists(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        open_data(write(tmp_path, text))
    assert "photos" in str(error.value) and "\n" not in str(error.value)


def test_paths_of_elsewhere(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path, "path,label\nall/a.png,0\n", "deeper/photos.csv")
    with pytest.raises(FileNotFoundError, match=r"photos\.csv: paths must be relative to its folder, got .*deeper/all"):
        open_data(tmp_path / "deeper" / "photos.csv")
    absolute = "".join(f"{tmp_path}/all/{name}.png,{name}\n" for name in "abc")
    data = open_data(write(tmp_path, f"path,label\n../lost.png,a\n{absolute}", "deeper/photos.csv"), test_classes=1)
    assert (len(data.train), values(data.test)) == (3, [(30, 0)])


def test_no_text(tmp_path):
    (tmp_path / "photos.csv").write_bytes(b"path,label\n\xff.png,0\n")
    with pytest.raises(ValueError, match=r"photos\.csv: must be saved as UTF-8, got 'utf-8' codec can't decode"):
        open_data(tmp_path / "photos.csv")
