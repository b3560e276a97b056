"""The arguments of all commands: their help needs no torch, whose import takes seconds."""

import argparse
import ast
from typing import Any

from pml_ext.commands.command_line import Command
from pml_ext.recipes.methods import DEFAULT_RECIPE, RECIPES
from pml_ext.recipes.settings import PRESETS

COMMANDS = {
    "train": "train a network on images, and test it on classes that it has never seen",
    "embed": "embed a folder of images with a trained network, and index them",
    "search": "find the images most similar to an image",
    "evaluate": "measure how well a trained network retrieves labeled images",
    "report": "write an HTML file about what a trained network finds and misses",
    "recipes": "list the recipes, or the settings of one and where each comes from",
    "doctor": "show versions, extras and devices, and what would work",
}
"""The commands, and what each does."""

DATA_NAMES = ("glyphs", "cub", "cars196", "stanford_online_products", "sop", "inaturalist2018", "in_shop")
"""The data sets that have a name."""

_EXAMPLES = {
    "train": "pml-ext train photos/ --epochs 20 --out runs/photos",
    "embed": "pml-ext embed runs/photos photos/",
    "search": "pml-ext search runs/photos photos/cat/1.jpg --k 10",
    "evaluate": "pml-ext evaluate runs/photos photos/",
    "report": "pml-ext report runs/photos\npml-ext report runs/photos --against runs/others",
    "recipes": f"pml-ext recipes\npml-ext recipes {DEFAULT_RECIPE} --preset finetune",
    "doctor": "pml-ext doctor",
}
_DATA = "folder with a sub-folder for each class, with or without a split; a .csv or .npz file; or a name:"
_WORDING = {
    "a run's folder must": "RUN must",
    "trunk must": "the network of RUN must",
    "dataset must": "DATA must",
    "source must": "DATA must",
}
_WORDINGS = {
    "train": _WORDING
    | {
        "a run's folder must": "--out must",
        "name must": "--recipe must",
        "a setting must": "--set must",
        "epochs must": "--epochs must",
        "val_classes must": "--validation-classes must",
        "class_embeddings must be given for adaptive margins (or margin_scale=0)": (
            "--class-embeddings names (or FILE) must be given for adaptive margins (or --set margin_scale=0)"
        ),
    },
    "embed": _WORDING | {"dataset must": "IMAGES must", "an index's folder must": "--out must"},
}


def make_parser(name: str) -> Command:
    """Return the parser of a command."""
    usage = f"pml-ext {name} [options]" + {
        "train": " DATA",
        "embed": " RUN IMAGES",
        "search": " RUN QUERY",
        "evaluate": " RUN [DATA]",
        "report": " RUN [DATA]",
        "recipes": " [NAME]",
        "doctor": "",
    }.get(name, "")
    about = COMMANDS[name]
    command = Command(
        f"pml-ext {name}",
        _EXAMPLES[name],
        _WORDINGS.get(name, _WORDING),
        usage=usage,
        description=about[0].upper() + about[1:] + ".",
    )
    _ARGUMENTS[name](command)
    command.add_argument("--json", action="store_true", help="print one JSON object, and all else to stderr")
    return command


