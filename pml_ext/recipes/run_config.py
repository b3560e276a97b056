"""``config.json`` in the folder of a run: what was trained, in plain values."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pml_ext.recipes.training_recipe import Recipe
from pml_ext.strict_json import strict_json
from pml_ext.version import __version__

_GONE = {"depth": 1}  # settings of former versions, and where they changed nothing
_ONLY_AT_THE_START = ("similarity_gain",)  # settings of former versions that weights were drawn with


def describe_run(made: Recipe, autocast: torch.dtype | None = None, **more: Any) -> dict[str, Any]:
    """Return what ``load_run`` needs to build a recipe again, as plain values that JSON knows.

    Args:
        made: The recipe.
        autocast: As in ``Trainer``.
        **more: Whatever else is worth knowing, such as data and seed.
    """
    packages = ("torch", "pytorch-metric-learning", "timm", "numpy")
    config = {
        "recipe": made.name,
        "num_classes": made.num_classes,
        "preset": made.settings.preset,
        "settings": dict(made.settings.items()),
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        **more,
        "versions": {"pml-ext": __version__} | {name: version(name) for name in packages},
    }
    plain: dict[str, Any] = json.loads(strict_json(config))
    return plain


def write_config(folder: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write ``config.json``, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json.new").write_text(strict_json(config, indent=2) + "\n", encoding="utf-8")
    os.replace(folder / "config.json.new", folder / "config.json")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``config.json`` holds, without settings of former versions that change nothing now.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not what ``write_config`` writes, or a setting that is gone had changed something.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"a run's folder must hold config.json, got {folder} without")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    missing = {"recipe", "num_classes", "preset", "settings"} - (set(config) if isinstance(config, dict) else set())
    if missing:
        raise ValueError(f"{path} must have {min(missing)!r}, got none")
    for name in _ONLY_AT_THE_START:
        config["settings"].pop(name, None)
    for name, value in _GONE.items():
        former = config["settings"].pop(name, value)
        if former != value:
            raise ValueError(f"{path}: the setting {name!r} is gone, and must have been {value}, got {former}")
    return dict(config)
