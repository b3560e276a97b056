import os

import pytest

from pml_ext.datasets import ImageFolder, open_data
from pml_ext.datasets.folder_walk import FolderWalk, find_images


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names_below(root, paths):
    return [os.path.relpath(path, root) for path in paths]


@pytest.fixture
def root(tmp_path):
    """Four classes with two images each."""
    for c in range(4):
        touch(tmp_path / "photos" / f"c{c}" / "0.png", tmp_path / "photos" / f"c{c}" / "1.png")
    return tmp_path / "photos"


def check_classes(root, expected, left_out):
    with pytest.warns(UserWarning, match="left out of") as warned:
        dataset = ImageFolder(root)
    assert len(warned) == 1
    assert names_below(root, dataset.paths) == expected
    assert [dataset.class_names[label] for label in dataset.labels] == [path.split(os.sep)[0] for path in expected]
    assert sorted(names_below(root, dataset.left_out)) == left_out
    assert all(name in str(warned[0].message) for name in left_out)


EIGHT = [f"c{c}/{i}.png" for c in range(4) for i in range(2)]


@pytest.mark.parametrize(
    ("links", "left_out"),
    [
        ({"c0/up": ".."}, ["c0/up"]),
        ({"c0/up": "..", "c1/up": ".."}, ["c0/up", "c1/up"]),
        ({"c0/far": "../../.."}, ["c0/far"]),  # what lies beside the root is none of it
        ({"c0/here": ".", "c0/self": "self"}, ["c0/here", "c0/self"]),
        ({"c0/other": "../c1"}, ["c0/other"]),
        ({"c9": "c1"}, ["c9"]),  # one folder, one class
        ({"c9": "."}, ["c9"]),
        ({"c9": ".."}, ["c9"]),
        ({"c0/x.png": "../c1/0.png"}, ["c0/x.png"]),  # an image has one class
        ({"c0/x.png": "0.png", "c0/y.png": "x.png"}, ["c0/x.png", "c0/y.png"]),
    ],
)
def test_links_do_not_repeat_images(root, links, left_out):
    touch(root.parent / "elsewhere" / "c7" / "0.png")
    for name, target in links.items():
        (root / name).symlink_to(target)
    check_classes(root, EIGHT, left_out)
    if all(name.startswith("c0") for name in links):
        with pytest.warns(UserWarning, match="left out of"):
            assert names_below(root, find_images(root)) == EIGHT


def test_linked_folders_and_files_count(root):
    elsewhere = root.parent / "elsewhere"
    touch(elsewhere / "c4" / "0.png", elsewhere / "more" / "9.png", elsewhere / "one.jpg")
    (elsewhere / "c4" / "up").symlink_to("..")  # must not bring in "more"
    (root / "c4").symlink_to(elsewhere / "c4")
    (root / "c3" / "more").symlink_to(elsewhere / "more")
    (root / "c2" / "2.jpg").symlink_to(elsewhere / "one.jpg")
    (root / "c3" / "again.jpg").symlink_to(elsewhere / "one.jpg")  # which has its class
    touch(root / "c1" / "image.bin")
    (root / "c1" / "named.jpg").symlink_to("image.bin")
    (root / "c2" / "lost.jpg").symlink_to(elsewhere / "nothing.jpg")  # reading tells that it is lost
    expected = sorted([*EIGHT, "c4/0.png", "c3/more/9.png", "c2/2.jpg", "c2/lost.jpg", "c1/named.jpg"])
    check_classes(root, expected, ["c1/image.bin", "c3/again.jpg", "c4/up"])


def test_images_are_found_where_they_lie(root):
    touch(root / "c1" / "deep" / "2.png")
    (root / "c0" / "a").symlink_to("../c1/deep")
    (root / "c1" / "a").symlink_to("deep")
    check_classes(root, sorted([*EIGHT, "c1/deep/2.png"]), ["c0/a", "c1/a"])


def test_a_class_folder_inside_of_another(root):
    touch(root / "c1" / "deep" / "2.png")
    (root / "c9").symlink_to("c1/deep")
    check_classes(root, [*EIGHT, "c9/2.png"], ["c1/deep"])


