import pytest

from pml_ext.datasets import open_data
from pml_ext.datasets.splits import check_splits, meaning, splits_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("bounding_box_train", "train"),
        ("train_images", "train"),
        ("val2017", "validation"),
        ("valid", "validation"),
        ("dev", "validation"),
        ("TEST", "test"),
        ("test-set", "test"),
        ("queries", "query"),
        ("probe", "query"),
        ("Gallery", "gallery"),
        ("database", "gallery"),
        ("trains", None),
        ("train_station", None),
        ("test tube", None),
        ("cat", None),
        ("index finger", None),
    ],
)
def test_common_spellings(name, split):
    assert meaning(name) == split


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train/a/0.png", "test/b/0.png"], ("train", "test")),
        (["train/a/0.png", "test/b/0.png", "val/c/0.png"], ("train", "test")),
        (["query/b/0.png", "gallery/b/0.png", "train/a/0.png", "val/c/0.png"], ("train", "query", "gallery")),
        (["query/b/0.png", "gallery/b/0.png", "train/a/0.png"], ("train", "query", "gallery")),
        (["train/0.png", "bus/0.png", "car/0.png"], ()),  # a class
        (["cat/train/0.png", "dog/test/0.png"], ()),
    ],
)
def test_splits_of(files, splits, tmp_path):
    touch(tmp_path, *files)
    assert splits_of(tmp_path) == splits


@pytest.mark.parametrize(
    ("folders", "got"),
    [
        ("train val", "'val'"),
        ("train valid test2", "'test2' (test?)"),
        ("train valid", "'valid'"),
        ("Train Test", "'Test' (test?)"),
        ("train queries gallery", "'queries' (query?)"),
        ("train probe gallery", "'probe' (query?)"),
        ("train query val", "'val'"),
        ("train test gallery", "gallery and test and train"),
        ("train query", "query and train"),
        ("query gallery", "gallery and query"),
        ("train", "train"),
        ("bounding_box_train bounding_box_test query", "'bounding_box_test' (test?)"),
    ],
)
def test_other_splits_are_refused(folders, got, tmp_path):
    for name in folders.split():
        touch(tmp_path, f"{name}/a/0.png", f"{name}/b/0.png", f"{name}/c/0.png")
    with pytest.raises(ValueError, match="must be train and test, or train, query and gallery") as error:
        open_data(tmp_path)
    assert str(error.value).startswith(f"folders of splits in {tmp_path} must be ")
    assert str(error.value).endswith(f", got {got}")


def test_splits_without_class_folders_are_no_classes(tmp_path):
    """As in Market-1501: the images lie in the split itself."""
    touch(tmp_path, "bounding_box_train/0002_c1.jpg", "bounding_box_test/0001_c1.jpg", "query/0001_c2.jpg")
    with pytest.raises(ValueError, match=r"got 'bounding_box_test' \(test\?\)"):
        open_data(tmp_path)


def test_check_splits():
    assert check_splits("x", ["gallery", "train", "query"]) == ("train", "query", "gallery")
    with pytest.raises(ValueError, match=r"x must be .*, got 'validation'$"):
        check_splits("x", ["train", "validation"])
