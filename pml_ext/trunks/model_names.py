"""Names of timm models, and what they stand for."""

from difflib import get_close_matches
from typing import Any

import timm
import torch


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
    try:
        with torch.device("meta"):  # without memory and initialization: only to count
            outline: Any = timm.create_model(name, features_only=True, **timm_kwargs)
    except RuntimeError:  # some compute with values while they are made: timm's regnets, under torch 2.5
        outline = timm.create_model(name, features_only=True, **timm_kwargs)
    return len(outline.feature_info)
