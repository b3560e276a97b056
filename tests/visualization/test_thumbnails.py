import numpy as np
import pytest
import torch
from PIL import Image

from pml_ext.visualization.thumbnails import as_image, image_at, load_thumbnails


class Series:
    """What pandas has: ``[]`` asks by label, ``iloc`` by place."""

    def __init__(self, values, labels):
        self.iloc, self.by_label = values, dict(zip(labels, values, strict=True))

    def __getitem__(self, label):
        return self.by_label[label]


def gray(value):
    return np.full((2, 2), value, dtype=np.uint8)


def test_a_series_is_asked_by_place():
    images = Series([gray(10), gray(20)], labels=[1, 0])  # of rows that were sorted
    assert [image_at(images, i).getpixel((0, 0))[0] for i in (0, 1)] == [10, 20]
    assert load_thumbnails(images, [1])[1].getpixel((0, 0))[0] == 20
    assert image_at([gray(10), gray(20)], 1).getpixel((0, 0))[0] == 20


@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [
        ("missing.png", ValueError, r"^it: cannot read image missing\.png: "),
        (("missing.png", 3), ValueError, r"^it: cannot read image missing\.png: "),
        (Image.new("L", (0, 3)), ValueError, r"^it must have pixels, got a size of \(0, 3\)$"),
        (torch.zeros(4, 4, 3), ValueError, r"got shape \(4, 4, 3\); they are the first dimension of a tensor$"),
        (np.zeros((3, 4, 4)), ValueError, r"got shape \(3, 4, 4\); they are the last dimension of an array$"),
        ((), TypeError, "^it must be an image, a path, or a tuple that begins with one, got tuple$"),
        (b"missing.png", TypeError, "a tuple that begins with one, got bytes$"),
    ],
)
def test_what_is_no_image(item, kind, message):
    with pytest.raises(kind, match=message):
        as_image(item, "it")
