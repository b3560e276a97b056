"""One function that opens a data set for zero-shot retrieval, by its name, file or folder."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.class_embeddings import from_text
from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.csv_file import read_csv
from pml_ext.datasets.folder_walk import FolderWalk
from pml_ext.datasets.glyphs import Glyphs
from pml_ext.datasets.image_arrays import ImageArrays
from pml_ext.datasets.image_files import ImageFiles, scaled_to_largest
from pml_ext.datasets.image_folder import images_of_classes
from pml_ext.datasets.image_reader import ImageReader
from pml_ext.datasets.in_shop import HOW_TO_GET, InShop
from pml_ext.datasets.labels import label_values, nearly_same, no_gallery_of
from pml_ext.datasets.retrieval_data import RetrievalData, number_of_classes
from pml_ext.datasets.splits import splits_of
from pml_ext.validation import as_tensor

NAMES = ("glyphs", "cub", "cars196", "stanford_online_products", "sop", "inaturalist2018", "in_shop")


def open_data(
    source: str | Path,
    test_classes: float = 0.5,
    class_embeddings: Any = None,
    root: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
    reader: ImageReader | None = None,
    split_seed: int | None = 0,
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
    - A folder with ``train`` and ``test``, or ``train``, ``query`` and ``gallery``, each with one sub-folder for each
      class. Labels of test classes follow those of training classes; a class of ``query`` needs images in ``gallery``.
    - A folder with one sub-folder for each class.
    - A file ``.csv`` with the columns ``path`` (relative to the file's folder), ``label`` (any text) and, where there
      is a split, ``split``: train and test, or train, query and gallery. Other columns are ignored.

    Without a split, the test classes are drawn at random by ``split_seed``. Classes keep the sorted order of labels or
    folder names; labels of a CSV file are sorted as numbers if all of them are integers. What a folder holds beside
    that is left out, and a warning counts and names it (see ``ImageFolder``); folders named like splits (val, valid,
    queries, probe, ...) are an error where they are not classes. Images are RGB PIL images of files, gray PIL images of
    ``Glyphs``, uint8 tensors ``(C, H, W)`` of an ``.npz`` file: transforms begin with torchvision's ``v2.ToImage()``,
    which takes all of them.

    Args:
        source: Name (in any case; PML's class names too), file or folder. A folder with one of the names: "./cub".
        test_classes: Share of the classes (below 1; rounded), or their number, an integer. 0: all classes are training
            classes, and ``test`` is None. Only used where the data comes without a split; at least 2 training classes
            must be left.
        class_embeddings: Descriptions of the classes from a second modality: a dictionary from the names of classes to
            rows; array, tensor, or path of a ``.npy`` or ``.npz`` file (array ``embeddings``, ``class_embeddings``, or
            the only one; with ``class_names`` beside it, rows go by name). ``(C, E)``, floating point. Without names, a
            row for each label value of the data set, or for each training class in the order of labels: names of
            folders are sorted as text, "10" before "2". Rows of training classes must be finite. Replaces those of the
            ``.npz`` data set. "names": the names of the training classes, with spaces for underscores, as
            ``class_embeddings.from_text`` embeds them with "tfidf", which needs no download but knows of words only
            their letters; "names:MODEL": with another of its models.
        root: Folder of PML's data sets and of ``InShop``; others ignore it.
        download: Whether PML downloads the data set if ``root`` is missing or empty.
        seed: Seed of the jitter of ``Glyphs``.
        reader: How image files are read. None: ``ImageReader()``. For ``white="largest"`` the training images are read
            once, and their largest value is used for all.
        split_seed: Which test classes are drawn where the data comes without a split, the same ones for the same
            classes. None: the last ones, as in version 0.1.0.

    Returns:
        The data; its transforms are None and may be set.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        TypeError: If an argument or an array has the wrong type.
        ValueError: If the name is unknown, the data has too few classes, a class is both in training and test, or
            arrays do not match; the message names them.

    Examples:
        >>> data = open_data("glyphs")
        >>> data.num_classes, len(data.test), data.train.class_names[0], data.in_channels
        (267, 4272, 'PLUS SIGN', 1)
    """
    if not isinstance(source, str | Path) or not str(source):
        raise TypeError(f"source must be a name or a path, got {source!r}")
    largest = reader is not None and reader.white == "largest"
    opened_by = replace(reader, white=65535) if reader is not None and largest else reader
    if split_seed is not None and (not isinstance(split_seed, Integral) or isinstance(split_seed, bool)):
        raise TypeError(f"split_seed must be an integer or None, got {split_seed!r}")
    request = _Request(source, test_classes, class_embeddings, root, download, seed, opened_by, split_seed)
    data = _opener(source)(request)
    if reader is not None and largest and isinstance(data.train.dataset, ImageFiles):
        files = data.train.dataset
        reader = scaled_to_largest(reader, [files.paths[i] for i in data.train.indices.tolist()])
        for view in (data.train, data.test, data.gallery):
            if view is not None:
                view.dataset.reader = reader
    if class_embeddings is None:
        return data
    if isinstance(class_embeddings, str) and class_embeddings.partition(":")[0] == "names":
        return replace(data, class_embeddings=_embedded_names(data, class_embeddings.partition(":")[2] or "tfidf"))
    return replace(data, class_embeddings=_given_rows(class_embeddings, data))


