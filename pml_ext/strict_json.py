"""JSON that every reader takes: Python's writes NaN and Infinity, which JSON does not have."""

import json
import math
from typing import Any


def strict_json(value: Any, indent: int | None = None) -> str:
    """Return JSON in ASCII, with null for numbers that are not finite.

    Args:
        value: Dictionaries, lists, tuples, strings, numbers, bools and None; arrays and tensors become lists.
        indent: Spaces for each level. None: all in one line.

    Raises:
        TypeError: If there is something else in it.
        ValueError: If a key is a number that is not finite.

    Examples:
        >>> strict_json({"loss": float("nan"), "sizes": (1, 2.5)})
        '{"loss": null, "sizes": [1, 2.5]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=_refuse)


def _refuse(value: Any) -> Any:
    raise TypeError(f"JSON must be made of numbers, texts, lists and the like, got {value!r}")


def _finite(value: Any) -> Any:
    if hasattr(value, "tolist"):  # an array, a tensor, or a number of NumPy
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
