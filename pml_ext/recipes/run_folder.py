"""What was trained in a folder, to have it back."""

import os
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pml_ext.datasets.image_reader import ImageReader
from pml_ext.recipes.building import recipe
from pml_ext.recipes.checkpoint import read_checkpoint
from pml_ext.recipes.device import usable_device
from pml_ext.recipes.networks import matched_state
from pml_ext.recipes.run_config import autocast_of, read_config, reader_from
from pml_ext.recipes.training_recipe import Recipe
from pml_ext.strict_json import strict_json


class Run(NamedTuple):
    """What was trained.

    Attributes:
        recipe: Network and loss with the weights of the checkpoint; the network in eval mode.
        config: What ``config.json`` holds.
        epoch: Of the checkpoint.
        autocast: dtype that the network was trained and evaluated with, or None.
        checksum: Of the network's weights; tells whether something was made with them.
        reader: What reads image files as in the training.
    """

    recipe: Recipe
    config: dict[str, Any]
    epoch: int
    autocast: torch.dtype | None
    checksum: str
    reader: ImageReader


def load_run(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> Run:
    """Return what was trained in a folder.

    Args:
        folder: That of a ``Trainer``, with ``config.json``, and ``best.pt`` or, without validation or where that is of
            another run, ``last.pt``.
        device: Of network and loss. None: CUDA if there is any, else the CPU.

    Raises:
        FileNotFoundError: If one of them is not there.
        ValueError: If one of them cannot be read, they do not belong together, or the device is not there.
    """
    folder, device = Path(folder), usable_device(device)
    config = read_config(folder)
    path, state = _chosen(folder)
    settings = dict(config["settings"])
    if settings["backbone"] != "googlenet":  # which does something else to images where it is pretrained
        settings["pretrained"] = False  # no download: the weights are here
    rows = next((x for name, x in state["loss"].items() if name.endswith("class_embeddings")), None)
    try:
        reader = reader_from(config)
        made = recipe(
            config["recipe"], config["num_classes"], preset=config["preset"], class_embeddings=rows, **settings
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} must describe a recipe: {error}") from error
    rule = f"{path} must hold the network of config.json"
    for module, weights in ((made.trunk, state["trunk"]), (made.loss, state["loss"])):
        module.load_state_dict(matched_state(module, weights, rule))
        module.to(device)
    made.trunk.eval()
    return Run(made, config, state["history"][-1]["epoch"], autocast_of(config), _checksum(made.trunk), reader)


def _chosen(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the best epoch, unless it is one of another run than the last epoch; else the last."""
    best, last = folder / "best.pt", folder / "last.pt"
    paths = [path for path in (best, last) if path.is_file()]
    if not paths:
        raise FileNotFoundError(f"a run's folder must hold best.pt or last.pt, got {folder} without; is it trained?")
    states = [read_checkpoint(path) for path in paths]
    if len(states) == 2 and not _one_run(*states):
        warnings.warn(f"{best} is of another run than {last}, which is taken: delete or move it", stacklevel=3)
        return last, states[1]
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


def _checksum(module: nn.Module) -> str:
    checksum = 0
    for x in module.state_dict().values():
        checksum = zlib.crc32(x.cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"
