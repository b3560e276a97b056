"""Losses, networks and recipes on top of pytorch-metric-learning.

Subpackages load on first use (PEP 562), so that ``import pml_ext`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pml_ext.version import __version__

if TYPE_CHECKING:
    from pml_ext import (
        class_embeddings,
        datasets,
        distributed,
        evaluation,
        gradient_cache,
        learners,
        losses,
        neighbors,
        pairs,
        recipes,
        reducers,
        regularizers,
        samplers,
        streaming,
        trunks,
        visualization,
    )
    from pml_ext.validation import set_validation

__all__ = [
    "__version__",
    "class_embeddings",
    "datasets",
    "distributed",
    "evaluation",
    "gradient_cache",
    "learners",
    "losses",
    "neighbors",
    "pairs",
    "recipes",
    "reducers",
    "regularizers",
    "samplers",
    "set_validation",
    "streaming",
    "trunks",
    "visualization",
]

_MODULES = set(__all__) - {"__version__", "set_validation"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pml_ext.{name}")
    if name == "set_validation":
        return import_module("pml_ext.validation").set_validation
    raise AttributeError(f"module 'pml_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
