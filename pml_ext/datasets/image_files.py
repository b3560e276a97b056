"""Images in files: what the data sets on disk have in common."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pml_ext.datasets.labels import as_class_names, as_labels


class ImageFiles(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images in files, opened when asked for.

    Args:
        paths: Of the N images.
        labels: ``(N,)``, integers.
        transform: Applied to the PIL image, which is RGB.
        class_names: That of label i at index i, or None.

    Attributes:
        paths: A list.
        labels: ``(N,)``, int64 tensor.
        transform: May be set at any time.
        class_names: A list, or None.

    Raises:
        ValueError: If labels do not match; on access: if a file cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: Any,
        transform: Callable[[Any], Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.paths = list(paths)
        self.labels = as_labels("labels", labels, len(self.paths))
        self.transform = transform
        self.class_names = as_class_names(class_names, self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, label), as a PIL image unless the transform changes it, and an int."""
        image = read_image(self.paths[index])
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def read_image(path: str | Path) -> Any:
    """Return the image in a file as an RGB image of PIL, fully loaded; 16-bit gray values lose their lower byte.

    Raises:
        ValueError: If the file is missing, no image, truncated, or has values without a fixed range (mode I or F).
    """
    from PIL import Image  # on use: images in memory need no image library

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # convert() would clip at 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"its mode {image.mode!r} has no fixed range of values")
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, EOFError, struct.error and more
        raise ValueError(f"cannot read image {path}: {error}") from error


def broken_images(paths: Sequence[str | Path], progress: bool = False) -> dict[int, str]:
    """Return the positions of the files that ``read_image`` cannot read, and why.

    Most JPEG and PNG files are not decoded, which finds truncated ones and no wrong pixels.

    Args:
        paths: Of the images.
        progress: Whether to show a progress bar.
    """
    reasons = {}
    for i, path in enumerate(tqdm(paths, desc="checking images", disable=not progress)):
        if not _looks_whole(path):
            try:
                read_image(path)
            except ValueError as error:
                reasons[i] = str(error.__cause__)
    return reasons


def _looks_whole(path: str | Path) -> bool:
    """Whether header and end of a JPEG, or header and checksums of a PNG, are right. False: it has to be decoded."""
    from PIL import Image  # on use: images in memory need no image library

    try:
        with Image.open(path) as image, open(path, "rb") as file:
            if image.format in ("JPEG", "MPO"):
                file.seek(-2, 2)
                return file.read() == b"\xff\xd9"  # which does not occur in the data of an image
            if image.format == "PNG" and image.mode != "I":
                image.verify()
                return True
    except Exception:  # as in read_image
        pass
    return False
