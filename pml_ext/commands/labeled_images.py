"""Labeled images to test the network of a run with."""

import os
from pathlib import Path
from typing import NamedTuple

from pml_ext.commands.command_line import warn
from pml_ext.commands.opened_data import absolute, all_classes, refuse_broken
from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.image_files import ImageFiles, broken_images
from pml_ext.datasets.image_folder import ImageFolder
from pml_ext.datasets.image_reader import ImageReader
from pml_ext.datasets.leaving_out import without
from pml_ext.datasets.sources import open_data, opens_folder
from pml_ext.recipes.run_folder import Run


class LabeledImages(NamedTuple):
    """Images with labels.

    Attributes:
        views: Queries, and the gallery if there is one, with the transform of the run.
        source: Of what they are.
        own: Whether these are the test classes of the run.
    """

    views: list[ClassSubset]
    source: str
    own: bool


def open_labeled(run: Run, data: str | Path | None, everything: bool, root: str | None) -> LabeledImages:
    """Return the images to test a run with.

    Args:
        run: The run.
        data: None, and what the run was trained on: its test classes. Else all images, or of data with a split those of
            ``test``, or of ``query`` and ``gallery``.
        everything: Whether to take all images in any case.
        root: As in ``open_data``.

    Raises:
        FileNotFoundError: If data is not there.
        ValueError: If it breaks a rule of ``open_data``, or the run has no test classes.
    """
    trained = run.config.get("data", {})
    source = trained.get("source")
    if data is None and (source is None or (os.sep in source and not os.path.exists(source))):
        why = "the run does not tell what it was trained on" if source is None else f"{source} is not there any more"
        raise FileNotFoundError(f"DATA must be given: {why}")
    own = data is None or (source is not None and absolute(data) == absolute(source))
    chosen = str(source if data is None else data)
    root = trained.get("root") if root is None and own else root
    views = _of_folder(Path(chosen), run.reader) if not own and opens_folder(chosen) else []
    unseen = own
    if not views:
        share, seed = (trained.get("test_classes", 0.5), run.config.get("seed", 0)) if own else (1, 0)
        opened = open_data(chosen, 1 if share == 0 else share, root=root, seed=seed, reader=run.reader)
        if own:
            opened = without(opened, trained.get("left_out", []))
        no_split = opened.gallery is None and opened.train.dataset.labels is opened.test.dataset.labels
        if everything or (not own and no_split) or (own and share == 0):
            opened = all_classes(opened, "--all-classes")
        views = [view for view in (opened.test, opened.gallery) if view is not None]
        unseen = own and opened.test is not opened.train
        if own and not unseen:
            warn("the network was trained on some of these classes: the metrics are not those of new ones")
    for view in views:
        view.transform = run.recipe.transforms.test
    return LabeledImages(views, chosen, unseen)


def _of_folder(folder: Path, reader: ImageReader) -> list[ClassSubset]:
    """Return the images of a folder of classes, or of queries and gallery; none where it has another split."""
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    if names >= {"query", "gallery"} and "train" not in names:
        return _of_gallery(*(ImageFolder(folder / part, reader=reader) for part in ("query", "gallery")))
    if names & {"train", "test", "query", "gallery"}:
        return []
    whole = ImageFolder(folder, reader=reader)
    return [ClassSubset(whole, range(len(whole.class_names or ())))]


def _of_gallery(queries: ImageFolder, gallery: ImageFolder) -> list[ClassSubset]:
    """Return queries and gallery, whose labels mean the same."""
    asked, searched = list(queries.class_names or ()), list(gallery.class_names or ())
    lost = [c for c in asked if c not in searched]
    if lost:
        raise ValueError(f"query classes must have gallery images, got none of {lost[0]!r}")
    names = [*asked, *(c for c in searched if c not in asked)]
    views = []
    for part, classes in ((queries, asked), (gallery, searched)):
        labels = [names.index(classes[label]) for label in part.labels.tolist()]
        files = ImageFiles(list(part.paths), labels, None, names, part.reader)
        views.append(ClassSubset(files, range(len(asked) if part is queries else len(names))))
    return views


def check_readable(views: list[ClassSubset], skip_broken: bool) -> None:
    """Check that image files can be read, as far as that shows without decoding most of them.

    Raises:
        ValueError: If some cannot, and they may not be skipped; the message names them.
    """
    if skip_broken:
        return
    files = [view for view in views if isinstance(view.dataset, ImageFiles)]
    paths = [view.dataset.paths[i] for view in files for i in view.indices.tolist()]
    reasons = broken_images(paths, True, files[0].dataset.reader) if files else {}
    if reasons:
        refuse_broken([paths[i] for i in reasons], len(paths), next(iter(reasons.values())), skip_broken)
