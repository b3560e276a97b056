"""The checkpoint of a run that is tested, embedded with, or gone on from."""

import warnings
from pathlib import Path
from typing import Any

from pml_ext.recipes.checkpoint import read_checkpoint
from pml_ext.strict_json import strict_json


def chosen_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the best epoch, unless it is one of another run than the last epoch; else the last."""
    best, last = folder / "best.pt", folder / "last.pt"
    paths = [path for path in (best, last) if path.is_file()]
    if not paths:
        raise FileNotFoundError(
            f"a run's folder must hold best.pt or last.pt, got {folder} with neither: has it been trained?"
        )
    states = [read_checkpoint(path) for path in paths]
    if len(states) == 2 and not _one_run(*states):
        warnings.warn(
            f"{best} is of another run than {last}, which is used instead: delete or move {best.name}", stacklevel=3
        )
        return last, states[1]
    kept = states[0].get("best")
    if paths == [last] and kept is not None and kept["epoch"] != len(states[0]["history"]):
        warnings.warn(
            f"{best} is missing, with epoch {kept['epoch']}, the best on validation classes: {last.name}, with the "
            "last epoch, is used instead",
            stacklevel=3,
        )
    return paths[0], states[0]


def _one_run(*states: dict[str, Any]) -> bool:
    """Whether the history of one checkpoint goes on with that of the other."""
    first, second = (
        [strict_json({n: x for n, x in entry.items() if n != "seconds"}) for entry in state["history"]]
        for state in states
    )
    common = min(len(first), len(second))
    if not states[1].get("validated", True):  # killed before the metrics of this epoch were known
        common = min(common, len(second) - 1)
    return first[:common] == second[:common]
