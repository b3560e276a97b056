"""Load what was trained in a folder."""

import os
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pml_ext.datasets.image_reader import ImageReader
from pml_ext.recipes.building import recipe
from pml_ext.recipes.device import usable_device
from pml_ext.recipes.networks import matched_state
from pml_ext.recipes.run_checkpoint import chosen_checkpoint
from pml_ext.recipes.run_config import autocast_of, read_config, reader_from
from pml_ext.recipes.training_recipe import Recipe


class Run(NamedTuple):
    """A trained network with its settings, as ``load_run`` returns it.

    Attributes:
        recipe: Network and loss with the weights of the checkpoint; the network in eval mode.
        config: What ``config.json`` holds.
        epoch: Epoch of the checkpoint.
        autocast: dtype that the network was trained and evaluated with, or None.
        checksum: Checksum of the network's weights, which tells whether an index was made with them.
        reader: Reads image files as in the training.
    """

    recipe: Recipe
    config: dict[str, Any]
    epoch: int
    autocast: torch.dtype | None
    checksum: str
    reader: ImageReader


def load_run(
    folder: str | os.PathLike[str], device: torch.device | str | None = None, backbone: nn.Module | None = None
) -> Run:
    """Return the network, the loss and the settings that were trained in a folder.

    Args:
        folder: Folder of a ``Trainer``, with ``config.json``, and ``best.pt`` or, without validation or where that is
            of another run, ``last.pt``.
        device: Device of network and loss. None: CUDA if there is any, else the CPU.
        backbone: A network like the one that was given to ``recipe``, for a run with one of the user's own.

    Raises:
        FileNotFoundError: If one of them is not there.
        ValueError: If one of them cannot be read, they do not belong together, or the device is not there.
    """
    folder, device = Path(folder), usable_device(device)
    config = read_config(folder)
    path, state = chosen_checkpoint(folder)
    settings = dict(config["settings"])
    if settings["backbone"] != "googlenet":  # which does something else to images where it is pretrained
        settings["pretrained"] = False  # no download: the weights are here
    settings["weights"] = None
    if (backbone is None) == (settings["backbone"] == "module"):
        rule = "must not be given" if backbone is not None else "must be given"
        raise ValueError(f"backbone {rule} for the run in {folder}, which has the backbone {settings['backbone']!r}")
    if backbone is not None:
        settings["backbone"] = backbone
    rows = next((x for name, x in state["loss"].items() if name.endswith("class_embeddings")), None)
    try:
        reader = reader_from(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* no effect here")  # told when the run began
            made = recipe(
                config["recipe"],
                config["num_classes"],
                preset=config["preset"],
                class_embeddings=rows,
                **settings,
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} must describe a recipe: {error}") from error
    rule = f"{path} must hold the network of config.json"
    for module, weights in ((made.trunk, state["trunk"]), (made.loss, state["loss"])):
        module.load_state_dict(matched_state(module, weights, rule))
        module.to(device)
    made.trunk.eval()
    return Run(made, config, state["history"][-1]["epoch"], autocast_of(config), _checksum(made.trunk), reader)


def _checksum(module: nn.Module) -> str:
    checksum = 0
    for x in module.state_dict().values():
        checksum = zlib.crc32(x.cpu().numpy().tobytes(), checksum)
    return f"{checksum:08x}"
