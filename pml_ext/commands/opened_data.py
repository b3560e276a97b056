"""Data as commands open it: without what cannot be read, and with validation classes."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pml_ext.commands.command_line import number_of, some_of, warn
from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.content import files_by_mark
from pml_ext.datasets.file_copies import copied_files, digest_of
from pml_ext.datasets.image_files import ImageFiles
from pml_ext.datasets.image_reader import ImageReader
from pml_ext.datasets.leaving_out import broken_files, only, views_of, without_broken
from pml_ext.datasets.retrieval_data import RetrievalData
from pml_ext.datasets.sources import is_name, open_data
from pml_ext.recipes.evaluation import METRICS, embed, embed_readable, retrieval_metrics


class Images(Sequence[Any]):
    """The images of some views, untransformed, read when they are drawn."""

    def __init__(self, *views: ClassSubset) -> None:
        self.places = [(view.dataset, int(index)) for view in views for index in view.indices]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        dataset, index = self.places[place]
        return dataset[index][0]


class Embedder:
    """Embeds views of data; without what cannot be read, where that may be skipped.

    Args:
        skip_broken: Whether it may.
        autocast: dtype of the network's forward pass, as in ``Trainer``.
        workers: Processes that load images.
        batch_size: Images at a time.
    """

    def __init__(
        self, skip_broken: bool = False, autocast: torch.dtype | None = None, workers: int = 0, batch_size: int = 256
    ) -> None:
        self.skip_broken = skip_broken
        self.options: dict[str, Any] = {"autocast": autocast, "num_workers": workers, "batch_size": batch_size}

    def __call__(
        self, network: nn.Module, view: ClassSubset, progress: bool = False
    ) -> tuple[ClassSubset, Tensor, Tensor]:
        """Return a view of what could be read, the embeddings and the labels."""
        if not self.skip_broken:
            return view, *embed(network, view, progress=progress, **self.options)
        embeddings, labels, readable = embed_readable(network, view, progress=progress, **self.options)
        return only(view, readable), embeddings, labels

    def tested(
        self, network: nn.Module, views: Sequence[ClassSubset]
    ) -> tuple[list[ClassSubset], list[tuple[Tensor, Tensor]]]:
        """Return views of what could be read of queries and, if there is one, gallery, and their embeddings."""
        parts = [self(network, view, progress=True) for view in views]
        unread = [
            path
            for view, part in zip(views, parts, strict=True)
            for path in paths_at(view, ~torch.isin(view.indices, part[0].indices))
        ]
        if unread:
            counted = f"{len(unread)} of {sum(map(len, views))} images that cannot be read"
            warn(f"tested without {counted}: {some_of(unread)}")
        return [view for view, *_ in parts], [(embeddings, labels) for _, embeddings, labels in parts]


def metrics_of(embedded: Sequence[tuple[Tensor, Tensor]], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Return the metrics of embeddings and labels of queries and, if there is one, a gallery."""
    queries, *gallery = embedded
    return retrieval_metrics(*queries, gallery[0] if gallery else None, metrics)


def paths_at(view: ClassSubset, places: Any) -> list[str]:
    """Return the paths of some images of a view."""
    return [view.dataset.paths[i] for i in view.indices[places].tolist()]


def readable_part(data: RetrievalData, skip_broken: bool) -> RetrievalData:
    """Return data without the image files that cannot be read, with a warning.

    Raises:
        ValueError: If there are any and they may not be skipped; the message names them.
    """
    broken = broken_files(data, each_class=skip_broken, progress=True)
    if not any(broken.values()):
        return data
    views = views_of(data)
    paths = [path for name, places in broken.items() for path in paths_at(views[name], sorted(places))]
    first = next(reason for places in broken.values() for reason in places.values())
    refuse_broken(paths, sum(len(views[name]) for name in broken), first, skip_broken)
    kept, lost = without_broken(data, broken)
    if lost:
        classes = f"{len(lost)} classes" if len(lost) > 1 else "a class"
        warn(f"left out {classes} without images that can be read: {some_of(lost)}")
    return kept


