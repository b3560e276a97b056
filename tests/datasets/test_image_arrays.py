import numpy as np
import pytest
import torch

from pml_ext.datasets import ImageArrays

GRAY = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
COLOR = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_items(make):
    gray, color = ImageArrays(make(GRAY), [7, -2, 7]), ImageArrays(make(COLOR), torch.tensor([0, 1, 0]))
    assert (gray.in_channels, color.in_channels, len(gray)) == (1, 3, 3)
    image, label = gray[1]
    assert type(label) is int and label == -2
    assert image.dtype == torch.uint8
    assert np.array_equal(image, GRAY[1][None])
    assert np.array_equal(color[2][0], COLOR[2].transpose(2, 0, 1))
    assert color[2][0].is_contiguous()
    assert gray.labels.dtype == torch.int64
    assert gray.labels.tolist() == [7, -2, 7]
    assert [label for _, label in gray] == [7, -2, 7]  # ends


def test_transform_may_be_set_and_names_are_kept():
    dataset = ImageArrays(
        GRAY, np.array([2, 0, 2], dtype=np.uint8), transform=lambda x: x + 1, class_names=["a", "b", "c"]
    )
    assert torch.equal(dataset[0][0], torch.from_numpy(GRAY[:1] + 1))
    dataset.transform = torch.Tensor.sum
    assert dataset[0][0] == GRAY[0].sum()
    assert dataset.class_names == ["a", "b", "c"]
    assert ImageArrays(GRAY, [0, 1, 2]).class_names is None


def test_the_data_stays_as_it_is():
    images = GRAY.copy()
    dataset = ImageArrays(images, [0, 1, 2], transform=lambda x: x.zero_())
    assert not dataset[2][0].any()
    assert np.array_equal(images, GRAY)
    images.flags.writeable = False
    assert ImageArrays(images[::-1], [0, 1, 2])[0][0].sum() == GRAY[2].sum()


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (GRAY.astype(np.float32), [0, 1, 2], TypeError, "images must have dtype uint8, got float32"),
        (torch.zeros(3, 4, 4), [0, 1, 2], TypeError, r"images must have dtype uint8, got torch\.float32"),
        (
            torch.empty(3, 4, 5, dtype=torch.uint8, device="meta"),
            [0, 1, 2],
            ValueError,
            "images must hold numbers, got",
        ),
        (GRAY[0], [0] * 4, ValueError, r"images must have shape \(N, H, W\) or \(N, H, W, 3\), got \(4, 5\)"),
        (COLOR[..., :1], [0, 1, 2], ValueError, r"\(N, H, W, 3\), got \(3, 4, 5, 1\)"),
        (GRAY[:0], [], ValueError, r"images must not be empty, got shape \(0, 4, 5\)"),
        (GRAY, [0, 1], ValueError, r"labels must have one entry for each of 3 images, got shape \(2,\)"),
        (GRAY, [[0], [1], [2]], ValueError, r"got shape \(3, 1\)"),
        (GRAY, [0.0, 1.0, 2.0], TypeError, "labels must have an integer dtype, got float64"),
        (GRAY, torch.ones(3, dtype=torch.bool), TypeError, r"labels must have an integer dtype, got torch\.bool"),
    ],
)
def test_bad_arrays(images, labels, error, message):
    with pytest.raises(error, match=message):
        ImageArrays(images, labels)


@pytest.mark.parametrize(
    ("labels", "names", "error", "message"),
    [
        ([0, 1, 2], ["a", "b"], ValueError, "a name for each label, got 2 names and labels 0 to 2"),
        ([0, -1, 1], ["a", "b"], ValueError, "got 2 names and labels -1 to 1"),
        ([0, 1, 2], "abc", TypeError, "class_names must be a sequence of strings, got 'abc'"),
        ([0, 1, 2], ["a", "b", 3], TypeError, "class_names must be a sequence of strings, got 3"),
    ],
)
def test_bad_names(labels, names, error, message):
    with pytest.raises(error, match=message):
        ImageArrays(GRAY, labels, class_names=names)


def test_labels_without_values():
    with pytest.raises(ValueError, match="labels must hold numbers, got a tensor on the meta device"):
        ImageArrays(np.zeros((2, 4, 4, 3), dtype=np.uint8), torch.zeros(2, dtype=torch.long, device="meta"))
