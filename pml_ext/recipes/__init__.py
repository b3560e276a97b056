"""The trainings of the papers and their baselines, each in one line."""

from pml_ext.recipes.building import RECIPES, recipe
from pml_ext.recipes.evaluation import METRICS, embed, retrieval_metrics
from pml_ext.recipes.run_folder import Run, load_run
from pml_ext.recipes.settings import PRESETS
from pml_ext.recipes.trainer import Trainer
from pml_ext.recipes.training_recipe import Recipe

__all__ = [
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
