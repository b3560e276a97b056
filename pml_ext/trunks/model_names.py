"""Names of timm models."""

from difflib import get_close_matches

import timm


def check_model_name(name: str, others: tuple[str, ...] = ()) -> None:
    """Check that timm has a model.

    Args:
        name: What the user calls it.
        others: Names that are known besides timm's.

    Raises:
        ValueError: If there is no such model; the message has names like it.
    """
    if name in others or timm.is_model(name):
        return
    known = [*others, *timm.list_models()]
    close = get_close_matches(name, known, n=5) or known[:5]
    raise ValueError(f"backbone must be a timm model such as {', '.join(close)}, got {name!r}")
