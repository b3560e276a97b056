"""Labeled images to test the network of a run with."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from pml_ext.commands.command_line import number_of, some_of, warn
from pml_ext.commands.opened_data import has_split, refuse_broken, share_of_known, source_of, warn_of_known
from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.image_files import ImageFiles, broken_images
from pml_ext.datasets.image_folder import ImageFolder
from pml_ext.datasets.image_reader import ImageReader
from pml_ext.datasets.labels import no_gallery_of
from pml_ext.datasets.leaving_out import views_of, without
from pml_ext.datasets.retrieval_data import RetrievalData
from pml_ext.datasets.sources import open_data, opens_folder
from pml_ext.recipes.run_folder import Run


class LabeledImages(NamedTuple):
    """Images with labels.

    Attributes:
        views: Queries, and the gallery if there is one, with the transform of the run.
        source: Where they come from.
        own: Whether these are the test classes of the run.
    """

    views: list[ClassSubset]
    source: str
    own: bool


def open_labeled(run: Run, data: str | Path | None, everything: bool, root: str | None) -> LabeledImages:
    """Return the images to test a run with.

    Args:
        run: The run.
        data: None, and what the run was trained on, wherever it is now: its test classes. Else all images, or of data
            with a split those of ``test``, or of ``query`` and ``gallery``.
        everything: Whether to take all images in any case.
        root: Folder of a data set with a name, as in ``open_data``.

    Raises:
        FileNotFoundError: If data is not there.
        ValueError: If it breaks a rule of ``open_data``, has no class with two images, or has changed so that the run's
            test classes are not known.
    """
    trained = run.config.get("data", {})
    source = trained.get("source")
    if data is None and (source is None or (os.sep in source and not os.path.exists(source))):
        why = "the run does not tell what it was trained on" if source is None else f"{source} is not there any more"
        raise FileNotFoundError(f"DATA must be given: {why}")
    own = data is None or (source is not None and source_of(data) == source_of(source))
    chosen = str(source if data is None else data)
    views = [] if own else _of_queries(Path(chosen), run.reader)
    unseen = False
    if not views:
        own = own or _has_moved(run, chosen, root)
        opened = (
            _as_trained(run, chosen, root, everything) if own else open_data(chosen, 0, root=root, reader=run.reader)
        )
        if own and not everything:
            _check_unchanged(run, opened, chosen, root)
        if everything and opened.test is not None:
            raise ValueError(f"--all-classes must be used with data without a split (train and test), got {chosen}")
        unseen = own and opened.test is not None
        views = [view for view in (opened.test, opened.gallery) if view is not None] or [opened.train]
        if own and not everything:
            parts = [name for name, view in views_of(opened).items() if any(view is x for x in views)]
            _tell_left_out([name for name in trained.get("left_out", []) if name.split("/")[0] in parts])
            if trained.get("sample") and not share_of_known(trained["sample"], [opened.train]):
                images = "the images have the names of those that the run was trained on, but none the content"
                warn(f"{images}: their test classes are taken (all images: --all-classes)")
        if own and not unseen:
            warn("the network was trained on some of these classes: the metrics are not those of new ones")
    if len(views) == 1 and views[0].labels.bincount().max() < 2:
        drawn = number_of(views[0].num_classes, "class", "classes")
        raise ValueError(f"DATA must have a class with two images, got {drawn} of one image each")
    if not own:
        warn_of_known(trained.get("sample", {}), views, "the network")
    for view in views:
        view.transform = run.recipe.transforms.test
    return LabeledImages(views, chosen, unseen)


def _as_trained(run: Run, source: str, root: str | None, everything: bool = False) -> RetrievalData:
    """Return data with the split that it has in the run, or without one that was drawn."""
    trained = run.config.get("data", {})
    share = 0 if everything else trained.get("test_classes", 0.5)
    root = trained.get("root") if root is None else root
    drawn = {"seed": run.config.get("seed", 0), "split_seed": trained.get("split_seed")}
    opened = open_data(source, share, root=root, reader=run.reader, **drawn)
    return opened if everything else without(opened, trained.get("left_out", []))


def _tell_left_out(names: list[str]) -> None:
    """Warn of images that the training left out; they are left out again."""
    if names:
        counted = number_of(len(names), "image")
        warn(f"left out {counted} that could not be read when the run was trained: {some_of(names)}")


def _changed(run: Run, opened: RetrievalData) -> list[str]:
    """Return the parts of data whose images are not those that the run began with."""
    known, views = run.config.get("data", {}).get("fingerprints", {}), views_of(opened)
    return [name for name, mark in known.items() if name not in views or views[name].fingerprint(sizes=False) != mark]


def _has_moved(run: Run, source: str, root: str | None) -> bool:
    """Whether data is what the run was trained on, at another place; the training images may have changed."""
    known = run.config.get("data", {}).get("fingerprints")
    if not known:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is opened again
            changed = _changed(run, _as_trained(run, source, root))
            return not changed or (changed == ["train"] and len(known) > 1)
    except (OSError, TypeError, ValueError):  # which are told when it is opened again
        return False


def _check_unchanged(run: Run, opened: RetrievalData, source: str, root: str | None) -> None:
    """Check that the test classes, where they were drawn, are still those of the run.

    Raises:
        ValueError: If they are not: some may be training classes.
    """
    changed = [name for name in _changed(run, opened) if name != "train"]
    if not changed:
        return
    if has_split(source, run.config["data"].get("root") if root is None else root, run.reader):
        return
    raise ValueError(
        "DATA must have the images that the run began with, or its test classes are not known, got other files or "
        f"labels for {changed[0]} (--all-classes: take all images)"
    )


def _of_queries(folder: Path, reader: ImageReader) -> list[ClassSubset]:
    """Return queries and gallery of a folder that has both and nothing to train with; nothing of others."""
    if not opens_folder(folder) or {e.name for e in os.scandir(folder) if e.is_dir()} != {"query", "gallery"}:
        return []
    return _of_gallery(*(ImageFolder(folder / part, reader=reader) for part in ("query", "gallery")))


def _of_gallery(queries: ImageFolder, gallery: ImageFolder) -> list[ClassSubset]:
    """Return queries and gallery, whose labels mean the same."""
    asked, searched = list(queries.class_names or ()), list(gallery.class_names or ())
    lost = [c for c in asked if c not in searched]
    if lost:
        raise ValueError(no_gallery_of(lost[0], searched))
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
