"""Retrieval data that gets by without some of its image files."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.content import file_names
from pml_ext.datasets.image_files import ImageFiles, broken_images
from pml_ext.datasets.image_reader import BrokenImageError
from pml_ext.datasets.retrieval_data import RetrievalData


def views_of(data: RetrievalData) -> dict[str, ClassSubset]:
    """Return the parts that data has: "train", perhaps "test" and "gallery"."""
    parts = {"train": data.train, "test": data.test, "gallery": data.gallery}
    return {name: view for name, view in parts.items() if view is not None}


def image_names(data: RetrievalData) -> set[str]:
    """Return the names of all image files: the part of the data and the path, "train/cat/1.jpg" for instance."""
    return {f"{name}/{image}" for name, view in views_of(data).items() for image in file_names(view) or ()}


def without(data: RetrievalData, left_out: Iterable[str]) -> RetrievalData:
    """Return data without some image files, which are named as ``image_names`` does, and classes that have no others.

    Raises:
        ValueError: If too few classes are left.
    """
    kept: dict[str, Tensor] = {}
    left_out = set(left_out)
    for name, view in views_of(data).items():
        names = file_names(view)
        if left_out and names is not None:
            kept[name] = torch.tensor([f"{name}/{image}" not in left_out for image in names])
    return _with_classes_left(data, kept)[0] if any(not mask.all() for mask in kept.values()) else data


def only(view: ClassSubset, kept: Tensor) -> ClassSubset:
    """Return some images of a view, ``kept`` being ``(N,)``, bool, with the labels that they have."""
    part = copy.copy(view)
    part.indices, part.labels = view.indices[kept], view.labels[kept]
    return part


def broken_files(data: RetrievalData, each_class: bool = False, progress: bool = False) -> dict[str, dict[int, str]]:
    """Return which image files of each part of data cannot be read, by their place in it, and why.

    Args:
        data: Its parts that are not files are left out of what is returned.
        each_class: Whether to decode images of each class until one can be read; else most are not decoded at all, and
            a class may lose all of them later.
        progress: Whether to show a progress bar.
    """
    views = {name: view for name, view in views_of(data).items() if isinstance(view.dataset, ImageFiles)}
    paths = {name: [view.dataset.paths[i] for i in view.indices.tolist()] for name, view in views.items()}
    reader = next((view.dataset.reader for view in views.values()), None)
    found = broken_images([path for part in paths.values() for path in part], progress, reader)
    broken: dict[str, dict[int, str]] = {}
    start = 0
    for name, part in paths.items():
        broken[name] = {i - start: reason for i, reason in found.items() if start <= i < start + len(part)}
        start += len(part)
        whole = set[int]()
        for i, label in enumerate(views[name].labels.tolist() if each_class else ()):
            if label not in whole and i not in broken[name]:
                try:
                    views[name].dataset.reader(part[i])
                    whole.add(label)
                except BrokenImageError as error:
                    broken[name][i] = str(error.__cause__)
    return broken


def without_broken(data: RetrievalData, broken: dict[str, dict[int, str]]) -> tuple[RetrievalData, list[str]]:
    """Return data without what ``broken_files`` has found, and the names of the classes that have nothing left.

    Such classes are left out, those of queries too that have nothing left in the gallery.

    Raises:
        ValueError: If too few classes are left.
    """
    kept: dict[str, Tensor] = {}
    for name, view in views_of(data).items():
        if name in broken:
            kept[name] = torch.tensor([i not in broken[name] for i in range(len(view))])
            view.dataset.broken[view.indices[~kept[name]]] = True  # or one might take the place of another
    return _with_classes_left(data, kept)


def _with_classes_left(data: RetrievalData, kept: dict[str, Tensor]) -> tuple[RetrievalData, list[str]]:
    """Return data with some images, ``kept`` being ``(N,)``, bool, for each part, and the names of the lost classes."""
    views = {name: view for name, view in views_of(data).items() if name in kept}
    left = {name: {view.classes[i] for i in view.labels[kept[name]].tolist()} for name, view in views.items()}
    if "gallery" in views:
        left["test"] &= left["gallery"]
    classes = {name: [c for c in view.classes if c in left[name]] for name, view in views.items()}
    if "gallery" in views:  # queries' classes first: labels mean the same in both
        classes["gallery"].sort(key=lambda c: c not in left["test"])
    lost = [(view, c) for name, view in views.items() for c in view.classes if c not in left[name]]
    names = [str(c if view.class_names is None else view.class_names[view.classes.index(c)]) for view, c in lost]
    names = list(dict.fromkeys(names))
    if len(classes["train"]) < 2 or not classes.get("test", True):
        counts = f"{len(classes['train'])} and {len(classes.get('test', []))}"
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"data must have >= 2 training and >= 1 test classes that can be read, got {counts}, and not {some}"
        )
    parts: dict[str, Any] = {}
    for name, view in views.items():
        part = ClassSubset(view.dataset, classes[name])
        part.transform = view.transform
        parts[name] = only(part, torch.isin(part.indices, view.indices[kept[name]]))
    rows = data.class_embeddings
    if rows is not None:
        rows = rows[[data.train.classes.index(c) for c in classes["train"]]]
    return replace(data, class_embeddings=rows, **parts), names


def replacing_broken(dataset: Any) -> Any:
    """Return a view in which another image of the class takes the place of one that cannot be read."""
    dataset = copy.copy(dataset)
    if isinstance(dataset, ImageFiles):
        dataset.skip_broken = True
    elif isinstance(dataset, ClassSubset):
        dataset.dataset = replacing_broken(dataset.dataset)
    return dataset


def replaced_files(view: ClassSubset) -> list[str]:
    """Return the paths of a view's images that another one had to replace."""
    dataset: Any = view
    indices = torch.arange(len(view))
    while isinstance(dataset, ClassSubset):
        dataset, indices = dataset.dataset, dataset.indices[indices]
    return [dataset.paths[i] for i in indices.tolist() if dataset.broken[i]] if isinstance(dataset, ImageFiles) else []