@dataclass(frozen=True)
class _Request:
    source: str | Path
    test_classes: float
    class_embeddings: Any
    root: str | Path | None
    download: bool
    seed: int
    reader: ImageReader | None
    split_seed: int | None

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


def opens_folder(source: str | Path) -> bool:
    """Whether ``open_data`` takes this for a folder, and not for the name of a data set."""
    return not is_name(source) and Path(source).is_dir()


def is_name(source: str | Path) -> bool:
    """Whether ``open_data`` takes this for the name of a data set, whatever files there are."""
    return _key(source) in _OPENERS


def _key(source: str | Path) -> str:
    return re.sub("[_-]", "", source.lower()) if isinstance(source, str) else ""


def _opener(source: str | Path) -> Callable[[_Request], RetrievalData]:
    key = _key(source)
    if key in _OPENERS:
        return _OPENERS[key]
    path = Path(source)
    if path.is_dir():
        return _open_folder
    opener = {".npz": _open_npz, ".csv": _open_csv}.get(path.suffix.lower())
    if opener is None and (path.is_file() or path.name == str(source)):
        raise ValueError(
            f"source must be one of {', '.join(NAMES)}, a folder, a .npz or a .csv file, got {str(source)!r}"
        )
    if opener is None or not path.is_file():
        raise FileNotFoundError(f"source must exist, got {source}")
    return opener


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
    dataset = ImageFiles(paths, labels, class_names=names, reader=request.reader)
    return _split(dataset, label_values(labels[: len(train)]), label_values(labels[len(train) :]), name, 3)


def _open_in_shop(request: _Request) -> RetrievalData:
    if request.download:
        raise ValueError(f"download must be False for in_shop: {HOW_TO_GET}")
    train, queries, gallery = (
        InShop(request.folder, split, reader=request.reader) for split in ("train", "query", "gallery")
    )
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
        train, test = _drawn_classes(request, label_values(dataset.labels))
    data = _split(dataset, train, test, path.stem, dataset.in_channels, "split" in arrays)
    if "class_embeddings" in arrays and request.class_embeddings is None:
        return replace(data, class_embeddings=_training_rows(_load_embeddings(arrays["class_embeddings"]), data))
    return data


def _open_folder(request: _Request) -> RetrievalData:
    name, splits = request.path.resolve().name, splits_of(request.path)
    walk = FolderWalk()
    if not splits:
        (images,) = images_of_classes(walk, "source", [request.path])
        walk.warn(request.path)
        return _of_drawn_classes(request, name, images)
    others = [folder for folder in walk.class_folders([request.path])[0] if folder not in splits]
    walk.left_out += [str(request.path / folder) + os.sep for folder in others]
    parts = images_of_classes(walk, "source", [request.path / split for split in splits])
    walk.warn(request.path)
    return _of_splits(request, name, dict(zip(splits, parts, strict=True)))


