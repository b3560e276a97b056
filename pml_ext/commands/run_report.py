"""The report of a run, as ``train`` and ``report`` write it."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pml_ext.commands.opened_data import Images
from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.content import file_names
from pml_ext.recipes.run_folder import Run
from pml_ext.visualization.report import retrieval_report

Embedded = Sequence[tuple[Tensor, Tensor]]
"""Embeddings and labels of queries and, if there is one, a gallery."""


def write_run_report(
    path: Path,
    run: Run,
    title: str,
    source: str,
    views: Sequence[ClassSubset],
    embedded: Embedded,
    other: tuple[Run, str, Embedded] | None = None,
) -> Path:
    """Write the report of a run, or of one against another.

    Args:
        path: Where the file goes.
        run: The run.
        title: The page's title.
        source: Where the images come from.
        views: Queries and, if there is one, gallery.
        embedded: What the run makes of the views.
        other: Another run, its title, and what it makes of the views.
    """
    given: dict[str, Any] = {"names": file_names(views[0])}
    if len(views) == 2:
        given |= {"gallery": embedded[1][0], "gallery_labels": embedded[1][1], "gallery_images": Images(views[1])}
        given["gallery_names"] = file_names(views[1])
    if other is not None:
        other_run, other_title, others = other
        given |= {"other": others[0][0], "other_title": other_title, "other_about": _about(other_run, source)}
        if len(views) == 2:
            given["other_gallery"] = others[1][0]
    embeddings, labels = embedded[0]
    images: Any = Images(views[0])
    names = views[-1].class_names  # a gallery has all classes of the queries, with the same numbers, and others
    about = _about(run, source)
    return retrieval_report(embeddings, labels, images, names, path, title=title, about=about, progress=True, **given)


def _about(run: Run, source: str) -> dict[str, Any]:
    """Return what the head of a report tells."""
    config = run.config
    return {
        "data": source,
        "recipe": config["recipe"],
        "preset": config["preset"],
        "epoch": run.epoch,
        "seed": config.get("seed", "unknown"),
        "date": datetime.date.today().isoformat(),
        "settings": config["settings"] | config.get("start", {}),  # of one that went on: what it began with
    }
