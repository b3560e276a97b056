import dataclasses

import numpy as np
import pytest
import torch

from pml_ext.datasets import ClassSubset, ImageArrays, RetrievalData


def make_data(num_train=10, **kwargs):
    """Two images of each class with the class as value; the class c is described by (c, 10 * c)."""
    labels = np.arange(num_train + 3).repeat(2)
    images = labels.astype(np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    dataset = ImageArrays(images, labels, class_names=[f"class {c}" for c in range(num_train + 3)])
    train, test = ClassSubset(dataset, range(num_train)), ClassSubset(dataset, range(num_train, num_train + 3))
    rows = torch.stack([torch.arange(num_train), 10 * torch.arange(num_train)], dim=1).float()
    return RetrievalData(train, test, **{"class_embeddings": rows, "in_channels": 1, "name": "toy"} | kwargs)


def classes_of(view):
    """The original classes, read from the pixels, by label."""
    pixels = {}
    for image, label in view:
        assert pixels.setdefault(label, int(image[0, 0, 0])) == image[0, 0, 0]
    assert sorted(pixels) == list(range(view.num_classes))
    return [pixels[label] for label in range(view.num_classes)]


@pytest.mark.parametrize(("val_classes", "count"), [(0.3, 3), (3, 3), (0.01, 2), (0.99, 8), (8, 8), (np.int64(2), 2)])
def test_hold_out(val_classes, count):
    data = make_data()
    held = data.hold_out(val_classes)
    train, val = classes_of(held.train), classes_of(held.test)
    assert len(val) == held.test.num_classes == count
    assert held.num_classes == len(train) == 10 - count
    assert sorted(train + val) == list(range(10))  # nothing leaks, nothing is lost, no test class
    assert len(held.train) == 2 * len(train)
    assert held.class_embeddings.tolist() == [[c, 10 * c] for c in train]
    assert held.train.class_names == [f"class {c}" for c in train]
    assert held.test.class_names == [f"class {c}" for c in val]
    assert (held.gallery, held.in_channels, held.name) == (None, 1, "toy")
    assert data.num_classes == 10 and classes_of(data.train) == list(range(10))  # as it was


def test_hold_out_is_random_and_repeatable():
    data = make_data(40)
    first, same, other = (classes_of(data.hold_out(0.5, seed=seed).test) for seed in (0, 0, 1))
    assert first == same != other
    assert first != list(range(20)) and first != list(range(20, 40))
    state = torch.get_rng_state()
    data.hold_out(0.5, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_hold_out_keeps_transforms_apart():
    data = make_data()
    data.train.transform, data.test.transform = (lambda image: image + 100), (lambda image: image + 200)
    held = data.hold_out(0.3)
    assert held.train[0][0].min() >= 100 and held.train[0][0].max() < 200
    assert held.test[0][0].min() >= 200  # validation images are treated as test images
    held.train.transform = held.test.transform = None
    assert held.train[0][0].max() < 10 and held.test[0][0].max() < 10
    assert data.train[0][0].min() >= 100 and data.test[0][0].min() >= 200


def test_hold_out_without_embeddings_and_with_gallery():
    data = make_data(class_embeddings=None)
    data = dataclasses.replace(data, gallery=data.test)
    held = data.hold_out(2)
    assert held.class_embeddings is None
    assert held.gallery is None
    assert data.gallery is not None


@pytest.mark.parametrize(
    ("val_classes", "error", "message"),
    [
        (1, ValueError, "val_classes must be 2 to 8 of 10 classes, got 1"),
        (9, ValueError, "val_classes must be 2 to 8 of 10 classes, got 9"),
        (0.0, ValueError, r"val_classes must be a share between 0 and 1 or an integer, got 0\.0"),
        (1.0, ValueError, r"got 1\.0"),
        (float("nan"), ValueError, "got nan"),
        (True, TypeError, "val_classes must be a share or a number of classes, got True"),
        ("3", TypeError, "got '3'"),
    ],
)
def test_bad_shares(val_classes, error, message):
    with pytest.raises(error, match=message):
        make_data().hold_out(val_classes)


def test_too_few_classes():
    with pytest.raises(ValueError, match="val_classes must cut off >= 2 classes and leave >= 2, got 3 classes in all"):
        make_data(3).hold_out(0.5)
    assert make_data(4).hold_out(0.1).num_classes == 2


def test_bad_fields():
    with pytest.raises(ValueError, match=r"class_embeddings must have shape \(10, E\), got \(9, 2\)"):
        make_data(class_embeddings=torch.ones(9, 2))
    with pytest.raises(ValueError, match="in_channels must be 1 or 3, got 4"):
        make_data(in_channels=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_data().name = "other"
