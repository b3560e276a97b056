"""One function that opens a data set for zero-shot retrieval, by its name, file or folder."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.glyphs import Glyphs
from pml_ext.datasets.image_arrays import ImageArrays
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_folder import ImageFolder, class_folders
from pml_ext.datasets.in_shop import HOW_TO_GET, InShop
from pml_ext.datasets.labels import label_values
from pml_ext.datasets.retrieval_data import RetrievalData, number_of_classes

NAMES = ("glyphs", "cub", "cars196", "stanford_online_products", "sop", "inaturalist2018", "in_shop")


def open_data(
    source: str | Path,
    test_classes: float = 0.5,
    class_embeddings: Any = None,
    root: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
) -> RetrievalData:
    r"""Open a data set and split its classes into training and test classes.

    ``source`` is one of these:

    - "glyphs": ``Glyphs``, gray, nothing to download.
    - "cub", "cars196", "stanford_online_products" or "sop", "inaturalist2018": PML's data sets with their usual splits,
      in ``root``. Labels count from 0 here.
    - "in_shop": ``InShop`` in ``root``, with a gallery.
    - A file ``.npz`` with the arrays ``images``, uint8 ``(N, H, W)`` or ``(N, H, W, 3)``, and ``labels``, integers
      ``(N,)`` >= 0; where it has them, ``split``, "train" or "test" for each image, ``class_names`` and
      ``class_embeddings`` ``(C, E)``, a row for each label value. Other arrays are ignored.
    - A folder with ``train`` and ``test``, each with one sub-folder for each class; what else it has is ignored. Labels
      of test classes follow those of training classes.
    - A folder with one sub-folder for each class.

    Without a split, the last classes are the test classes, in the sorted order of labels or folder names. Images are
    RGB PIL images of files, gray PIL images of ``Glyphs``, uint8 tensors ``(C, H, W)`` of an ``.npz`` file: transforms
    begin with torchvision's ``v2.ToImage()``, which takes all of them.

    Args:
        source: Name (in any case; PML's class names too), file or folder. A folder with one of the names: "./cub".
        test_classes: Share of the classes (0 to 1, both excluded; rounded), or their number, an integer >= 1. Only used
            where the data comes without a split; at least 2 training classes must be left.
        class_embeddings: Descriptions of the classes from a second modality: array, tensor, or path of a ``.npy`` or
            ``.npz`` file (array ``embeddings``, ``class_embeddings``, or the only one). ``(C, E)``, floating point, a
            row for each label value of the data set, or for each training class in the order of labels. Rows of
            training classes must be finite. Replaces those of the ``.npz`` data set.
        root: Folder of PML's data sets and of ``InShop``; others ignore it.
        download: Whether PML downloads the data set if ``root`` is missing or empty.
        seed: Of what is drawn: the jitter of ``Glyphs``.

    Returns:
        The data; its transforms are None and may be set.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        TypeError: If an argument or an array has the wrong type.
        ValueError: If the name is unknown, the data has too few classes, a class is both in training and test, or
            arrays do not match; the message tells which.

    Examples:
        >>> data = open_data("glyphs")
        >>> data.num_classes, len(data.test), data.train.class_names[0], data.in_channels
        (267, 4272, 'PLUS SIGN', 1)
    """
    if not isinstance(source, str | Path) or not str(source):
        raise TypeError(f"source must be a name or a path, got {source!r}")
    request = _Request(source, test_classes, class_embeddings, root, download, seed)
    data = _opener(source)(request)
    if class_embeddings is None:
        return data
    return replace(data, class_embeddings=_training_rows(_load_embeddings(class_embeddings), data))


@dataclass(frozen=True)
class _Request:
    source: str | Path
    test_classes: float
    class_embeddings: Any
    root: str | Path | None
    download: bool
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.source)

    @property
    def folder(self) -> Path:
        """The root of a data set that needs one."""
        if self.root is None:
            raise ValueError(f"root must be the folder of {self.source}, got None")
        if not Path(self.root).is_dir() and not self.download:
            raise FileNotFoundError(f"root must be the folder of {self.source}, got {self.root}, which does not exist")
        return Path(self.root)


def _opener(source: str | Path) -> Callable[[_Request], RetrievalData]:
    key = re.sub("[_-]", "", source.lower()) if isinstance(source, str) else ""
    if key in _OPENERS:
        return _OPENERS[key]
    path = Path(source)
    if path.is_dir():
        return _open_halves if (path / "train").is_dir() and (path / "test").is_dir() else _open_folder
    if path.suffix.lower() != ".npz" and (path.is_file() or path.name == str(source)):
        raise ValueError(f"source must be one of {', '.join(NAMES)}, a folder or an .npz file, got {str(source)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"source must exist, got {source}")
    return _open_npz


def _open_glyphs(request: _Request) -> RetrievalData:
    num_classes = Glyphs("train", samples_per_class=1).num_classes
    dataset = Glyphs("train+test", seed=request.seed)
    return _split(dataset, list(range(num_classes)), list(range(num_classes, dataset.num_classes)), "glyphs", 1)


def _open_pml(class_name: str, name: str, folder_is_class: bool, request: _Request) -> RetrievalData:
    from pytorch_metric_learning import datasets  # on use: it imports Pillow

    root, halves = request.folder, []
    for split in ("train", "test"):
        try:
            halves.append(getattr(datasets, class_name)(str(root), split=split, download=request.download))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"root must have the layout of {class_name}'s download, or be empty or missing with download=True, "
                f"got {root} without {error.filename}"
            ) from error
    train, test = (torch.tensor(half.labels, dtype=torch.long) for half in halves)
    if not len(train) or not len(test):
        raise ValueError(f"root must have training and test images, got {len(train)} and {len(test)} in {root}")
    rank = {label: i for i, label in enumerate(label_values(torch.cat([train, test])))}
    labels = torch.tensor([rank[label] for half in halves for label in half.labels])
    paths = halves[0].paths + halves[1].paths
    names = None
    if folder_is_class:  # CUB: "001.Black_footed_Albatross"
        folders = {label: Path(path).parent.name for label, path in zip(labels.tolist(), paths, strict=True)}
        names = [re.sub(r"^\d+\.", "", folders[label]).replace("_", " ") for label in range(len(rank))]
    dataset = ImageFiles(paths, labels, class_names=names)
    return _split(dataset, label_values(labels[: len(train)]), label_values(labels[len(train) :]), name, 3)


def _open_in_shop(request: _Request) -> RetrievalData:
    if request.download:
        raise ValueError(f"download must be False for in_shop: {HOW_TO_GET}")
    train, queries, gallery = (InShop(request.folder, split) for split in ("train", "query", "gallery"))
    items, in_gallery = label_values(queries.labels), label_values(gallery.labels)
    lost = sorted(set(items) - set(in_gallery))
    if lost:
        raise ValueError(f"query items must have gallery images, got none of {(queries.class_names or [])[lost[0]]}")
    return RetrievalData(
        ClassSubset(train, label_values(train.labels)),
        ClassSubset(queries, items),
        ClassSubset(gallery, items + sorted(set(in_gallery) - set(items))),
        name="in_shop",
    )


def _open_npz(request: _Request) -> RetrievalData:
    path = request.path
    arrays = _read_npz(path, ("images", "labels", "split", "class_names", "class_embeddings"))
    for key in ("images", "labels"):
        if key not in arrays:
            raise ValueError(f"{path} must contain {key!r}, got {', '.join(arrays) or 'neither images nor labels'}")
    names = arrays["class_names"].tolist() if "class_names" in arrays else None
    try:
        dataset = ImageArrays(arrays["images"], arrays["labels"], class_names=names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error
    if dataset.labels.min() < 0:
        raise ValueError(f"{path}: labels must be >= 0, got {int(dataset.labels.min())}")
    if "split" in arrays:
        train, test = _classes_of_splits(path, arrays["split"], dataset.labels)
    else:
        train, test = _last_classes(request, label_values(dataset.labels))
    data = _split(dataset, train, test, path.stem, dataset.in_channels)
    if "class_embeddings" in arrays and request.class_embeddings is None:
        return replace(data, class_embeddings=_training_rows(_load_embeddings(arrays["class_embeddings"]), data))
    return data


def _open_folder(request: _Request) -> RetrievalData:
    val = next((name for name in ("val", "valid", "validation") if (request.path / name).is_dir()), None)
    if val and (request.path / "train").is_dir():
        raise ValueError(f"source must have train/ and test/: test/ is missing, found {val}/ in {request.path}")
    dataset = _image_folder(request.path)
    classes = label_values(dataset.labels)
    train, test = _last_classes(request, classes, _deeper(dataset) if len(classes) < 3 else "")
    return _split(dataset, train, test, request.path.resolve().name, 3)


def _open_halves(request: _Request) -> RetrievalData:
    train, test = (_image_folder(request.path / half) for half in ("train", "test"))
    train_names, test_names = train.class_names or [], test.class_names or []
    both = sorted(set(train_names) & set(test_names))
    if both:
        raise ValueError(f"{request.path}: no class may be both in train and test, got {both[0]!r}")
    labels = torch.cat([train.labels, test.labels + len(train_names)])
    dataset = ImageFiles(train.paths + test.paths, labels, class_names=train_names + test_names)
    classes = list(range(len(train_names) + len(test_names)))
    return _split(dataset, classes[: len(train_names)], classes[len(train_names) :], request.path.resolve().name, 3)


def _image_folder(path: Path) -> ImageFolder:
    if not class_folders(path):
        raise ValueError(f"source must have a sub-folder for each class, got {path} without any")
    return ImageFolder(path)


def _deeper(dataset: ImageFolder) -> str:
    """Return a hint where folders lie in class folders, or nothing."""
    folders = {Path(path).relative_to(dataset.root).parent for path in dataset.paths}
    deeper = sorted(folder.as_posix() for folder in folders if len(folder.parts) > 1)
    return f"; each folder directly in it is one class; found deeper folders: {', '.join(deeper[:3])}" if deeper else ""


_OPENERS: dict[str, Callable[[_Request], RetrievalData]] = {
    "glyphs": _open_glyphs,
    "cub": partial(_open_pml, "CUB", "cub", True),
    "cars196": partial(_open_pml, "Cars196", "cars196", True),
    "stanfordonlineproducts": partial(_open_pml, "StanfordOnlineProducts", "stanford_online_products", False),
    "sop": partial(_open_pml, "StanfordOnlineProducts", "stanford_online_products", False),
    "inaturalist2018": partial(_open_pml, "INaturalist2018", "inaturalist2018", False),
    "inshop": _open_in_shop,
}


def _split(dataset: Any, train: list[int], test: list[int], name: str, in_channels: int) -> RetrievalData:
    both = sorted(set(train) & set(test))
    if both:
        raise ValueError(f"{name}: no class may be both in training and test, got label {both[0]}")
    if len(train) < 2 or not test:
        raise ValueError(f"{name}: must have >= 2 training and >= 1 test classes, got {len(train)} and {len(test)}")
    return RetrievalData(ClassSubset(dataset, train), ClassSubset(dataset, test), in_channels=in_channels, name=name)


def _last_classes(request: _Request, classes: list[int], hint: str = "") -> tuple[list[int], list[int]]:
    if len(classes) < 3:
        raise ValueError(
            f"{request.path} without a split (train and test) must have >= 3 classes, 2 of them to train with, "
            f"got {len(classes)}{hint}"
        )
    first = len(classes) - number_of_classes("test_classes", request.test_classes, len(classes), smallest=1)
    return classes[:first], classes[first:]


def _classes_of_splits(path: Path, split: Any, labels: Tensor) -> tuple[list[int], list[int]]:
    if split.shape != tuple(labels.shape):
        raise ValueError(f"{path}: split must have shape ({len(labels)},), as labels, got {split.shape}")
    split = split.astype(str)
    unknown = sorted(set(np.unique(split).tolist()) - {"train", "test"})
    if unknown:
        raise ValueError(f"{path}: split must be 'train' or 'test', got {unknown[0]!r}")
    train, test = (label_values(labels[torch.from_numpy(split == half)]) for half in ("train", "test"))
    return train, test


def _read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return those of the arrays that the file has; no keys: all."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files if not keys or key in keys}
    except Exception as error:  # zipfile.BadZipFile, EOFError, zlib.error, and for pickled arrays ValueError
        raise ValueError(f"cannot read {path}: {error}") from error


def _load_embeddings(source: Any) -> Tensor:
    """Return class embeddings, float32, from an array, a tensor or a file."""
    if isinstance(source, str | Path):
        source = _read_embeddings(Path(source))
    rows = source.detach().cpu() if isinstance(source, Tensor) else np.asarray(source)
    if not (rows.is_floating_point() if isinstance(rows, Tensor) else rows.dtype.kind == "f"):
        raise TypeError(f"class_embeddings must have a floating point dtype, got {rows.dtype}")
    rows = torch.as_tensor(rows, dtype=torch.float32)
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"class_embeddings must have shape (C, E), got {tuple(rows.shape)}")
    return rows


def _read_embeddings(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"class_embeddings must be an existing file, got {path}")
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"class_embeddings must be a .npy or .npz file, got {path}")
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except Exception as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    arrays = _read_npz(path, ())
    for key in ("embeddings", "class_embeddings"):
        if key in arrays:
            return arrays[key]
    if len(arrays) != 1:
        raise ValueError(f"{path} must contain 'embeddings', 'class_embeddings' or one array, got {list(arrays)}")
    return next(iter(arrays.values()))


def _training_rows(rows: Tensor, data: RetrievalData) -> Tensor:
    """Return the rows that belong to the training classes, in the order of the labels of ``data.train``."""
    views = [view for view in (data.train, data.test, data.gallery) if view is not None]
    num_labels = 1 + max(label for view in views for label in view.classes)
    if len(rows) == num_labels:
        rows = rows[data.train.classes]
    elif len(rows) != data.num_classes:
        raise ValueError(
            f"class_embeddings must have {num_labels} rows, one for each label value, or {data.num_classes}, one for "
            f"each training class, got {len(rows)}"
        )
    wrong = torch.isfinite(rows).all(1).logical_not().nonzero()
    if len(wrong):
        raise ValueError(
            f"class_embeddings must be finite, got {rows[wrong[0, 0]].tolist()[:3]}... for training class "
            f"{int(wrong[0, 0])}"
        )
    return rows
