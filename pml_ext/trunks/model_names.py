"""Names of timm models, and what they stand for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn

from pml_ext.validation import shown


def check_model_name(name: str, others: tuple[str, ...] = ()) -> None:
    """Check that timm has a model.

    Args:
        name: What the user calls it.
        others: Names that are known besides timm's.

    Raises:
        ValueError: If there is no such model; the message has names like it.
    """
    if name in others or (timm.is_model(name) and _knows_tag(name)):
        return
    known = [*others, *timm.list_models()]
    close = get_close_matches(name, known, n=5) or known[:5]
    raise ValueError(f"backbone must be a timm model such as {', '.join(close)}, got {name!r}")


def _knows_tag(name: str) -> bool:
    """Whether the weights that a name has behind its dot are known."""
    model, _, tag = name.partition(".")
    return not tag or name in timm.list_pretrained(f"{model}.*")


def check_backbone(backbone: Any) -> None:
    """Check that a backbone is a name or a module.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(backbone, str | nn.Module):
        raise TypeError(f"backbone must be a name or a torch.nn.Module, got {shown(backbone)}")


def name_of_timm_model(backbone: nn.Module) -> str:
    """Return what timm calls a model that it has made, for a message; of others "name"."""
    config = getattr(backbone, "pretrained_cfg", None)
    return repr(config.get("architecture") or "name") if isinstance(config, dict) else repr("name")


@contextmanager
def arguments_of(name: str) -> Iterator[None]:
    """Say in words of the trunks that timm's model has no such argument, or that the trunk gives it.

    Raises:
        TypeError: Then.
    """
    try:
        yield
    except TypeError as error:
        unknown = re.search(r"got an unexpected keyword argument '(\w+)'", str(error))
        twice = re.search(r"got multiple values for keyword argument '(\w+)'", str(error))
        if unknown is not None:
            raise TypeError(f"{unknown[1]} is an argument neither of the trunk nor of timm's {name}") from error
        if twice is not None:
            raise TypeError(f"{twice[1]} must not be given: the trunk gives it to timm's {name}") from error
        raise


def refuse_timm_options(pretrained: bool, timm_kwargs: dict[str, Any]) -> None:
    """Check that nothing is given that only a backbone made by its name could have.

    Raises:
        ValueError: If something is; the message names it.
    """
    given = sorted({*timm_kwargs, *(["pretrained"] if pretrained else [])})
    if given:
        raise ValueError(f"{', '.join(given)} must not be given with a backbone that is a module")


def count_levels(name: str, timm_kwargs: dict[str, Any]) -> int:
    """Return how many feature maps a timm model gives, stem to last stage."""
    with arguments_of(name):
        try:
            with torch.device("meta"):  # without memory and initialization: only to count
                outline: Any = timm.create_model(name, features_only=True, **timm_kwargs)
        except RuntimeError:  # some compute with values while they are made: timm's regnets, under torch 2.5
            outline = timm.create_model(name, features_only=True, **timm_kwargs)
    return len(outline.feature_info)
