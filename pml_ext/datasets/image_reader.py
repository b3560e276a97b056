"""How the image in a file becomes an RGB image."""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, by content and not by name: other readers of PIL start programs or fetch data."""

_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_TURNED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation: PIL's Image.Transpose that undoes it
_warned: set[str] = set()  # one warning in each process, however many readers and images there are


class BrokenImageError(ValueError):
    """An image cannot be read."""


@dataclass(frozen=True)
class ImageReader:
    """Read the image in a file as an RGB image of PIL.

    Args:
        background: What shows through where an image is transparent: a name or code as in CSS ("black", "#fa0"), or
            three integers 0 to 255.
        turn: Whether to turn and mirror the image as its EXIF data says, as viewers do. Phones and cameras store
            upright photos on their side.
        white: The value that becomes white in gray images of 16 bits: 65535; 1023 or 4095 for sensors of 10 or 12
            bits, larger values are cut off; "largest", the largest value found: by ``open_data`` in the training
            images, by ``ImageFolder`` and the like in all of theirs, by a reader alone in the one file.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; on call: if the file is missing, no regular file, no BMP, GIF, JPEG,
            PNG, PPM, TIFF or WebP by its content, truncated, has values without a fixed range (mode F, most of mode I),
            or has 16-bit colors, which PIL cuts to 8 bits, where ``white`` is not 65535.

    Warns:
        UserWarning: Once, of the first file of 16 bits whose values reach less than a quarter of the range: it becomes
            nearly black.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     path = f"{root}/logo.png"
        ...     Image.new("RGBA", (8, 8)).save(path)  # black, and transparent
        ...     ImageReader()(path).getpixel((0, 0)), ImageReader(background="#fa0")(path).getpixel((0, 0))
        ((255, 255, 255), (255, 170, 0))
    """

    background: str | tuple[int, int, int] = "white"
    turn: bool = True
    white: int | str = 65535

    def __post_init__(self) -> None:
        _rgb(self.background)
        if not isinstance(self.turn, bool):
            raise TypeError(f"turn must be True or False, got {self.turn!r}")
        if isinstance(self.white, bool) or not isinstance(self.white, Integral | str):
            raise TypeError(f"white must be an integer or 'largest', got {self.white!r}")
        if self.white != "largest" if isinstance(self.white, str) else not 1 <= self.white <= 65535:
            raise ValueError(f"white must be 1 to 65535 or 'largest', got {self.white!r}")

    def __call__(self, path: str | os.PathLike[str]) -> Any:
        """Return the image, fully loaded."""
        with _opened(path) as image:
            return self._converted(image, path)

    def _converted(self, image: Any, path: str | os.PathLike[str]) -> Any:
        raw, wide = _raw_mode(image), _is_wide(image)
        if image.mode in ("I", "F") and not wide:
            raise ValueError(f"its mode {image.mode!r} has no fixed range of values")
        stored = _orientation(image) if image.format == "TIFF" else None
        image.load()
        left = _orientation(image)
        if self.turn:
            image = _transposed(image, left)
        elif stored not in (None, left):  # PIL turns TIFF while it loads: back again
            image = _transposed(image, {6: 8, 8: 6}.get(stored, stored))
        if wide:
            return self._narrowed(np.asarray(image), path, image.info.get("transparency"))
        if ";16" in raw and self.white != 65535:
            raise ValueError(f"white must be 65535 for 16-bit colors, which PIL cuts to 8 bits, got {self.white!r}")
        flat = flatten(image, self.background)
        if ";16" in raw:
            _warn_of_dark(256 * max(high for _, high in image.convert("RGB").getextrema()) + 255, path)
        return flat

    def _narrowed(self, values: Any, path: str | os.PathLike[str], transparent: Any) -> Any:
        from PIL import Image  # on use: images in memory need no image library

        if self.white == 65535:
            _warn_of_dark(int(values.max()), path)
            narrow = values >> 8
        else:
            white = max(int(values.max()), 1) if isinstance(self.white, str) else int(self.white)
            narrow = (np.minimum(values, white).astype(np.uint32) * 255 + white // 2) // white
        colors = np.repeat(narrow.astype(np.uint8)[..., None], 3, axis=2)
        if transparent is not None:
            colors[values == transparent] = _rgb(self.background)
        return Image.fromarray(colors)


def read_image(path: str | os.PathLike[str]) -> Any:
    """Return the image in a file as ``ImageReader()`` reads it."""
    return ImageReader()(path)


def flatten(image: Any, background: str | tuple[int, int, int] = "white") -> Any:
    """Return an image of PIL as a new RGB image, on a background where it is transparent."""
    from PIL import Image  # on use: images in memory need no image library

    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode in ("RGBa", "La"):  # colors that are multiplied by alpha
        image = image.convert(image.mode.upper())
    behind = Image.new("RGBA", image.size, (*_rgb(background), 255))
    return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")


def has_16_bits(image: Any) -> bool:
    """Whether the file of an image of PIL that is not loaded yet has 16 bits for each value."""
    return image.mode.startswith("I") or ";16" in _raw_mode(image)


def largest_value(path: str | os.PathLike[str]) -> int:
    """Return the largest value of a gray image of 16 bits; 65535 of colors, which PIL cuts; 0 of other images."""
    with _opened(path) as image:
        if ";16" in _raw_mode(image) and not _is_wide(image):
            return 65535
        return int(np.asarray(image).max()) if _is_wide(image) else 0


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open an image of PIL; whatever is wrong with it, here or where it is used, becomes a BrokenImageError."""
    from PIL import Image  # on use: images in memory need no image library

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, EOFError, struct.error and more
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _OF_THE_MACHINE:
            raise
        raise BrokenImageError(f"cannot read image {Path(path)}: {error}") from error


def _is_wide(image: Any) -> bool:
    """Whether an image that is not loaded yet is gray with 16 bits."""
    raw = _raw_mode(image)
    return image.mode.startswith("I;16") or (image.mode == "I" and (image.format == "PPM" or raw[:4] == "I;16"))


def _rgb(background: Any) -> tuple[int, int, int]:
    if isinstance(background, str):
        from PIL import ImageColor  # on use: images in memory need no image library

        try:
            return ImageColor.getrgb(background)[:3]
        except ValueError:
            raise ValueError(f"background must be a color, such as 'white' or '#ffffff', got {background!r}") from None
    if not isinstance(background, tuple) or not all(type(value) is int for value in background):
        raise TypeError(f"background must be a color name or three integers, got {background!r}")
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise ValueError(f"background must have three values of 0 to 255, got {background}")
    red, green, blue = background
    return red, green, blue


def _raw_mode(image: Any) -> str:
    """Return how the values lie in the file, "RGB;16B" for instance, or nothing."""
    arguments = image.tile[0][3] if image.tile and len(image.tile[0]) > 3 else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def _orientation(image: Any) -> int:
    """Return EXIF's orientation: 1 (upright) if there is none that can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged data beside pixels that are whole
        return 1
    return value if value in _TURNED else 1


def _transposed(image: Any, orientation: int) -> Any:
    return image.transpose(_TURNED[orientation]) if orientation in _TURNED else image


def _warn_of_dark(largest: int, path: str | os.PathLike[str]) -> None:
    if 0 < largest < 2**14 and "dark" not in _warned:
        _warned.add("dark")
        warnings.warn(
            f"{Path(path)} has 16 bits and no value above {largest}: it becomes nearly black, and others may; "
            "ImageReader(white=4095) is for values of 12 bits, white='largest' for any",
            stacklevel=2,
        )
