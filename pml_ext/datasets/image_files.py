"""Images in files: what the data sets on disk have in common."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pml_ext.datasets.image_reader import FORMATS, BrokenImageError, ImageReader, has_16_bits, largest_value
from pml_ext.datasets.labels import as_class_names, as_labels
from pml_ext.datasets.path_array import PathArray


class ImageFiles(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images in files, opened when asked for.

    Args:
        paths: Paths of the N images.
        labels: ``(N,)``, integers.
        transform: Applied to the PIL image, which is RGB.
        class_names: The name of label i at index i, or None.
        reader: How files are read. None: ``ImageReader()``. For ``white="largest"`` all files are read once.
        skip_broken: Whether another image of the class takes the place of one that cannot be read, which a warning
            names. For training: in a test, the other image would be found twice.

    Attributes:
        paths: A sequence of N strings, in one array.
        labels: ``(N,)``, int64 tensor.
        transform: May be set at any time.
        class_names: A list, or None.
        reader: May be set at any time.
        skip_broken: May be set at any time.
        broken: ``(N,)``, bool tensor: the images that could not be read while ``skip_broken`` was set. Processes that
            load images, and copies of the data set, share it.

    Raises:
        TypeError: If ``labels`` are not integers, or ``skip_broken`` no bool.
        ValueError: If labels do not match; on access: if a file cannot be read, or with ``skip_broken`` none of its
            class.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Any,
        transform: Callable[[Any], Any] | None = None,
        class_names: Sequence[str] | None = None,
        reader: ImageReader | None = None,
        skip_broken: bool = False,
    ) -> None:
        self.paths = PathArray(paths)
        self.labels = as_labels("labels", labels, len(self.paths))
        self.transform = transform
        self.class_names = as_class_names(class_names, self.labels)
        self.reader = ImageReader() if reader is None else scaled_to_largest(reader, self.paths)
        self.broken = torch.zeros(len(self.paths), dtype=torch.bool)
        self.skip_broken = skip_broken

    @property
    def skip_broken(self) -> bool:
        """Whether another image of the class takes the place of one that cannot be read."""
        return self._skip_broken

    @skip_broken.setter
    def skip_broken(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"skip_broken must be True or False, got {value!r}")
        self._skip_broken = value
        if value:
            self.broken.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, label), as a PIL image unless the transform changes it, and an int."""
        image = self._read_or_replace(index) if self.skip_broken else self._read_or_raise(index)
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def _read_or_raise(self, index: int) -> Any:
        try:
            return self.reader(self.paths[index])
        except BrokenImageError as error:
            remedy = "with skip_broken, another of its class takes its place"
            raise BrokenImageError(f"{error}; {remedy}") from error.__cause__

    def _read_or_replace(self, index: int) -> Any:
        """Return the image, or the next one of its class that can be read."""
        image = self._read(index)
        if image is not None:
            return image
        same = (self.labels == self.labels[index]).nonzero().flatten().tolist()
        after = same.index(index % len(self)) + 1
        for i in same[after:] + same[:after]:
            image = self._read(i)
            if image is not None:
                return image
        raise BrokenImageError(f"cannot read any of the {len(same)} images of a class, such as {self.paths[index]}")

    def _read(self, index: int) -> Any:
        """Return the image, or None if it cannot be read, which is noted."""
        if not self.broken[index]:
            try:
                return self.reader(self.paths[index])
            except BrokenImageError as error:
                self.broken[index] = True
                warnings.warn(f"{error}; another image of its class takes its place", stacklevel=4)
        return None


def broken_images(
    paths: Sequence[str | Path], progress: bool = False, reader: ImageReader | None = None
) -> dict[int, str]:
    """Return the positions of the files that a reader cannot read, and why.

    Most JPEG and PNG files are not decoded, which finds truncated ones and no wrong pixels.

    Args:
        paths: Paths of the images.
        progress: Whether to show a progress bar.
        reader: None: ``ImageReader()``.
    """
    reader = ImageReader() if reader is None else reader
    reasons = {}
    for i, path in enumerate(tqdm(paths, desc="checking images", disable=not (progress and paths))):
        if not _looks_whole(path):
            try:
                reader(path)
            except BrokenImageError as error:
                reasons[i] = str(error.__cause__)
    return reasons


def scaled_to_largest(reader: ImageReader, paths: Sequence[str | Path]) -> ImageReader:
    """Return a reader whose ``white``, if it is "largest", is the largest value of 16 bits in some files."""
    if reader.white != "largest":
        return reader
    largest = 0
    for path in tqdm(paths, desc="largest value"):
        with suppress(BrokenImageError):
            largest = max(largest, largest_value(path))
    return replace(reader, white=largest or 65535)


def _looks_whole(path: str | Path) -> bool:
    """Whether header and end of a JPEG, or header and checksums of a PNG, are right. False: it has to be decoded."""
    from PIL import Image  # on use: images in memory need no image library

    if not os.path.isfile(path):  # a pipe would never end
        return False
    try:
        with Image.open(path, formats=FORMATS) as image, open(path, "rb") as file:
            if image.format in ("JPEG", "MPO"):
                file.seek(-2, 2)
                return file.read() == b"\xff\xd9"  # which does not occur in the data of an image
            if image.format == "PNG" and not has_16_bits(image):
                image.verify()
                return True
    except Exception:  # as in ImageReader
        pass
    return False
