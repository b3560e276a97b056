"""``pml-ext report``: write an HTML file about what the network of a run finds and misses."""

import datetime
from pathlib import Path
from typing import Any

from pml_ext.commands.labeled_images import LabeledImages, about_run, check_readable, counted, open_labeled
from pml_ext.commands.opened_data import Embedder, Images, metrics_of
from pml_ext.commands.tables import percent_table
from pml_ext.datasets.content import file_names
from pml_ext.recipes.run_folder import Run, load_run
from pml_ext.visualization.report import retrieval_report


def main(
    run: str | Path,
    data: str | Path | None = None,
    all_classes: bool = False,
    root: str | None = None,
    skip_broken: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    device: str | None = None,
    against: str | Path | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Write the report of a run, or of one run against another; the arguments are those of the command."""
    loaded = load_run(run, device)
    images = open_labeled(loaded, data, all_classes, root)
    check_readable(images.views, skip_broken)

    def embedded_by(other: Run) -> Any:
        for view in images.views:
            view.transform = other.recipe.transforms.test
            if hasattr(view.dataset, "reader"):
                view.dataset.reader = other.reader
        return Embedder(skip_broken, other.autocast, workers, batch_size).tested(other.recipe.trunk, images.views)

    views, embedded = embedded_by(loaded)
    rows = {str(run): metrics_of(embedded)}
    given: dict[str, Any] = {}
    if len(views) == 2:
        given = {"gallery": embedded[1][0], "gallery_labels": embedded[1][1], "gallery_images": Images(views[1])}
        given["gallery_names"] = file_names(views[1])
    if against is not None:
        other = load_run(against, device)
        _, others = embedded_by(other)
        rows[str(against)] = metrics_of(others)
        given |= {"other": others[0][0], "other_title": str(against), "other_about": about_run(other)}
        if len(views) == 2:
            given["other_gallery"] = others[1][0]
    about = {"data": f"{images.source}: {counted(views)}", **about_run(loaded)}
    about["date"] = datetime.date.today().isoformat()
    path = retrieval_report(
        *embedded[0],
        Images(views[0]),
        views[-1].class_names,
        default_path(Path(run), images, against) if out is None else out,
        title=str(run),
        names=file_names(views[0]),
        about=about,
        progress=True,
        **given,
    )
    print(percent_table("percent", rows))
    print(f"report: {path}")
    return {"out": str(path), "metrics": rows}


def default_path(run: Path, images: LabeledImages, against: str | Path | None) -> Path:
    """Return where the report goes: beside the one that ``train`` has written, if it is about something else."""
    names = [] if images.own else [Path(images.source).resolve().stem]
    names += [] if against is None else ["against", Path(against).resolve().name]
    return run / ("-".join(["report", *names]) + ".html")
