"""``pml-ext evaluate``: measure how well the network of a run retrieves labeled images."""

from pathlib import Path
from typing import Any

from pml_ext.commands.labeled_images import check_readable, open_labeled
from pml_ext.commands.opened_data import Embedder, counted, metrics_of, number_of_queries, warn_of_copies
from pml_ext.commands.tables import METRICS, percent_table
from pml_ext.recipes.run_folder import load_run


def main(
    run: str | Path,
    data: str | Path | None = None,
    all_classes: bool = False,
    root: str | None = None,
    skip_broken: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    device: str | None = None,
) -> dict[str, Any]:
    """Print and return metrics; the arguments are those of the command."""
    loaded = load_run(run, device)
    images = open_labeled(loaded, data, all_classes, root)
    check_readable(images.views, skip_broken)
    warn_of_copies(images.views)
    embed = Embedder(skip_broken, loaded.autocast, workers, batch_size)
    views, embedded = embed.tested(loaded.recipe.trunk, images.views)
    metrics = metrics_of(embedded, tuple(METRICS))
    print(f"{images.source}{', test classes' if images.own else ''}: {counted(views)}")
    print(percent_table("percent", {f"{run}, epoch {loaded.epoch}": metrics}))
    counts = {"images": len(views[0]), "classes": views[0].num_classes, "queries": number_of_queries(views)}
    return metrics | counts | {"run": str(run), "epoch": loaded.epoch, "data": images.source}
