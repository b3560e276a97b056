"""Small pictures of many kinds of images, as text for a page."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pml_ext.datasets.image_reader import flatten, read_image

_QUALITIES = ((96, 80), (80, 72), (64, 65), (48, 55), (32, 45), (24, 30))  # longest side, WebP quality


def check_images(name: str, images: Any, length: int) -> None:
    """Check what can be known of images before they are read.

    Args:
        name: Name of the argument, for messages.
        images: The images, as ``retrieval_report`` takes them.
        length: How many there must be.

    Raises:
        TypeError: If they are of no known kind, or a tensor of another dtype.
        ValueError: If there are more or fewer, or the shape of a tensor is another.
    """
    kinds = "a tensor, a sequence of images or paths, or a data set with a length"
    sized = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if not sized or isinstance(images, str | bytes | dict):
        raise TypeError(f"{name} must be {kinds}, got {type(images).__name__}")
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"{name} must be uint8 or floats in 0 to 1, got {images.dtype}")
        if images.ndim != 3 and (images.ndim != 4 or images.shape[1] not in (1, 3)):
            raise ValueError(
                f"{name} must have shape (N, H, W), (N, 1, H, W) or (N, 3, H, W), got {tuple(images.shape)}"
            )
    if len(images) != length:
        raise ValueError(f"{name} must have one entry for each of {length} embeddings, got {len(images)}")


def load_thumbnails(
    images: Any, indices: Sequence[int], progress: bool = False, name: str = "images"
) -> dict[int, Any]:
    """Read some images, in the order of their indices, and return them as small PIL images.

    Raises:
        TypeError: If an item is not an image, path or tuple that begins with one; the message has its index.
        ValueError: If an item cannot be read, or its shape or values break a rule.
    """
    thumbnails = {}
    for index in tqdm(sorted(set(indices)), desc="thumbnails", disable=not progress):
        image = image_at(images, index, name)
        image.thumbnail((_QUALITIES[0][0],) * 2)
        thumbnails[index] = image
    return thumbnails


def encode_thumbnails(
    thumbnails: dict[int, Any], shown: Sequence[int], max_bytes: int, max_side: int
) -> dict[int, str]:
    """Return ``data:`` addresses of images, as large and as good as fits.

    Args:
        thumbnails: Some images by index.
        shown: Indices in the order of the page, an index for each time it is shown.
        max_bytes: Size of all addresses together, in bytes. The smallest size is taken where none fits.
        max_side: The longest side in pixels.
    """
    for side, quality in _QUALITIES:
        if side > max_side:
            continue
        addresses: dict[int, str] = {}
        size = 0
        for index in shown:
            if index not in addresses:
                addresses[index] = _encode(thumbnails[index], side, quality)
            size += len(addresses[index])
            if size > max_bytes and side > _QUALITIES[-1][0]:
                break
        else:
            return addresses
    return addresses


def _encode(image: Any, side: int, quality: int) -> str:
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_at(images: Any, index: int, name: str = "images") -> Any:
    """Return an RGB image of PIL, one of those that ``retrieval_report`` takes; raises what ``as_image`` does."""
    by_place = getattr(images, "iloc", images)  # a Series of pandas would take the index for one of its labels
    return as_image(by_place[index], f"{name}[{index}]")


def as_image(item: Any, name: str) -> Any:
    """Return an image, a path, or the first of a tuple as an RGB image of PIL; numbers are uint8 or floats in 0 to 1.

    Raises:
        TypeError: If it is none of these, or numbers have another dtype; the message has its name.
        ValueError: If it cannot be read, or its shape or values break a rule.
    """
    from PIL import Image  # on use: tensors need no image library

    if isinstance(item, tuple | list) and item:
        item = item[0]  # of (image, label)
    if isinstance(item, str | os.PathLike):
        try:
            return read_image(os.fspath(item))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if isinstance(item, Image.Image):
        if 0 in item.size:
            raise ValueError(f"{name} must have pixels, got a size of {item.size}")
        if item.mode in ("I", "F"):
            raise ValueError(f"{name} must have values of a fixed range, got PIL mode {item.mode!r}")
        if item.mode.startswith("I;16"):  # convert() would clip at 255
            item = Image.fromarray((np.asarray(item) >> 8).astype(np.uint8))
        return flatten(item)  # a copy, or thumbnail() would shrink the caller's image
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        item = item.float() if item.is_floating_point() else item  # NumPy has no bfloat16
        array = item.permute(1, 2, 0).numpy() if item.ndim == 3 else item.numpy()
    elif isinstance(item, np.ndarray):
        array = item
    else:
        raise TypeError(f"{name} must be an image, a path, or a tuple that begins with one, got {type(item).__name__}")
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        where = "the first dimension of a tensor" if isinstance(item, Tensor) else "the last dimension of an array"
        raise ValueError(f"{name} must have 1 or 3 channels, got shape {tuple(item.shape)}; they are {where}")
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not -1e-3 <= low <= high <= 1 + 1e-3:  # NaN, too
            raise ValueError(
                f"{name} must have floats in 0 to 1, got {low:.3g} to {high:.3g}; normalized for a network?"
            )
        array = (255 * array.clip(0, 1)).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 or floats in 0 to 1, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
