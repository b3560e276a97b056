import numpy as np
import pytest
import torch

from pml_ext.datasets import ClassSubset, Glyphs, ImageArrays

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
    with pytest.raises(TypeError, match="dataset must have labels or targets, got TensorDataset without"):
        ClassSubset(torch.utils.data.TensorDataset(torch.zeros(2)), [0])
    dataset.labels = [0.5] * 6
    with pytest.raises(TypeError, match=r"dataset\.labels must have an integer dtype, got float64"):
        ClassSubset(dataset, [0])
    dataset.labels = [0] * 5
    with pytest.raises(ValueError, match=r"dataset\.labels must have one entry for each of 6 images, got shape \(5,\)"):
        ClassSubset(dataset, [0])
