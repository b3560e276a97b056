import numpy as np
import pytest
import torch

from pml_ext.visualization import attention_overlay


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(8, 6),
        torch.rand(1, 8, 6),
        torch.rand(3, 8, 6),
        (255 * torch.rand(3, 8, 6)).byte(),
        np.zeros((8, 6)),
        np.zeros((8, 6, 3), dtype=np.uint8),
        "pil L",
        "pil RGB",
    ],
    ids=lambda image: image if isinstance(image, str) else f"{type(image).__name__} {image.dtype} {tuple(image.shape)}",
)
def test_image_forms(image):
    if isinstance(image, str):
        from PIL import Image

        image = Image.new(image.split()[1], (6, 8), 100)
    overlay = attention_overlay(image, torch.rand(2, 3))
    assert overlay.shape == (8, 6, 3)
    assert overlay.dtype == np.uint8


def test_colors():
    """Bright where attention is large; the image alone with alpha 0, the colors alone with alpha 1."""
    attention = torch.tensor([[0.0, 1.0]])
    image = torch.full((4, 8), 0.5)
    assert (attention_overlay(image, attention, alpha=0) == 128).all()
    colors = attention_overlay(image, attention, alpha=1, cmap="gray")
    assert (colors[:, 0] == 0).all()
    assert (colors[:, -1] == 255).all()
    assert (attention_overlay(image, torch.zeros(2, 2), alpha=1, cmap="gray") == 0).all()
    torch.testing.assert_close(attention_overlay(image, 7 * attention), attention_overlay(image, attention))


@pytest.mark.parametrize("half", [0.5, 128])
def test_arrays_are_drawn_as_they_are(half):
    image = np.full((4, 8), half, dtype=np.uint8 if half == 128 else np.float32)
    assert (attention_overlay(image, torch.zeros(1, 1), alpha=0) == 128).all()


def test_brightest():
    attention = torch.tensor([[0.0, 0.5]])
    colors = attention_overlay(torch.zeros(4, 8), attention, alpha=1, cmap="gray", brightest=1.0)
    assert colors[:, -1].tolist() == [[128] * 3] * 4 or colors[:, -1].tolist() == [[127] * 3] * 4


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"brightest must be > 0, got 0"):
        attention_overlay(torch.rand(4, 4), torch.rand(2, 2), brightest=0)
    with pytest.raises(ValueError, match=r"alpha must lie in 0 to 1, got 1\.5"):
        attention_overlay(torch.rand(4, 4), torch.rand(2, 2), alpha=1.5)
    with pytest.raises(ValueError, match=r"attention must have shape \(h, w\), got \(1, 2, 2\)"):
        attention_overlay(torch.rand(4, 4), torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match=r"image must have 1 or 3 channels, got shape \(4, 4, 4\)"):
        attention_overlay(torch.rand(4, 4, 4), torch.rand(2, 2))
    with pytest.raises(ValueError, match="image must have floats in 0 to 1, got 3 to 3; normalized for a network"):
        attention_overlay(torch.full((4, 4), 3.0), torch.rand(2, 2))