def test_links_between_splits(tmp_path):
    for name in ("train/a", "train/b", "test/c"):
        touch(tmp_path / name / "0.png")
    (tmp_path / "train" / "a" / "x").symlink_to("../../test/c")
    (tmp_path / "train" / "d").symlink_to("../test/c")
    with pytest.warns(UserWarning, match=r"left out of .* \(2 folders\): train/a/x/, train/d/$") as warned:
        data = open_data(tmp_path)
    assert (len(data.train), len(data.test), len(warned)) == (2, 1, 1)
    assert (data.train.class_names, data.test.class_names) == (["a", "b"], ["c"])


def test_which_files_count(root):
    counted = ["2.jfif", "3.JPE", "4.Jpg", "5.pnm", "6.PBM"]
    touch(*(root / "c3" / name for name in counted))
    others = [
        "c0/notes.xls",
        "c0/photo.heic",
        "c1/@eaDir",
        "c1/.git",
        "c2/.hidden.png",
        "loose.png",
        "#recycle",
        "pipe",
    ]
    touch(root / "c0" / "notes.xls", root / "c0" / "photo.heic", root / "c1" / "@eaDir" / "0.png" / "SYNOPHOTO.jpg")
    touch(root / "c1" / ".git" / "0.png", root / "c2" / ".hidden.png", root / "loose.png", root / "#recycle" / "0.png")
    touch(root / "c2" / "Thumbs.db", root / "c2" / ".DS_Store", root / "c2" / "._0.png", root / "desktop.ini")  # quiet
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "c0" / "pipe.png")
    (root / "empty" / "deeper").mkdir(parents=True)
    with pytest.warns(
        UserWarning, match=r"left out of .* \(4 folders, 2 \.png, 1 other, 1 \.xls, 1 \.heic, 1 hidden\): "
    ) as warned:
        dataset = ImageFolder(root)
    assert names_below(root, dataset.paths) == sorted([*EIGHT, *(f"c3/{name}" for name in counted)])
    assert sorted(names_below(root, dataset.left_out)) == sorted([*others, "c0/pipe.png", "empty"])
    assert "#recycle/, c1/.git/, c1/@eaDir/, empty/, " in str(warned[0].message)
    assert len(warned) == 1
    unread = "images of kinds that are not read: 1 .heic (save them as .jpg or .png)"
    assert str(warned[0].message).endswith(f" and 5 more; {unread}")


def test_images_of_kinds_that_are_not_read(tmp_path):
    """One warning counts them all, also those that it does not name; where there are no others, the error does."""
    for i in range(3):
        touch(tmp_path / "a" / f"{i}.HEIC", tmp_path / "b" / f"{i}.heic", tmp_path / "b" / f"{i}.txt")
    touch(tmp_path / "b" / "0.avif")
    unread = r"images of kinds that are not read: 6 \.heic, 1 \.avif \(save them as \.jpg or \.png\)$"
    with pytest.raises(ValueError, match=f"must have a sub-folder with images .* without any: {unread}"):
        open_data(tmp_path)
    touch(tmp_path / "a" / "0.webp", tmp_path / "b" / "0.tiff")
    with pytest.warns(UserWarning, match=rf"left out of .* \(6 \.heic, 3 \.txt, 1 \.avif\): .*; {unread}") as warned:
        assert names_below(tmp_path, find_images(tmp_path)) == ["a/0.webp", "b/0.tiff"]
    assert len(warned) == 1


def test_nothing_is_said_where_nothing_is_left_out(root, recwarn):
    assert ImageFolder(root).left_out == []
    assert names_below(root, find_images(root)) == EIGHT
    assert not recwarn.list


def test_other_classes_are_not_left_out(root, recwarn):
    assert ImageFolder(root, classes=["c3", "c0"]).left_out == []
    assert not recwarn.list


def test_folders_that_cannot_be_read_are_not_empty(root, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if os.fspath(path).endswith("c2"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="c2"):
        FolderWalk().images([root])
