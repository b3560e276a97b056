"""``pml-ext recipes``: the recipes, or the settings of one."""

from typing import Any

from pml_ext.recipes.methods import DEFAULT_RECIPE, RECIPES
from pml_ext.recipes.settings import settle


def main(name: str | None, preset: str) -> dict[str, Any]:
    """Print and return the recipes, or the values of one recipe's settings and where each comes from."""
    if name is None:
        for known, method in RECIPES.items():
            default = " (default)" if known == DEFAULT_RECIPE else ""
            print(f"{known:<20}{method.summary}{default}")
        return {known: method.summary for known, method in RECIPES.items()}
    settings = settle(preset, RECIPES[name].numbers, {})
    print(f"{name}: {RECIPES[name].summary}\npreset {preset}\n")
    listed = {}
    for setting, value in settings.items():
        source = settings.notes[setting].removeprefix(f"{value}: ")
        print(f"{setting:<20}{value!s:<24}{source}")
        listed[setting] = {"value": value, "source": source}
    return listed
