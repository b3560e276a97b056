"""Which files below folders are images, and which folders are classes."""

import os
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
_UNREAD = (  # images by their ending, of kinds that are not read
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".exr", ".dcm"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
_OF_SYSTEMS = (  # folders that storage systems put among the user's: thumbnails, snapshots, what was deleted
    *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler"),
    *("__macosx", "lost+found", "system volume information"),
)
_ONE = {"folders": "folder", "others": "other"}
_KEPT_QUIET = (".ds_store", "thumbs.db", "desktop.ini")


class FolderWalk:
    """Walk through folders, each real folder and image once: links can lead upwards, in circles, or twice to one place.

    Attributes:
        left_out: Paths that do not count: files of other kinds or no regular ones, hidden ones and those of storage
            systems, folders and images that have been found already.
    """

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._taken: set[tuple[int, int]] = set()

    def class_folders(
        self, roots: Sequence[str | os.PathLike[str]], names: Sequence[str] | None = None
    ) -> list[list[str]]:
        """Return the names of the sub-folders that may be classes, sorted; what else lies in ``roots`` is left out.

        From then on no walk enters these folders, ``roots``, or a folder that these lie in, from elsewhere.

        Args:
            roots: The folders, each of which has a list.
            names: Names of the sub-folders to take; others do not count as left out. None: all.
        """
        self._taken |= {_identity(folder) for root in roots for folder in (root, *Path(root).resolve().parents)}
        entries = []
        for i, root in enumerate(roots):
            with os.scandir(root) as scanned:
                entries += [(entry.is_symlink(), i, entry.name, entry) for entry in scanned]
        folders: list[list[str]] = [[] for _ in roots]
        for _, i, name, entry in sorted(entries, key=lambda place: place[:3]):  # links last
            if not _is_folder(entry):
                if not self._leave_out(entry):
                    self.left_out.append(entry.path)
            elif names is not None and name not in names:
                continue
            elif _is_hidden(name) or _identity(entry.path) in self._taken:
                self.left_out.append(entry.path + os.sep)
            else:
                self._taken.add(_identity(entry.path))
                folders[i].append(name)
        return [sorted(names) for names in folders]

    def images(self, folders: Sequence[str | os.PathLike[str]]) -> list[list[str]]:
        """Return the paths of all images in each folder and below it, sorted.

        Links are followed last, so that an image is found where it lies.
        """
        images: list[list[str]] = [[] for _ in folders]
        parents = {parent for folder in folders for parent in Path(folder).resolve().parents}
        self._taken |= {_identity(folder) for folder in parents}
        self._taken -= {_identity(folder) for folder in folders}
        linked, walked = list[tuple[int, str]](), set[tuple[int, int]]()
        here, links = deque((i, os.fspath(folder)) for i, folder in enumerate(folders)), deque[tuple[int, str]]()
        while here or links:
            i, folder = (here or links).popleft()
            identity = _identity(folder)
            if identity in self._taken:
                self.left_out.append(folder + os.sep)
                continue
            self._taken.add(identity)
            walked.add(identity)
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if _is_folder(entry) and not _is_hidden(entry.name):
                        (links if entry.is_symlink() else here).append((i, entry.path))
                    elif not self._leave_out(entry):
                        if entry.is_symlink():
                            linked.append((i, entry.path))
                        else:
                            images[i].append(entry.path)
        found = set[str]()
        for i, path in linked:
            target = os.path.realpath(path)
            folder, name = os.path.split(target)
            there = os.path.exists(target) and _identity(folder) in walked and _is_image(name)
            if there or target in found:
                self.left_out.append(path)
            else:
                found.add(target)
                images[i].append(path)
        return [sorted(paths) for paths in images]

    def warn(self, root: str | os.PathLike[str]) -> None:
        """Warn once of what has been left out of a folder, if anything."""
        if not self.left_out:
            return
        kinds = Counter(map(_kind, self.left_out)).most_common(8)
        counted = ", ".join(f"{count} {kind if count > 1 else _ONE.get(kind, kind)}" for kind, count in kinds)
        first = sorted(self.left_out, key=lambda p: (not p.endswith(os.sep), p))  # folders
        names = ", ".join(os.path.relpath(p, root) + os.sep * p.endswith(os.sep) for p in first[:5])
        more = f" and {len(self.left_out) - 5} more" if len(self.left_out) > 5 else ""
        unread = self.unread_images()
        warnings.warn(f"left out of {root} ({counted}): {names}{more}{'; ' if unread else ''}{unread}", stacklevel=3)

    def unread_images(self) -> str:
        """Return which of the files that have been left out are images, and what helps; nothing if none is."""
        kinds = Counter(kind for kind in (Path(path).suffix.lower() for path in self.left_out) if kind in _UNREAD)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        return f"images of kinds that are not read: {counted} (save them as .jpg or .png)" if kinds else ""

    def _leave_out(self, entry: "os.DirEntry[str]") -> bool:
        """Return whether an entry is not an image, and note it."""
        regular = os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()
        lost = entry.is_symlink() and not os.path.exists(entry.path)  # who reads it will name it
        if (regular or lost) and _is_image(entry.name):
            return False
        if entry.name.lower() not in _KEPT_QUIET and not entry.name.startswith("._"):
            self.left_out.append(entry.path + os.sep * _is_folder(entry))
        return True


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """Return the paths of all images below a folder, sorted, and warn of what does not count."""
    walk = FolderWalk()
    (paths,) = walk.images([folder])
    walk.warn(folder)
    return paths


def has_images(folder: str | os.PathLike[str]) -> bool:
    """Whether there is an image in a folder itself."""
    with os.scandir(folder) as entries:
        return any(_is_image(entry.name) and entry.is_file() for entry in entries)


def _kind(path: str) -> str:
    if path.endswith(os.sep):
        return "folders"
    name = Path(path).name
    return "hidden" if _is_hidden(name) else Path(name).suffix.lower() or "others"


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link to itself is none


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and name.lower().endswith(IMAGE_SUFFIXES)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
