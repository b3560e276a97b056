"""``config.json`` in the folder of a run: what was trained, in plain values."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pml_ext.datasets.image_reader import ImageReader
from pml_ext.recipes.checkpoint import write_text
from pml_ext.recipes.settings import COMMON, HALVES, IMAGENET, MAY_LACK, as_they_were, with_former_values
from pml_ext.recipes.training_recipe import Recipe
from pml_ext.strict_json import strict_json
from pml_ext.version import __version__

_GONE = {"depth": 1}  # settings of former versions, and where they changed nothing
_ONLY_AT_THE_START = ("similarity_gain",)  # settings of former versions that weights were drawn with
_ADDED = {  # settings that former versions had not, and what they did
    "sampler": "MPerClassSampler",
    "chunk_size": None,
    "weights": None,
    "frozen_stages": 0,
    "channels_last": False,
    "crop_scale": 0.08,
    "pixel_mean": None,
    "pixel_std": None,
}
_FORMAT = 2
"""Of config.json. 1, not written: learners with masks on networks of timm pooled by the average, whatever
``pool_type`` said, and ``masks`` and ``freeze_batch_norm`` could be True for networks that cannot have them."""
LEFT_OUT = tuple(f"settings.{name}" for name in MAY_LACK)
"""What is False where the network cannot have it."""
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_run(made: Recipe, autocast: torch.dtype | None = None, **more: Any) -> dict[str, Any]:
    """Return what ``load_run`` needs to build a recipe again, as plain values that JSON knows.

    Args:
        made: The recipe.
        autocast: dtype of the network's forward pass, as in ``Trainer``.
        **more: Whatever else is worth knowing, such as data and seed.

    Raises:
        TypeError: If something is not a plain value; numbers of NumPy and of tensors become Python's.
    """
    packages = ("torch", "pytorch-metric-learning", "timm", "numpy")
    config = {
        "format": _FORMAT,
        "recipe": made.name,
        "num_classes": made.num_classes,
        "preset": made.settings.preset,
        "settings": dict(made.settings.items()),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        **more,
        "versions": {"pml-ext": __version__} | {name: version(name) for name in packages},
    }
    if isinstance(config["settings"]["weights"], Mapping):
        config["settings"]["weights"] = "a state dict"
    plain: dict[str, Any] = json.loads(strict_json(config))
    return plain


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what a training is other with than one that is to go on: "settings.lr: 0.1, got 0.2", ...

    Args:
        before: The configuration of what was trained.
        now: The one to go on with. How many epochs there are, and what matters only at the start, may differ.
    """
    both = [with_former_values(x["recipe"], x["preset"], x["settings"]) for x in (before, now)]
    for config, settings in zip((before, now), both, strict=True):
        if "format" not in config:
            as_they_were(config["recipe"], settings)
        for name in ("epochs", "pretrained", "weights"):  # weights are in the checkpoint
            settings.pop(name, None)
    known = "reader" in before and "reader" in now  # former versions did not keep it
    both = [
        {name: config.get(name) for name in ("recipe", "num_classes", "autocast")}
        | {f"settings.{name}": value for name, value in settings.items()}
        | {f"reader.{name}": value for name, value in (config["reader"] if known else {}).items()}
        for config, settings in zip((before, now), both, strict=True)
    ]
    names = dict.fromkeys([*both[0], *both[1]])
    there, here = both
    if "format" not in before:
        names = {n: None for n in names if n not in LEFT_OUT or here.get(n) is not False}
    return [f"{n}: {there.get(n)!r}, got {here.get(n)!r}" for n in names if there.get(n) != here.get(n)]


def autocast_of(config: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype that a configuration names."""
    name = config.get("autocast")
    return None if name is None else _AUTOCAST[name]


def reader_from(config: dict[str, Any]) -> ImageReader:
    """Return what reads image files as in the training: the default of those that keep nothing of it.

    Raises:
        ValueError: If there is no such reader.
    """
    values = config.get("reader", {})
    try:
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
        return ImageReader(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"reader must have the settings of an ImageReader, got {values!r}: {error}") from error


def write_config(folder: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write ``config.json``, whole or not at all."""
    write_text(Path(folder) / "config.json", strict_json(config, indent=2) + "\n")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``config.json`` holds, with the settings of former versions as this one has them.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not what ``write_config`` writes, or a setting that is gone had changed something.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        got = f"the file {folder}" if Path(folder).is_file() else f"{folder} without one"
        raise FileNotFoundError(f"a run's folder must hold config.json, got {got}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    missing = {"recipe", "num_classes", "preset", "settings"} - (set(config) if isinstance(config, dict) else set())
    if missing:
        raise ValueError(f"{path} must have {min(missing)!r}, got none")
    settings, autocast = config["settings"], config.get("autocast")
    missing = set(COMMON) - set(_ADDED) - (set(settings) if isinstance(settings, dict) else set())
    if missing:
        raise ValueError(f"{path}: settings must have {min(missing)!r}, got none")
    if autocast is not None and (not isinstance(autocast, str) or autocast not in _AUTOCAST):
        raise ValueError(f"{path}: autocast must be one of {', '.join(_AUTOCAST)} or null, got {autocast!r}")
    for name in _ONLY_AT_THE_START:
        config["settings"].pop(name, None)
    for name, value in _GONE.items():
        former = config["settings"].pop(name, value)
        if former != value:
            raise ValueError(f"{path}: the setting {name!r} no longer exists and must have been {value}, got {former}")
    config["settings"] = settings = with_former_values(config["recipe"], config["preset"], _ADDED | config["settings"])
    if "format" not in config:
        as_they_were(config["recipe"], settings)
    if settings["pixel_mean"] is None:  # by preset, whatever the backbone
        ours = config["preset"] == "small" or settings["in_channels"] != 3
        settings["pixel_mean"], settings["pixel_std"] = [
            x[: settings["in_channels"]] for x in (HALVES if ours else IMAGENET)
        ]
    return dict(config)