def _train(command: Command) -> None:
    add = command.add_argument
    add("data", metavar="DATA", help=f"{_DATA} {', '.join(DATA_NAMES[:3])}, sop, ...")
    add("--out", metavar="FOLDER", help="folder of the run; default: runs/ and the name of DATA")
    add("--recipe", metavar="NAME", help=f'default: {DEFAULT_RECIPE}; "pml-ext recipes" lists all')
    add("--preset", metavar="NAME", help="default: finetune for image files where weights are at hand, else small")
    add("--epochs", type=int, metavar="N", help="default: the preset's")
    add("--seed", type=int, metavar="N", help="of weights, batches and validation classes; default: 0")
    add("--seeds", type=int, metavar="N", help="train N times, into FOLDER/seed-0, ...; mean and spread")
    add("--backbone", metavar="NAME", help="convnet or a timm model; default: the preset's")
    add("--weights", metavar="FILE", help='of the backbone: a file, "installed", or the folder of a run')
    add("--init-from", metavar="RUN", help="start from the network and settings of a run, for new classes")
    add("--embedding-size", type=int, metavar="N", help="default: the preset's")
    add("--image-size", type=int, metavar="N", help="pixels; default: the preset's, small: the first image's")
    add("--chunk-size", type=int, metavar="N", help="images that the network gets at a time; default: a batch")
    add(
        "--set", dest="settings", type=setting, nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help='other settings: "pml-ext recipes NAME"',
    )  # fmt: skip
    add("--test-classes", type=number, metavar="N", help="share or number, without a split; 0: none; default: 0.5")
    add("--split-seed", type=int, metavar="N", help="draws the test classes, without a split; default: 0")
    add("--validation-classes", type=number, metavar="N", help="of training classes; default: 0.2, of few 0")
    add("--class-embeddings", metavar="FILE", help="names (of the classes), or .npy or .npz with a row for each")
    add("--root", metavar="FOLDER", help="folder of a data set with a name")
    add("--download", action="store_true", help="download it if it is not there")
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    add("--background", metavar="COLOR", help="shows where an image is transparent; default: white")
    add("--no-turn", dest="turn", action="store_const", const=False, help="do not turn images as EXIF says")
    add("--white", type=number_or_largest, metavar="N", help="white of gray images of 16 bits, or largest")
    add(
        "--autocast",
        choices=["bfloat16"],
        help="the network computes in this type; slow on x86 processors without AVX-512",
    )
    add("--workers", type=int, default=0, metavar="N", help="processes that load images")
    add("--device", metavar="NAME", help="default: cuda if there is one")
    add("--resume", action="store_true", help="go on with the run in FOLDER, also to more --epochs")


def _with_a_network(command: Command, batch_size: bool = True) -> None:
    if batch_size:
        command.add_argument("--batch-size", type=int, default=256, metavar="N", help="images at a time; default: 256")
        command.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images")
    command.add_argument("--device", metavar="NAME", help="default: cuda if there is one")


def _embed(command: Command) -> None:
    add = command.add_argument
    add("run", metavar="RUN", help="folder of a trained network")
    add("images", metavar="IMAGES", help="folder with images, in it or below")
    add("--out", metavar="FOLDER", help="folder of the index; default: RUN/index")
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    _with_a_network(command)


def _search(command: Command) -> None:
    add = command.add_argument
    add("run", metavar="RUN", help="folder of a trained network")
    add("query", metavar="QUERY", help="an image")
    add("--k", type=int, default=10, metavar="N", help="how many neighbors; default: 10")
    add("--index", metavar="FOLDER", help='of "pml-ext embed"; default: RUN/index')
    add("--out", metavar="FILE", help="the picture; default: RUN/search.png")
    _with_a_network(command, batch_size=False)


def _of_data(command: Command) -> None:
    add = command.add_argument
    add("run", metavar="RUN", help="folder of a trained network")
    add("data", metavar="DATA", nargs="?", help="as for train; default, and for the run's own: its test classes")
    add("--all-classes", action="store_true", help="all images of DATA, those of training classes too")
    add("--root", metavar="FOLDER", help="folder of a data set with a name")
    add("--skip-broken", action="store_true", help="leave out images that cannot be read")
    _with_a_network(command)


def _report(command: Command) -> None:
    _of_data(command)
    command.add_argument("--against", metavar="RUN", help="another run: what got better, and what worse")
    command.add_argument("--out", metavar="FILE", help="default: RUN/report.html")


def _recipes(command: Command) -> None:
    command.add_argument("name", metavar="NAME", nargs="?", help=", ".join(RECIPES))
    command.add_argument("--preset", default="finetune", metavar="NAME", help=f"{', '.join(PRESETS)}")


def _doctor(command: Command) -> None:
    pass


_ARGUMENTS = {
    "train": _train,
    "embed": _embed,
    "search": _search,
    "evaluate": _of_data,
    "report": _report,
    "recipes": _recipes,
    "doctor": _doctor,
}


def number(text: str) -> int | float:
    """Return an integer (how many) or a float (a share)."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def number_or_largest(text: str) -> int | str:
    """Return an integer, or "largest"."""
    if text != "largest" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer or largest, got {text!r}")
    return text if text == "largest" else int(text)


def setting(text: str) -> tuple[str, Any]:
    """Return name and value of "name=value"."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be name=value, got {text!r}")
    for word, meaning in (("true", True), ("false", False), ("none", None)):
        if value.lower() == word:
            return name, meaning
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
