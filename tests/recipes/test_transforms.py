from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pml_ext.recipes import recipe
from pml_ext.recipes.settings import HALVES, IMAGENET
from pml_ext.recipes.transforms import make_transforms


def transforms(**settings):
    return recipe("proxy_anchor", 3, width=4, **settings).transforms


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["tensor", "PIL gray", "PIL RGB", "PIL RGBA"])
def test_any_image_becomes_a_float_tensor(kind, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    if kind == "tensor":
        image = torch.from_numpy(pixels)[None].expand(channels, 28, 28)
    else:
        image = Image.fromarray(pixels).convert({"PIL gray": "L", "PIL RGB": "RGB", "PIL RGBA": "RGBA"}[kind])
    made = transforms(in_channels=channels, image_size=32)
    for transform in made:
        transformed = transform(image)
        assert transformed.shape == (channels, 32, 32) and transformed.dtype == torch.float32
        assert -1 <= transformed.min() < -0.5 and 0.5 < transformed.max() <= 1


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "LA"])
def test_other_modes_are_converted(mode):
    image = Image.new("RGB", (28, 28), (255, 0, 0)).convert(mode)
    transformed = transforms(in_channels=3, image_size=28).test(image)
    expected = transforms(in_channels=3, image_size=28).test(image.convert("RGB"))
    assert torch.equal(transformed, expected)


def test_pixels_without_a_fixed_range_are_refused():
    with pytest.raises(ValueError, match="images must have values with a fixed range, got PIL's mode 'F'"):
        transforms(image_size=28).test(Image.new("F", (28, 28)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint16, torch.int8, torch.bool])
def test_dtypes_that_would_be_scaled_to_black_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"images must be uint8, or floating point in \[0, 1\], got {dtype}"):
        transforms(image_size=28).test(torch.ones(3, 28, 28).to(dtype))


def test_arrays_are_refused():
    with pytest.raises(TypeError, match=r"images must be PIL images or tensors \(C, H, W\), got a ndarray"):
        transforms(image_size=28).train(np.zeros((28, 28, 3), np.uint8))


def test_floating_point_images_are_not_scaled():
    image = torch.rand(3, 28, 28)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(transforms(image_size=28).test(image.to(dtype)), image * 2 - 1)


def test_small_images_are_shifted_in_training_only():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[:, 10:18, 10:18] = 255
    made = transforms(in_channels=1, image_size=28)
    seen = {tuple((made.train(image)[0] > 0).nonzero()[0].tolist()) for _ in range(60)}
    assert len(seen) > 20 and all(abs(y - 10) <= 3 and abs(x - 10) <= 3 for y, x in seen)
    torch.testing.assert_close(made.test(image), image.float() / 127.5 - 1)


def test_gray_images_are_not_flipped_and_color_ones_are():
    for channels in (1, 3):
        image = torch.zeros(channels, 16, 16, dtype=torch.uint8)
        image[:, :, :8] = 255
        made = transforms(in_channels=channels, image_size=16)
        left = [bool(made.train(image)[0, 8, 4] > 0) for _ in range(40)]
        assert all(left) == (channels == 1)
    assert not all(
        bool(transforms(in_channels=1, image_size=16, flip=True).train(image)[0, 8, 4] > 0) for _ in range(40)
    )


def test_paper_transforms():
    image = Image.fromarray(np.full((300, 400, 3), 128, dtype=np.uint8))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((128 / 255 - mean) / std)[:, None, None]
    for name, size in (("proxy_anchor", 224), ("intra_batch", 227)):
        made = recipe(name, 3, preset="paper:cub", pretrained=False).transforms
        assert made.train(image).shape == (3, size, size)
        torch.testing.assert_close(made.test(image), expected.expand(3, size, size))
    erased = torch.stack([made.train(image) for _ in range(30)])
    whole = (erased - expected).abs().amax((1, 2, 3)) < 1e-5
    assert 0 < whole.sum() < 30  # some are erased in part, to the authors' value
    assert erased[~whole][0].sub(torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]).abs().amin() < 1e-6


def test_images_are_padded_to_squares():
    image = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    transformed = transforms(augmentation="square", image_size=40, in_channels=3).test(image)
    assert (transformed[:, 10:30] > 0).all() and (transformed[:, :10] < 0).all() and (transformed[:, 30:] < 0).all()


def of_a_paper(**settings):
    """Return transforms like those of a paper's preset, without its network."""
    usual = {"image_size": 224, "resize": 256, "in_channels": 3, "preset": "paper:cub", "flip": None}
    mean, std = IMAGENET if "preset" not in settings else [x[: settings.get("in_channels", 3)] for x in HALVES]
    usual |= {"crop_scale": 0.08, "pixel_mean": mean, "pixel_std": std}
    return make_transforms(SimpleNamespace(**(usual | settings)))


@pytest.mark.parametrize("size", [(8000, 2), (2, 8000)])
def test_thin_images_do_not_grow(size, monkeypatch):
    """8000 x 2 pixels with a shorter side of 256 would be a million pixels wide."""
    grown = []
    resize, pad = v2.functional.resize, v2.functional.pad

    def watched(function):
        def call(image, *args, **kwargs):
            grown.append(function(image, *args, **kwargs))
            return grown[-1]

        return call

    monkeypatch.setattr(v2.functional, "resize", watched(resize))
    monkeypatch.setattr(v2.functional, "pad", watched(pad))
    for augmentation in (None, "square", "crop"):
        for transform in of_a_paper(augmentation=augmentation):
            assert transform(Image.new("RGB", size)).shape == (3, 224, 224)
    assert grown and max(image.numel() for image in grown) <= 3 * 256 * 256 * 16


def test_the_middle_of_a_thin_image_is_seen():
    """A crop before the resize has the pixels of one after it."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 10, 400), dtype=np.uint8))
    made = of_a_paper(augmentation=None, image_size=32, resize=40)
    whole = v2.functional.center_crop(v2.functional.resize(image, [40], antialias=True), 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(made.test(image), (whole / 255 - mean) / std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_lie_on_white(channels):
    image = Image.new("RGBA", (2, 1))
    image.putdata([(90, 90, 90, 255), (0, 0, 0, 0)])
    made = of_a_paper(augmentation=None, in_channels=channels, image_size=2, resize=2, preset="small")
    tensor = torch.tensor([[90, 0]] * 3 + [[255, 0]], dtype=torch.uint8)[:, None]
    for given in (image, tensor, tensor / 255, tensor[2:], tensor[2:] / 255):
        seen = made.test(given)
        assert seen.shape == (channels, 2, 2)
        torch.testing.assert_close(
            seen[:, 0],
            torch.tensor([90 / 127.5 - 1, 1.0]).expand(channels, 2),
            atol=0.01,
            rtol=0,  # torchvision cuts grays off
        )
