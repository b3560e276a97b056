"""``pml-ext report``: write an HTML file about what the network of a run finds and misses."""

from pathlib import Path
from typing import Any

from pml_ext.commands.command_line import warn
from pml_ext.commands.labeled_images import LabeledImages, check_readable, open_labeled
from pml_ext.commands.opened_data import Embedder, counted, metrics_of, warn_of_copies
from pml_ext.commands.run_report import write_run_report
from pml_ext.commands.tables import percent_table
from pml_ext.recipes.run_folder import Run, load_run


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
    warn_of_copies(images.views)

    def embedded_by(other: Run) -> Any:
        for view in images.views:
            view.transform = other.recipe.transforms.test
            if hasattr(view.dataset, "reader"):
                view.dataset.reader = other.reader
        return Embedder(skip_broken, other.autocast, workers, batch_size).tested(other.recipe.trunk, images.views)

    views, embedded = embedded_by(loaded)
    rows, other = {str(run): metrics_of(embedded)}, None
    if against is not None:
        loaded_other = load_run(against, device)
        if images.own and tested_on(loaded) != tested_on(loaded_other):
            warn(f"{against} has other test classes than {run}: it may have been trained on some of these")
        other = loaded_other, str(against), embedded_by(loaded_other)[1]
        rows[str(against)] = metrics_of(other[2])
    path = default_path(Path(run), images, against) if out is None else Path(out)
    path = write_run_report(path, loaded, str(run), f"{images.source}: {counted(views)}", views, embedded, other)
    print(percent_table("percent", rows))
    print(f"report: {path}")
    return {"out": str(path), "metrics": rows}


def tested_on(run: Run) -> dict[str, str]:
    """Return what tells the test images of a run from others."""
    marks = run.config.get("data", {}).get("fingerprints", {})
    return {name: mark for name, mark in marks.items() if name != "train"}


def default_path(run: Path, images: LabeledImages, against: str | Path | None) -> Path:
    """Return where the report goes: beside the one that ``train`` has written, if it is about something else."""
    source = Path(images.source).resolve()
    names = [] if images.own else [source.stem if source.is_file() else source.name]
    names += [] if against is None else ["against", Path(against).resolve().name]
    return run / ("-".join(["report", *names]) + ".html")
