import numpy as np
import pytest
import torch

from pml_ext.datasets import ClassSubset, Glyphs, ImageArrays
from pml_ext.datasets.image_files import ImageFiles

LABELS = [5, 0, 2, 5, 2, 3]


@pytest.fixture
def dataset():  # image i has the value i
    images = np.arange(6, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return ImageArrays(images, LABELS, class_names=list("abcdef"))


def value(sample):
    return int(sample[0].flatten()[0])


def test_labels_follow_the_order_of_classes(dataset):
    view = ClassSubset(dataset, [2, 5])
    assert view.labels.tolist() == [1, 0, 1, 0]
    assert view.indices.tolist() == [0, 2, 3, 4]
    assert [value(sample) for sample in view] == [0, 2, 3, 4]
    assert [label for _, label in view] == [1, 0, 1, 0]
    assert type(view[0][1]) is int
    assert (len(view), view.num_classes, view.classes, view.class_names) == (4, 2, [2, 5], ["c", "f"])
    assert repr(view) == "ClassSubset: 4 images of 2 classes"


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor])
def test_classes_of_any_kind(dataset, make):
    assert ClassSubset(dataset, make([3, 0])).labels.tolist() == [1, 0]


def test_transforms_are_independent(dataset):
    dataset.transform = lambda image: image + 10
    first, second = ClassSubset(dataset, [0, 2]), ClassSubset(dataset, [2, 3])
    assert value(first[0]) == 1 + 10  # starts as that of the data set
    first.transform = lambda image: image + 100
    second.transform = None
    assert (value(first[1]), value(second[0]), value(dataset[2])) == (102, 2, 12)
    dataset.transform = lambda image: image + 50
    assert (value(first[1]), value(second[0]), value(dataset[2])) == (102, 2, 52)
    inner = ClassSubset(first, [1])
    inner.transform = lambda image: image + 200
    assert (value(inner[0]), value(first[1])) == (202, 102)
    assert inner.labels.tolist() == [0, 0]
    assert inner.class_names == ["c"]


def test_data_is_shared(dataset):
    assert ClassSubset(dataset, [0]).dataset.images is dataset.images


def test_glyphs():
    glyphs = Glyphs("test", samples_per_class=2, transform=np.asarray, target_transform=lambda label: label / 0)
    view = ClassSubset(glyphs, [300, 267])
    assert view.class_names == [glyphs.class_names[33], glyphs.class_names[0]]
    assert np.array_equal(view[0][0], glyphs.data[0].numpy())
    assert view[0][1] == 1  # target_transform is not called
    view.transform = None
    assert view[0][0].mode == "L"
    assert glyphs.transform is np.asarray


class LikeTorchvision:
    """CIFAR10 and the like: targets in a list, names in ``classes``, PIL images, pairs."""

    def __init__(self, classes, transform=None):
        self.targets, self.classes, self.transform, self.target_transform = LABELS, classes, transform, None

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = torch.tensor([index])
        return image if self.transform is None else self.transform(image), self.targets[index]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (list("abcdef"), ["f", "a"]),  # of each label value
        (list("wxyz"), ["z", "w"]),  # of each label that occurs
        (list("vwxyz"), None),  # of whatever
        ([0, 2, 3, 5], None),
    ],
)
def test_like_torchvision(classes, names):
    view = ClassSubset(LikeTorchvision(classes, transform=lambda image: -image), [5, 0])
    assert view.class_names == names
    assert [(int(image), label) for image, label in view] == [(0, 0), (-1, 1), (-3, 0)]


def test_works_in_a_data_loader(dataset):
    view = ClassSubset(dataset, [5, 2])
    images, labels = next(iter(torch.utils.data.DataLoader(view, batch_size=4)))
    assert images.shape == (4, 1, 4, 4)
    assert torch.equal(labels, view.labels)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, r"classes must be different and at least one, got \[\]"),
        ([2, 2], ValueError, r"classes must be different and at least one, got \[2, 2\]"),
        ([0, 4], ValueError, "classes must be labels of dataset, got 4, which has no sample"),
        ([0.0], TypeError, r"classes must be integers, got 0\.0"),
        ([True], TypeError, "classes must be integers, got True"),
        ("05", TypeError, "classes must be integers, got '0'"),
    ],
)
def test_bad_classes(dataset, classes, error, message):
    with pytest.raises(error, match=message):
        ClassSubset(dataset, classes)


