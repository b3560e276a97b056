import torch

from pml_ext.datasets import ClassSubset, ImageArrays
from pml_ext.datasets.content import file_names, files_by_mark, fingerprint_of
from pml_ext.datasets.image_files import ImageFiles

FILES = [f"/photos/{name}.jpg" for name in ("a/1", "a/2", "b/1", "b/2", "c/1", "c/2")]
LABELS = [0, 0, 1, 1, 2, 2]


def of_files(files=FILES, labels=LABELS, classes=(2, 1)):
    view = ClassSubset(ImageFiles(files, labels), classes)
    return fingerprint_of(view, view.labels, sizes=False)


def test_names_of_files_and_labels_count():
    assert of_files() == of_files([file.replace("/photos", "/moved/here") for file in FILES])
    others = [of_files([*FILES[:-1], "/photos/c/3.jpg"]), of_files(classes=(1, 2)), of_files(labels=[0, 0, 1, 2, 1, 2])]
    assert len({of_files(), *others}) == 4
    assert of_files([file.replace("a/", "d/") for file in FILES]) == of_files()  # of a class that is not in the view
    inner = ClassSubset(ClassSubset(ImageFiles(FILES, LABELS), [1, 2]), [1])
    assert file_names(inner) == ["c/1.jpg", "c/2.jpg"]
    assert file_names(ImageArrays(torch.zeros(6, 4, 4, dtype=torch.uint8), LABELS)) is None


def test_marks_of_files_are_kept_where_their_class_is_moved(tmp_path):
    for place, size in (("one/a", 3), ("two/else/a", 3), ("two/b", 3), ("two/a", 4)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.jpg").write_bytes(bytes(size))

    def marks(*places):
        return set(files_by_mark(ImageFiles([tmp_path / place / "1.jpg" for place in places], range(len(places)))))

    assert marks("one/a") == marks("two/else/a") and len(marks("one/a", "two/else/a")) == 1
    assert len(marks("one/a", "two/b", "two/a")) == 3
    both = ImageFiles([tmp_path / place / "1.jpg" for place in ("one/a", "two/b")], [0, 1])
    assert set(files_by_mark(ClassSubset(both, [1]))) == marks("two/b")
    assert files_by_mark(ImageArrays(torch.zeros(6, 4, 4, dtype=torch.uint8), LABELS)) == {}


def test_pixels_of_arrays_count():
    images = torch.arange(96, dtype=torch.uint8).view(6, 4, 4)
    first, same, other = (fingerprint_of(ImageArrays(x, LABELS), LABELS) for x in (images, images.clone(), images + 1))
    assert first == same != other
    view = ClassSubset(ImageArrays(images, LABELS), [0, 1])
    changed = ClassSubset(ImageArrays(images + 1, LABELS), [0, 1])
    assert fingerprint_of(view, view.labels) != fingerprint_of(changed, changed.labels)
    subset = torch.utils.data.Subset(ImageArrays(images, LABELS), [0, 1, 2, 3])  # torch's own view
    assert fingerprint_of(subset, LABELS[:4]) == fingerprint_of(view, view.labels)
