"""Images in one folder for each class."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pml_ext.datasets.folder_walk import IMAGE_SUFFIXES, FolderWalk
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_reader import ImageReader


class ImageFolder(ImageFiles):
    """Images in one sub-folder for each class, also in folders inside it.

    Files are images if they end with png, jpg, jpeg, jpe, jfif, bmp, webp, tif, tiff, gif, ppm, pgm, pbm or pnm, in any
    case. What else there is does not count, and a warning counts and names it: images of other kinds (HEIC, AVIF, raw
    files of cameras, ...), other files, hidden files and folders (whose names begin with a dot), folders of storage
    systems such as ``@eaDir``, empty class folders. Links to folders are followed where they lead to a folder that has
    not been read yet and does not hold this one.

    Args:
        root: The folder.
        transform: Applied to the PIL image, which is RGB.
        classes: The sub-folders to use; they get labels 0, 1, ... in this order. None: all that have images, sorted.
        reader: How files are read. None: ``ImageReader()``.

    Attributes:
        paths: Paths of the images, sorted within each class.
        labels: ``(N,)``, int64 tensor, 0 to C - 1.
        class_names: Names of the C sub-folders.
        transform: May be set at any time.
        left_out: Paths of what does not count; folders end with a slash.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has no sub-folder with images, one of ``classes`` is missing, empty or named twice, or a class
            has images only in folders inside it; on access: if a file cannot be read, with its path.

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
        reader: ImageReader | None = None,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root must be a folder, got {root}")
        walk = FolderWalk()
        (images,) = images_of_classes(walk, "root", [root], None if classes is None else list(classes))
        walk.warn(root)
        names = list(images)
        paths: list[str | Path] = [path for name in names for path in images[name]]
        labels = [label for label, name in enumerate(names) for _ in images[name]]
        super().__init__(paths, labels, transform, names, reader)
        self.root = root
        self.left_out = walk.left_out


def images_of_classes(
    walk: FolderWalk, name: str, roots: Sequence[Path], classes: list[str] | None = None
) -> list[dict[str, list[str]]]:
    """Return the images of each class folder of some folders, none of which is read twice.

    Args:
        walk: Is told what is left out.
        name: Name of the argument, for messages.
        roots: The folders that hold class folders.
        classes: The sub-folders to use, as in ``ImageFolder``.

    Raises:
        ValueError: If ``ImageFolder`` would raise it.
    """
    folders = walk.class_folders(roots, classes)
    for root, names in zip(roots, folders, strict=True):
        if not names and classes is None:
            raise ValueError(f"{name} must have a sub-folder for each class, got {root} without any")
    if classes is not None:
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes must be different and at least one, got {classes}")
        missing = [c for c in classes if c not in set(folders[0])]
        if missing:
            raise ValueError(f"classes must be sub-folders of {roots[0]}, got {missing[0]!r}")
        folders = [classes]
    places = [root / folder for root, names in zip(roots, folders, strict=True) for folder in names]
    images = dict(zip(places, walk.images(places), strict=True))
    for place, paths in images.items():
        if not paths and classes is not None:
            raise ValueError(f"class folder {place} must contain images ({', '.join(IMAGE_SUFFIXES)}), got 0")
        if not paths:
            walk.left_out.append(str(place) + os.sep)
        elif not any(os.path.dirname(path) == str(place) for path in paths):
            deeper = sorted({os.path.relpath(os.path.dirname(path), place) for path in paths})
            raise ValueError(
                f"class folder {place} must contain images of its own, got some only in {', '.join(deeper[:3])}: each "
                f"folder directly in {place.parent} is one class; a CSV file of paths and labels can have any layout"
            )
    of_classes = []
    for root, names in zip(roots, folders, strict=True):
        of_classes.append({folder: images[root / folder] for folder in names if images[root / folder]})
        if not of_classes[-1]:
            unread = walk.unread_images()
            got = f"{root} without any{': ' if unread else ''}{unread}"
            raise ValueError(f"{name} must have a sub-folder with images for each class, got {got}")
    return of_classes
