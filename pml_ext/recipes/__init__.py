"""The trainings of the papers and their baselines, each in one line.

Names load on first use (PEP 562): numbers are read without torch, whose import takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml_ext.recipes.building import recipe
    from pml_ext.recipes.evaluation import METRICS, embed, retrieval_metrics
    from pml_ext.recipes.methods import DEFAULT_RECIPE, RECIPES
    from pml_ext.recipes.run_folder import Run, load_run
    from pml_ext.recipes.settings import PRESETS
    from pml_ext.recipes.trainer import Trainer
    from pml_ext.recipes.training_recipe import Recipe

__all__ = [
    "DEFAULT_RECIPE",
    "METRICS",
    "PRESETS",
    "RECIPES",
    "Recipe",
    "Run",
    "Trainer",
    "embed",
    "load_run",
    "recipe",
    "retrieval_metrics",
]

_MODULES = {
    "DEFAULT_RECIPE": "methods",
    "METRICS": "evaluation",
    "PRESETS": "settings",
    "RECIPES": "methods",
    "Recipe": "training_recipe",
    "Run": "run_folder",
    "Trainer": "trainer",
    "embed": "evaluation",
    "load_run": "run_folder",
    "recipe": "building",
    "retrieval_metrics": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"pml_ext.recipes.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'pml_ext.recipes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