def _open_csv(request: _Request) -> RetrievalData:
    splits = read_csv(request.path)
    if None not in splits:
        return _of_splits(request, request.path.stem, {str(split): images for split, images in splits.items()})
    return _of_drawn_classes(request, request.path.stem, splits[None])


def _of_drawn_classes(request: _Request, name: str, images: dict[str, list[str]]) -> RetrievalData:
    """Return the data of classes, sorted, with their images, from which the test classes are drawn."""
    paths = [path for c in images for path in images[c]]
    labels = [label for label, c in enumerate(images) for _ in images[c]]
    dataset = ImageFiles(paths, labels, None, list(images), request.reader)
    return _split(dataset, *_drawn_classes(request, list(range(len(images)))), name, 3, False)


def _of_splits(request: _Request, name: str, splits: dict[str, dict[str, list[str]]]) -> RetrievalData:
    """Return the data of splits: for each its classes, sorted, with their images."""
    train, others = splits["train"], {split: images for split, images in splits.items() if split != "train"}
    for split, images in others.items():
        both = [c for c in train if c in images]
        if both:
            raise ValueError(f"{request.path}: no class may be both in train and {split}, got {both[0]!r}")
        alike = nearly_same(train, images)
        if alike is not None:
            first, second = map(ascii, alike)
            told = f"the classes {first} in train and {second} in {split} have nearly the same name: are they the same?"
            warnings.warn(f"{request.path}: {told}", UserWarning, stacklevel=4)
    tested = splits["test"] if "test" in splits else splits["query"]
    searched = splits.get("gallery", {})
    lost = [c for c in tested if c not in searched]
    if searched and lost:
        raise ValueError(f"{request.path}: {no_gallery_of(lost[0], searched)}")
    names = [*train, *tested, *(c for c in searched if c not in tested)]
    label_of = {c: label for label, c in enumerate(names)}
    if len(train) < 2 or not tested:
        raise ValueError(f"{name}: must have >= 2 training and >= 1 test classes, got {len(train)} and {len(tested)}")

    def view(images: dict[str, list[str]], classes: Iterable[str]) -> ClassSubset:
        paths = [path for c in images for path in images[c]]
        labels = [label_of[c] for c in images for _ in images[c]]
        return ClassSubset(ImageFiles(paths, labels, None, names, request.reader), [label_of[c] for c in classes])

    gallery = view(searched, names[len(train) :]) if searched else None
    return RetrievalData(view(train, train), view(tested, tested), gallery, name=name)


_OPENERS: dict[str, Callable[[_Request], RetrievalData]] = {
    "glyphs": _open_glyphs,
    "cub": partial(_open_pml, "CUB", "cub", True),
    "cars196": partial(_open_pml, "Cars196", "cars196", True),
    "stanfordonlineproducts": partial(_open_pml, "StanfordOnlineProducts", "stanford_online_products", False),
    "sop": partial(_open_pml, "StanfordOnlineProducts", "stanford_online_products", False),
    "inaturalist2018": partial(_open_pml, "INaturalist2018", "inaturalist2018", False),
    "inshop": _open_in_shop,
}


def _split(
    dataset: Any, train: list[int], test: list[int], name: str, in_channels: int, tested: bool = True
) -> RetrievalData:
    """Return the data of two lists of labels, of which that for the test may be empty unless it is to be ``tested``."""
    both = sorted(set(train) & set(test))
    if both:
        raise ValueError(f"{name}: no class may be both in training and test, got label {both[0]}")
    if len(train) < 2 or (tested and not test):
        raise ValueError(f"{name}: must have >= 2 training and >= 1 test classes, got {len(train)} and {len(test)}")
    test_view = ClassSubset(dataset, test) if test else None
    return RetrievalData(ClassSubset(dataset, train), test_view, in_channels=in_channels, name=name)


