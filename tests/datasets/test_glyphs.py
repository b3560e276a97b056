import sys
import time
import unicodedata

import numpy as np
import pytest
import torch

from benchmarks.glyph_classes import CATEGORIES, base_letter, count_agreements
from pml_ext.datasets import Glyphs, glyphs
from pml_ext.datasets.glyph_characters import TEST_CHARACTERS, TRAIN_CHARACTERS
from pml_ext.datasets.glyphs import font_paths


def test_classes_are_disjoint_and_labels_tell_them_apart():
    train, test, both = (Glyphs(split, samples_per_class=1) for split in ("train", "test", "train+test"))
    assert train.num_classes == test.num_classes == 267
    assert not set(train.classes) & set(test.classes)
    assert not set(train.targets.tolist()) & set(test.targets.tolist())
    assert train.targets.unique().tolist() == list(range(train.num_classes))
    assert both.classes == train.classes + test.classes
    assert both.class_to_idx == train.class_to_idx | test.class_to_idx
    assert torch.equal(both.data, torch.cat([train.data, test.data]))
    assert torch.equal(both.targets, torch.cat([train.targets, test.targets]))


def test_characters_are_what_the_docstring_says():
    characters = TRAIN_CHARACTERS + TEST_CHARACTERS
    assert len(set(characters)) == len(characters) == 534
    assert {unicodedata.category(c) for c in characters} == CATEGORIES
    assert len(font_paths()) == 16
    assert not {base_letter(c) for c in TRAIN_CHARACTERS} & {base_letter(c) for c in TEST_CHARACTERS}
    assert not Glyphs("test", samples_per_class=1).class_names[0].startswith("LATIN")
    assert "GREEK SMALL LETTER BETA" in Glyphs("train+test", samples_per_class=1).class_names


@pytest.mark.slow
def test_there_are_no_twins():
    """No two characters agree in 8 faces, and no training character looks like a test character in any face."""
    agreements = count_agreements(TRAIN_CHARACTERS + TEST_CHARACTERS)
    np.fill_diagonal(agreements, 0)
    assert agreements.max() < 8
    n = len(TRAIN_CHARACTERS)
    assert not agreements[:n, n:].any()
    assert agreements.any()  # or the comparison would find nothing ever


def test_deterministic_and_prefix():
    first, same, longer = (Glyphs("test", samples_per_class=n, seed=3) for n in (2, 2, 17))
    assert torch.equal(first.data, same.data)
    assert torch.equal(first.data.view(267, 2, 32, 32), longer.data.view(267, 17, 32, 32)[:, :2])
    assert not torch.equal(first.data, Glyphs("test", samples_per_class=2, seed=4).data)
    repeated = longer.data.view(267, 17, 32, 32)  # sample 16 has the face of sample 0, with another jitter
    assert (repeated[:, 0] != repeated[:, 16]).flatten(1).any(1).all()


@pytest.mark.parametrize("image_size", [16, 32, 45])
def test_images(image_size):
    dataset = Glyphs("train", samples_per_class=16, image_size=image_size)
    assert dataset.data.shape == (267 * 16, image_size, image_size)
    assert dataset.data.dtype == torch.uint8
    ink = dataset.data.float().mean(dim=(1, 2)) / 255
    assert ink.min() > 0.002  # nothing is blank
    border = torch.cat([dataset.data[:, 0], dataset.data[:, -1], dataset.data[:, :, 0], dataset.data[:, :, -1]], dim=1)
    assert (border > 128).any(1).float().mean() < 0.02  # hardly anything is cut off


def test_jitter_keeps_to_its_limits(monkeypatch):
    """A plus sign's center moves by up to 6% of the side; its width varies by up to 15% and a little rotation."""
    monkeypatch.setitem(glyphs._SPLITS, "train", "+")
    plus = Glyphs("train", samples_per_class=640, image_size=64).data[::16].float()  # one face
    grid = torch.arange(64.0)
    mass = plus.sum(dim=(1, 2))
    x, y = (plus.sum(1) @ grid) / mass, (plus.sum(2) @ grid) / mass
    for center in (x, y):
        assert 2 < center.max() - center.min() < 2 * 0.06 * 64 * 1.15 + 1.5
    area = (mass / 255).sqrt()
    assert 1.1 < area.max() / area.min() < 1.15 / 0.85 * 1.1
    dx, dy = grid - x[:, None], grid - y[:, None]  # (n, 64)
    fourth = (plus * (dx[:, None, :] * dy[:, :, None]) * (dx[:, None, :] ** 2 - dy[:, :, None] ** 2)).sum(dim=(1, 2))
    even = (plus * (dx[:, None, :] ** 4 - 6 * (dx[:, None, :] * dy[:, :, None]) ** 2 + dy[:, :, None] ** 4)).sum(
        dim=(1, 2)
    )
    angle = torch.rad2deg(torch.atan2(4 * fourth, even) / 4)  # of a cross, modulo 90 degrees
    assert 12 < angle.abs().max() < 17
    assert angle.min() < -8 and angle.max() > 8


def test_every_character_has_its_own_jitter(monkeypatch):
    monkeypatch.setitem(glyphs._SPLITS, "train", "+o")
    images = Glyphs("train", samples_per_class=640).data.view(2, 640, 32, 32)[:, ::16].float()  # one face
    x = (images.sum(2) @ torch.arange(32.0)) / images.sum(dim=(2, 3))  # (2, 40)
    assert torch.corrcoef(x)[0, 1].abs() < 0.5


def test_conventions_of_torchvision():
    dataset = Glyphs("test", transform=np.asarray, target_transform=lambda label: label - 267, samples_per_class=3)
    image, label = dataset[4]
    assert np.array_equal(image, dataset.data[4].numpy())
    assert label == 1
    image, label = Glyphs("test", samples_per_class=3)[4]
    assert (image.mode, image.size, label) == ("L", (32, 32), 268)
    assert len(dataset) == 801
    assert "801 images of 267 characters" in repr(dataset)
    assert isinstance(dataset, torch.utils.data.Dataset)


@pytest.mark.slow
def test_fast():
    start = time.process_time()
    assert len(Glyphs("train+test", samples_per_class=20)) == 10680
    assert time.process_time() - start < 20  # 2 s of processor time on an idle machine


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "val"}, r"split must be one of train, test, train\+test, got 'val'"),
        ({"samples_per_class": 0}, "samples_per_class must be >= 1, got 0"),
        ({"image_size": 4}, "image_size must be >= 8, got 4"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Glyphs(**kwargs)


def test_tells_how_to_install_the_fonts(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Glyphs needs matplotlib: pip install 'pml-ext\[visualization\]'$"):
        Glyphs()
