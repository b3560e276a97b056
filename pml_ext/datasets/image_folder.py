"""Images in one folder for each class."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pml_ext.datasets.image_files import ImageFiles

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageFolder(ImageFiles):
    """Images in one sub-folder for each class; they may lie in folders inside of it.

    Files are images if they end with png, jpg, jpeg, bmp, webp, tif, tiff, gif, ppm or pgm, in any case; others do not
    count, and neither do hidden files and folders (whose names begin with a dot).

    Args:
        root: The folder.
        transform: Applied to the PIL image, which is RGB.
        classes: The sub-folders to use; they get labels 0, 1, ... in this order. None: all of them, sorted.

    Attributes:
        paths: Of the images, sorted within each class.
        labels: ``(N,)``, int64 tensor, 0 to C - 1.
        class_names: Names of the C sub-folders.
        transform: May be set at any time.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has no sub-folder, one of ``classes`` is missing or there twice, or a class has no image; on
            access: if a file cannot be read, with its path.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         (Path(root) / name).mkdir()
        ...         Image.new("L", (8, 8)).save(Path(root) / name / "0.png")
        ...     dataset = ImageFolder(root)
        ...     image, label = dataset[1]
        >>> image.mode, label, dataset.class_names
        ('RGB', 1, ['cat', 'dog'])
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root must be a folder, got {root}")
        folders = class_folders(root)
        if not folders:
            raise ValueError(f"root must have a sub-folder for each class, got {root} without any")
        classes = folders if classes is None else list(classes)
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes must be different and at least one, got {classes}")
        missing = [name for name in classes if name not in set(folders)]
        if missing:
            raise ValueError(f"classes must be sub-folders of {root}, got {missing[0]!r}")
        paths: list[str | Path] = []
        labels = []
        for label, name in enumerate(classes):
            images = find_images(root / name)
            if not images:
                raise ValueError(f"class folder {root / name} must contain images ({', '.join(IMAGE_SUFFIXES)}), got 0")
            paths += images
            labels += [label] * len(images)
        super().__init__(paths, labels, transform, classes)
        self.root = root


def class_folders(root: Path) -> list[str]:
    """Return the names of the sub-folders, sorted, without hidden ones."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_images(folder: str | Path) -> list[str]:
    """Return the paths of all images below a folder, sorted, without hidden ones."""
    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [
            os.path.join(parent, name)
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(paths)
