from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pml_ext.datasets import ClassSubset, ImageFolder
from pml_ext.visualization.image_names import image_names, last_part

PATHS = ["photos/cat/1.jpg", "photos/cat/2.jpg", "photos/owl/1.jpg"]
SHORT = ["cat/1.jpg", "cat/2.jpg", "owl/1.jpg"]


class Series(list):
    iloc = property(list)


@pytest.mark.parametrize("kind", [list, tuple, np.array, Series, lambda x: [Path(p) for p in x]])
def test_paths_are_names_below_their_common_folder(kind):
    assert image_names("names", None, kind(PATHS), 3) == SHORT
    assert image_names("names", kind(PATHS), torch.zeros(3, 4, 4), 3) == PATHS  # those given, as they are


def test_files_of_a_data_set(tmp_path):
    for name in SHORT:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    folder = ImageFolder(tmp_path)
    assert image_names("names", None, folder, 3) == SHORT
    assert image_names("names", None, ClassSubset(folder, [1]), 1) == ["owl/1.jpg"]


@pytest.mark.parametrize(
    "images",
    [
        None,
        torch.zeros(3, 4, 4),
        np.zeros((3, 4, 4)),
        [Image.new("L", (4, 4))] * 3,
        [PATHS[0], Image.new("L", (4, 4)), PATHS[1]],
        torch.utils.data.Subset(torch.zeros(5, 4, 4), [0, 1, 2]),
    ],
)
def test_what_has_no_names(images):
    assert image_names("names", None, images, 3) is None


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        ("abc", TypeError, "names must be a sequence of strings or paths, got str"),
        ({1: "a"}, TypeError, "names must be a sequence of strings or paths, got dict"),
        (iter("abc"), TypeError, "names must be a sequence of strings or paths, got str_.*iterator"),
        (["a", "b"], ValueError, "names must have one entry for each of 3 embeddings, got 2"),
        (["a", "b", 3], TypeError, "names must be strings or paths, got 3 at position 2"),
    ],
)
def test_bad_names(names, kind, message):
    with pytest.raises(kind, match=message):
        image_names("names", names, None, 3)


@pytest.mark.parametrize(
    ("name", "part"), [("a/b/c.jpg", "c.jpg"), ("a\\c.jpg", "c.jpg"), ("c", "c"), ("a/", "a"), ("/", "")]
)
def test_last_part(name, part):
    assert last_part(name) == part