def _drawn_classes(request: _Request, classes: list[int]) -> tuple[list[int], list[int]]:
    """Return the labels of training and test classes, both in their order."""
    fewest = 2 if request.test_classes == 0 else 3
    if len(classes) < fewest:
        two = ", 2 of them to train with" if fewest > 2 else ""
        rule = f"{request.path} without a split (train and test) must have >= {fewest} classes{two}"
        raise ValueError(f"{rule}, got {len(classes)}")
    count = number_of_classes("test_classes", request.test_classes, len(classes), smallest=1, none=True)
    if request.split_seed is None:
        return classes[: len(classes) - count], classes[len(classes) - count :]
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(int(request.split_seed))).tolist()
    held = set(order[:count])
    train, test = ([label for i, label in enumerate(classes) if (i in held) == tested] for tested in (False, True))
    return train, test


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


def _embedded_names(data: RetrievalData, model: str) -> Tensor:
    """Return the text embeddings of the training classes' names."""
    names = [name.replace("_", " ").strip() for name in data.train.class_names or []]
    if not any(re.search(r"[^\W\d]", name) for name in names):
        got = f"{names[0]!r}, {names[1]!r}, ..." if names else "none"
        raise ValueError(f"class_embeddings must not be 'names' where the names of classes have no letters, got {got}")
    return from_text(names, model)


def _given_rows(source: Any, data: RetrievalData) -> Tensor:
    """Return the rows of the training classes, which are given by name or in the order of labels."""
    if isinstance(source, str | Path):
        source = _read_embeddings(Path(source), by_name=data.train.class_names is not None)
    if isinstance(source, Mapping):
        if data.train.class_names is None:
            raise TypeError("class_embeddings must be an array for data whose classes have no names, got a dictionary")
        source = _rows_of(source, data.train.class_names)
    return _training_rows(_load_embeddings(source), data)


def _rows_of(by_name: Mapping[Any, Any], names: list[str]) -> Any:
    """Return the rows of some classes."""
    rows = {str(name): row for name, row in by_name.items()}
    missing = [name for name in names if name not in rows]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        alike = nearly_same(missing, rows)
        hint = "" if alike is None else f" (there is {alike[1]!a}, of nearly the same name as {alike[0]!a})"
        raise ValueError(f"class_embeddings must have all training classes, got none for {missing[0]!r}{more}{hint}")
    found = [rows[name].detach().cpu().float() if isinstance(rows[name], Tensor) else rows[name] for name in names]
    arrays = list(map(np.asarray, found))
    for name, row in zip(names, arrays, strict=True):
        if row.ndim != 1 or row.shape != arrays[0].shape:
            first = "" if name == names[0] else f"{arrays[0].shape} for {names[0]!r} and "
            raise ValueError(f"class_embeddings must be rows of one width, got {first}{row.shape} for {name!r}")
    return np.stack(arrays)


def _load_embeddings(source: Any) -> Tensor:
    """Return class embeddings, float32, from an array or a tensor."""
    given = source if isinstance(source, Tensor) else np.asarray(source)
    if not (given.is_floating_point() if isinstance(given, Tensor) else given.dtype.kind == "f"):
        raise TypeError(f"class_embeddings must have a floating point dtype, got {given.dtype}")
    rows = as_tensor("class_embeddings", given).detach().cpu().float()
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"class_embeddings must have shape (C, E), got {tuple(rows.shape)}")
    return rows


def _read_embeddings(path: Path, by_name: bool) -> Any:
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
            rows, names = arrays[key], arrays.get("class_names")
            if not by_name or names is None or names.shape != rows.shape[:1]:  # rows of the training classes alone
                return rows
            keys = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
            if len(set(keys)) < len(keys):
                twice = next(name for name, count in Counter(keys).items() if count > 1)
                raise ValueError(f"{path} must have a class name of its own for each row, got {twice!r} twice")
            return dict(zip(keys, rows, strict=True))
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
