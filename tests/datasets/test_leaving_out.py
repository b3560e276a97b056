"""Data sets without some of their files; tests/test_general_commands.py has trainings with such."""

import pytest
import torch
from PIL import Image

from pml_ext.datasets import open_data
from pml_ext.datasets.leaving_out import (
    broken_files,
    image_names,
    replaced_files,
    replacing_broken,
    without,
    without_broken,
)


@pytest.fixture
def data(tmp_path):
    """Four classes of three images, which show the number of their class and their own."""
    for c, name in enumerate(("ant", "bee", "cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (2, 2), 10 * c + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_named_files_are_left_out(data):
    opened = open_data(data, split_seed=None)
    names = image_names(opened)
    assert len(names) == 12 and {"train/ant/0.png", "test/dog/2.png"} < names
    less = without(opened, ["train/ant/1.png", "test/ant/2.png"])
    assert image_names(less) == names - {"train/ant/1.png"}
    assert [image.getpixel((0, 0))[0] for image, _ in less.train] == [0, 2, 10, 11, 12]
    assert less.train.labels.tolist() == [0, 0, 1, 1, 1] and len(opened.train) == 6


def test_classes_without_other_files_are_left_out(data):
    """As when these files were broken: labels count on without a gap."""
    opened = open_data(data, split_seed=None)
    less = without(opened, [f"test/cat/{i}.png" for i in range(3)])
    assert less.test.class_names == ["dog"] and less.test.labels.tolist() == [0, 0, 0]
    assert less.train.labels.tolist() == opened.train.labels.tolist()
    with pytest.raises(ValueError, match="that can be read, got 1 and 2, and not ant"):
        without(opened, [f"train/ant/{i}.png" for i in range(3)])
    assert without(opened, ["train/ant/9.png"]) is opened


def test_broken_files_and_their_classes_are_left_out(data):
    (data / "cat" / "1.png").write_text("no image")
    for i in range(3):
        (data / "dog" / f"{i}.png").unlink()
        (data / "dog" / f"{i}.png").write_bytes(b"")
    opened = open_data(data, split_seed=None)
    broken = broken_files(opened)
    assert {name: sorted(places) for name, places in broken.items()} == {"train": [], "test": [1, 3, 4, 5]}
    assert "cannot identify" in broken["test"][1]
    kept, lost = without_broken(opened, broken)
    assert lost == ["dog"] and kept.test.class_names == ["cat"]
    assert [image.getpixel((0, 0))[0] for image, _ in kept.test] == [20, 22]
    (data / "cat" / "0.png").write_text("no image")
    (data / "cat" / "2.png").write_text("no image")
    with pytest.raises(ValueError, match=r"data must have .* that can be read, got 2 and 0, and not cat, dog"):
        without_broken(opened, broken_files(opened))


def test_images_take_the_place_of_broken_ones(data):
    opened = open_data(data, split_seed=None)
    (data / "bee" / "1.png").write_text("no image")
    view = replacing_broken(opened.train)
    with pytest.warns(UserWarning, match="another image of its class takes its place"):
        assert [image.getpixel((0, 0))[0] for image, _ in view] == [0, 1, 2, 10, 12, 12]
    assert replaced_files(view) == [str(data / "bee" / "1.png")]
    assert not opened.train.dataset.skip_broken
    assert replaced_files(open_data("glyphs").train) == []
    assert torch.equal(view.labels, opened.train.labels)