def warn_of_copies(views: Iterable[ClassSubset]) -> None:
    """Warn of image files that are copies of others, in the same view or an earlier one."""
    files = [(view, view.class_names or view.classes) for view in views if isinstance(view.dataset, ImageFiles)]
    paths = [path for view, _ in files for path in paths_at(view, slice(None))]
    classes = [names[label] for view, names in files for label in view.labels.tolist()]
    copies = copied_files(paths)
    if copies:
        counted = f"{len(copies)} of {number_of(len(paths), 'image')} are byte-for-byte copies of others"
        elsewhere = sum(classes[i] != classes[first] for i, first in copies.items())
        counted += f", {elsewhere} of them in another class" if elsewhere else ""
        warn(f"{counted}: {some_of([f'{paths[i]} = {paths[first]}' for i, first in copies.items()])}")


def sample_of(view: ClassSubset) -> dict[str, str]:
    """Return mark and digest of 100 files of a view, drawn as good as at random: those of the smallest marks."""
    files = files_by_mark(view)
    return {mark: digest_of(files[mark]).hex() for mark in sorted(files)[:100]}


def share_of_known(sample: Mapping[str, str], views: Iterable[ClassSubset]) -> float:
    """Return which share of a sample is among the files of some views."""
    files = {mark: path for view in views for mark, path in files_by_mark(view).items()} if sample else {}
    known = [mark in files and digest_of(files[mark]).hex() == digest for mark, digest in sample.items()]
    return sum(known) / len(known) if known else 0.0


def warn_of_known(sample: Mapping[str, str], views: Iterable[ClassSubset], trained: str) -> None:
    """Warn of images that a network was trained on.

    Args:
        sample: What ``sample_of`` has found in its training images.
        views: Of images to test with.
        trained: What the warning calls the network.
    """
    known = share_of_known(sample, views)
    if known:
        share = f"about {100 * known:.0f}% of the images that {trained} was trained on"
        warn(f"{share} are among the test images: the metrics are not those of new classes")


def refuse_broken(paths: Sequence[str], of: int, first: str, skip_broken: bool) -> None:
    """Warn of image files that cannot be read, or refuse them.

    Args:
        paths: The paths of these files.
        of: How many images there are.
        first: What is wrong with the first.
        skip_broken: Whether they may be left out.

    Raises:
        ValueError: If they may not.
    """
    counted = f"{len(paths)} of {of} images"
    if not skip_broken:
        raise ValueError(f"cannot read {counted} (--skip-broken: leave them out): {some_of(paths)}; the first: {first}")
    warn(f"skipped {counted} that cannot be read: {some_of(paths)}")


def hold_out(data: RetrievalData, validation_classes: float, seed: int) -> RetrievalData:
    """Return data whose test classes are the validation classes; the data itself where there are to be none."""
    if not validation_classes:
        return data
    try:
        return data.hold_out(validation_classes, seed)
    except ValueError as error:
        count, counted = data.num_classes, f"{data.num_classes} training classes"
        if data.test is not None:
            counted += f" (of {count + data.test.num_classes}; the others are test classes)"
        if count < 4:
            raise ValueError(
                f"{counted} are too few for --validation-classes {validation_classes}: "
                "give 0 or, for data without a split, fewer --test-classes"
            ) from error
        raise ValueError(f"{error}: there are {counted}") from error


def absolute(source: Any) -> str | None:
    """Return a file or folder as an absolute path, which holds in any directory; a name as it is."""
    if source is None:
        return None
    return str(Path(source).resolve()) if os.path.exists(source) else str(source)


def source_of(data: str | Path) -> str | None:
    """Return what data is called in config.json: its name, or its absolute path."""
    return str(data) if is_name(data) else absolute(data)


def has_split(data: str | Path, root: str | None, reader: ImageReader | None) -> bool:
    """Whether data comes with test classes; they are not drawn from its classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is opened elsewhere, too
        return open_data(data, 0, root=root, reader=reader).test is not None


def number_of_queries(views: Sequence[ClassSubset]) -> int:
    """Return how many images have another of their class to be found; only those are queries."""
    queries, *gallery = (view.labels for view in views)
    sizes = (gallery[0] if gallery else queries).bincount(minlength=views[0].num_classes)
    return int((sizes[queries] > (0 if gallery else 1)).sum())


def counted(views: Sequence[ClassSubset]) -> str:
    """Return how many images and classes there are."""
    text = f"{number_of(len(views[0]), 'image')} of {number_of(views[0].num_classes, 'class', 'classes')}"
    others = len(views[0]) - number_of_queries(views)
    text += f", {others:,} of them without another of their class to be found" if others else ""
    return text if len(views) == 1 else f"{text}, searched for in {number_of(len(views[1]), 'image')}"
