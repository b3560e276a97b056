"""The recipes by name: readable without torch."""

from pml_ext.recipes.adaptive_margin import ADAPTIVE_MARGIN
from pml_ext.recipes.attention_ensemble import ATTENTION_ENSEMBLE
from pml_ext.recipes.baselines import BASELINES
from pml_ext.recipes.combined import COMBINED
from pml_ext.recipes.intra_batch import INTRA_BATCH
from pml_ext.recipes.mhgl import MHGL
from pml_ext.recipes.parts import Method
from pml_ext.recipes.recommended import RECOMMENDED

RECIPES: dict[str, Method] = {
    "recommended": RECOMMENDED,
    "mhgl": MHGL,
    "intra_batch": INTRA_BATCH,
    "attention_ensemble": ATTENTION_ENSEMBLE,
    "adaptive_margin": ADAPTIVE_MARGIN,
    "combined": COMBINED,
    **BASELINES,
}
"""The recipes by name, with their settings."""

DEFAULT_RECIPE = "recommended"
"""The recipe of the command ``pml-ext train``."""
