"""What was trained in a folder, to have it back."""

import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pml_ext.recipes.building import recipe
from pml_ext.recipes.device import usable_device
from pml_ext.recipes.run_config import read_config
from pml_ext.recipes.training_recipe import Recipe


class Run(NamedTuple):
    """What was trained.

    Attributes:
        recipe: Network and loss with the weights of the checkpoint; the network in eval mode.
        config: What ``config.json`` holds.
        epoch: Of the checkpoint.
        autocast: dtype that the network was trained and evaluated with, or None.
        checksum: Of the network's weights; tells whether something was made with them.
    """

    recipe: Recipe
    config: dict[str, Any]
    epoch: int
    autocast: torch.dtype | None
    checksum: str


def load_run(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> Run:
    """Return what was trained in a folder.

    Args:
        folder: That of a ``Trainer``, with ``config.json``, and ``best.pt`` or, without validation, ``last.pt``.
        device: Of network and loss. None: CUDA if there is any, else the CPU.

    Raises:
        FileNotFoundError: If one of them is not there.
        ValueError: If one of them cannot be read, they do not belong together, or the device is not there.
    """
    folder, device = Path(folder), usable_device(device)
    config = read_config(folder)
    path = next((path for path in (folder / "best.pt", folder / "last.pt") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"a run's folder must hold best.pt or last.pt, got {folder} without; is it trained?")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        history, weights = state["history"], {"trunk": state["trunk"], "loss": state["loss"]}
    except Exception as error:  # of zip files, pickles and keys
        raise ValueError(f"cannot read {path}: {error}") from error
    settings = dict(config["settings"])
    if settings["backbone"] != "googlenet":  # which does something else to images where it is pretrained
        settings["pretrained"] = False  # no download: the weights are here
    rows = next((x for name, x in weights["loss"].items() if name.endswith("class_embeddings")), None)
    made = recipe(config["recipe"], config["num_classes"], preset=config["preset"], class_embeddings=rows, **settings)
    for name, module in (("trunk", made.trunk), ("loss", made.loss)):
        try:
            module.load_state_dict(weights[name])
        except RuntimeError as error:
            raise ValueError(f"{path} must hold the network of config.json, got another: {error}") from error
        module.to(device)
    made.trunk.eval()
    autocast = config.get("autocast")
    dtype = None if autocast is None else getattr(torch, autocast)
    return Run(made, config, history[-1]["epoch"], dtype, _checksum(made.trunk))


def _checksum(module: nn.Module) -> str:
    checksum = 0
    for x in module.state_dict().values():
        checksum = zlib.crc32(x.cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"
