"""What is done to images before the network sees them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torchvision.transforms import v2

from pml_ext.datasets.image_reader import flatten
from pml_ext.recipes.settings import Settings


class Transforms(NamedTuple):
    """Transforms of PIL images or uint8 tensors to normalized float32 tensors ``(C, H, W)``."""

    train: Callable[[Any], torch.Tensor]
    test: Callable[[Any], torch.Tensor]


def make_transforms(settings: Settings) -> Transforms:
    """Return the transforms of a recipe.

    ``augmentation``: "shift" pads by an eighth of the side and crops; "crop" is a random part of ``crop_scale`` to 100%
    of the image; "crop+erase" erases a rectangle as well (IBC); "square" pads to a square and crops (ABE); None.
    """
    size, channels = settings.image_size, settings.in_channels
    known = (None, "shift", "crop", "crop+erase", "square")
    if settings.augmentation not in known:
        raise ValueError(f"augmentation must be one of {known}, got {settings.augmentation!r}")
    if channels not in (1, 3):
        raise ValueError(f"in_channels must be 1 or 3, got {channels}")
    image = [partial(_with_channels, channels=channels)]
    for name, numbers in (("pixel_mean", settings.pixel_mean), ("pixel_std", settings.pixel_std)):
        are_numbers = isinstance(numbers, list | tuple) and all(isinstance(x, int | float) for x in numbers)
        if not are_numbers or len(numbers) != channels or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{name} must be a list of {channels} finite numbers, got {numbers!r}")
    if not min(settings.pixel_std) > 0:
        raise ValueError(f"pixel_std must be > 0, got {settings.pixel_std}")
    number = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(settings.pixel_mean, settings.pixel_std)]
    resize = settings.resize or size
    if resize < size:
        raise ValueError(f"resize must be >= image_size = {size}, got {resize}")
    square = [_pad_to_square] if settings.augmentation == "square" else []
    both_sides = settings.preset in ("small", "finetune") or square
    whole = [partial(_resize, size=[resize, resize] if both_sides else [resize])]
    flip = channels == 3 if settings.flip is None else settings.flip
    augment: list[Any] = []
    if settings.augmentation in ("crop", "crop+erase"):
        augment = [v2.RandomResizedCrop(size, (settings.crop_scale, 1.0), antialias=True)]
    elif settings.augmentation == "shift":
        augment = [*whole, v2.RandomCrop(size, padding=size // 8)]
    else:
        augment = [*square, *whole, v2.RandomCrop(size)]
    if flip:
        augment.append(v2.RandomHorizontalFlip())
    erase = []
    if settings.augmentation == "crop+erase":
        erase = [v2.RandomErasing(0.5, (0.02, 0.4), (0.3, 3.3), value=[0.4914, 0.4822, 0.4465][:channels])]
    return Transforms(
        train=v2.Compose([*image, *augment, *number, *erase]),
        test=v2.Compose([*image, *square, *whole, v2.CenterCrop(size), *number]),
    )


def _with_channels(image: Any, channels: int) -> torch.Tensor:
    """Return a tensor of gray or RGB, on white where it is transparent."""
    if not isinstance(image, torch.Tensor):
        if not isinstance(getattr(image, "mode", None), str):
            raise TypeError(f"images must be PIL images or tensors (C, H, W), got a {type(image).__name__}")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(f"images must have values with a fixed range, got PIL's mode {image.mode!r}")
        opaque = flatten(image)
        converted: torch.Tensor = v2.functional.pil_to_tensor(opaque.convert("L") if channels == 1 else opaque)
        return converted
    if image.dtype != torch.uint8 and not image.is_floating_point():  # 200 of int64 would be black
        raise TypeError(f"images must be uint8, or floating point in [0, 1], got {image.dtype}")
    opaque = _on_white(image) if image.shape[0] in (2, 4) else image
    if opaque.shape[0] == channels:
        return opaque
    convert = v2.functional.rgb_to_grayscale if channels == 1 else v2.functional.grayscale_to_rgb
    return convert(opaque)


def _resize(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    if len(size) == 2 and list(image.shape[-2:]) == size:
        return image
    image = image if len(size) == 2 else _bounded(image)
    resized: torch.Tensor = v2.functional.resize(image, size, antialias=True)
    return resized


def _bounded(image: torch.Tensor) -> torch.Tensor:
    """Return the middle of an image that is longer than 16 times its width: 8000 x 2 pixels would grow to 800 MB."""
    height, width = image.shape[-2:]
    longest = 16 * min(height, width)
    if max(height, width) <= longest:
        return image
    cropped: torch.Tensor = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
    return cropped


def _on_white(image: torch.Tensor) -> torch.Tensor:
    colors, alpha = image[:-1], image[-1:]
    if image.dtype != torch.uint8:
        return colors * alpha + (1 - alpha)
    blended = colors.int() * alpha.int() + 255 * (255 - alpha.int())
    return blended.add(127).div(255, rounding_mode="floor").to(torch.uint8)


def _pad_to_square(image: torch.Tensor) -> torch.Tensor:
    image = _bounded(image)
    height, width = image.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    padded: torch.Tensor = v2.functional.pad(image, [left, top, side - width - left, side - height - top])
    return padded