def test_bad_datasets(dataset):
    with pytest.raises(TypeError, match="dataset must have labels or targets, got a TensorDataset with neither"):
        ClassSubset(torch.utils.data.TensorDataset(torch.zeros(2)), [0])
    dataset.labels = [0.5] * 6
    with pytest.raises(TypeError, match=r"dataset\.labels must have an integer dtype, got float64"):
        ClassSubset(dataset, [0])
    dataset.labels = [0] * 5
    with pytest.raises(ValueError, match=r"dataset\.labels must have one entry for each of 6 images, got shape \(5,\)"):
        ClassSubset(dataset, [0])


def test_ids_that_do_not_fit_are_refused(dataset):
    """They would turn negative."""
    high = np.array([1, 2**63 - 1, 3, 4, 5, 6], dtype=np.uint64)
    assert ImageArrays(dataset.images, high).labels.tolist() == [1, 2**63 - 1, 3, 4, 5, 6]
    assert ImageArrays(dataset.images, torch.from_numpy(high)).labels[1] == 2**63 - 1
    high[1] += np.uint64(2)
    for labels in (high, torch.from_numpy(high)):
        with pytest.raises(ValueError, match=r"labels must be at most 2\^63 - 1, got 9223372036854775809; numpy\.uniq"):
            ImageArrays(dataset.images, labels)
    dataset.labels = high
    with pytest.raises(ValueError, match=r"dataset\.labels must be at most 2\^63 - 1"):
        ClassSubset(dataset, [1])


def write_files(folder, sizes):
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    return ImageFiles([folder / name for name in sizes], range(len(sizes)))


def test_fingerprint_of_files(tmp_path):
    sizes = {"x/a.png": 3, "x/b.png": 5, "y/c.png": 7}

    folders = iter("abcdefgh")

    def fingerprint(sizes, classes=(0, 1, 2)):
        return ClassSubset(write_files(tmp_path / next(folders), sizes), classes).fingerprint()

    first = fingerprint(sizes)
    assert len(first) == 64 and int(first, 16)
    assert fingerprint(sizes) == first  # elsewhere
    changed = [
        fingerprint(sizes | {"x/b.png": 6}),
        fingerprint({"x/a.png": 3, "x/d.png": 5, "y/c.png": 7}),
        fingerprint({"x/b.png": 5, "x/a.png": 3, "y/c.png": 7}),
        fingerprint(sizes, [0, 2, 1]),
        fingerprint(sizes, [0, 1]),
    ]
    (tmp_path / "a" / "x" / "b.png").unlink()
    changed.append(ClassSubset(ImageFiles([tmp_path / "a" / name for name in sizes], range(3)), range(3)).fingerprint())
    assert len({first, *changed}) == 7


def test_fingerprint_of_a_view_of_a_view(tmp_path):
    files = write_files(tmp_path, {"a.png": 1, "b.png": 2, "c.png": 3})
    inner = ClassSubset(ClassSubset(files, [2, 1]), [1, 0])  # labels 0, 1 for files b, c
    assert inner.labels.tolist() == [0, 1]
    assert inner.fingerprint() == ClassSubset(files, [1, 2]).fingerprint()


def test_fingerprint_of_arrays(dataset):
    first = ClassSubset(dataset, [0, 2]).fingerprint()
    dataset.images[0] += 1  # of class 5
    assert ClassSubset(dataset, [0, 2]).fingerprint() == first
    dataset.images[1, 3, 3] += 1
    assert ClassSubset(dataset, [0, 2]).fingerprint() != first
    glyphs = ClassSubset(Glyphs(samples_per_class=2), [3])
    assert glyphs.fingerprint() != ClassSubset(Glyphs(samples_per_class=2, seed=1), [3]).fingerprint()


def test_fingerprint_of_other_data_sets():
    plain = LikeTorchvision(list("abcdef"))
    assert ClassSubset(plain, [5, 0]).fingerprint() == ClassSubset(LikeTorchvision(None), [5, 0]).fingerprint()
    assert ClassSubset(plain, [5, 0]).fingerprint() != ClassSubset(plain, [0, 5]).fingerprint()
    assert ClassSubset(plain, [5]).fingerprint() != ClassSubset(plain, [2]).fingerprint()  # the same labels, others
    plain.samples = [(f"x/{i}.png", 0) for i in range(6)]  # as torchvision's ImageFolder
    assert ClassSubset(plain, [5]).fingerprint() != ClassSubset(LikeTorchvision(None), [5]).fingerprint()
