"""``pml-ext recipes``."""

import json

import pytest

from pml_ext.commands.main import main
from pml_ext.recipes import DEFAULT_RECIPE, PRESETS, RECIPES, recipe


def test_all_recipes_are_listed(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert [line.split()[0] for line in lines if line.endswith("(default)")] == [DEFAULT_RECIPE]
    main(["recipes", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == set(RECIPES)


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_those_of_the_recipe(preset, capsys):
    main(["recipes", "mhgl", "--preset", preset, "--json"])
    done = capsys.readouterr()
    listed = json.loads(done.out)
    made = recipe("mhgl", 4, preset=preset, pretrained=False, weights=None, backbone="test_resnet")
    given = ("pretrained", "weights", "backbone", "frozen_stages", "pixel_mean", "pixel_std")  # the last three follow
    for name, value in made.settings.items():
        if name not in given:
            assert json.loads(json.dumps(value)) == listed[name]["value"]
            assert made.notes[name] == f"{value}: {listed[name]['source']}"
    assert set(listed) == set(made.settings)
    assert f"preset {preset}" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mgl"], "pml-ext recipes: error: NAME must be one of recommended, "),
        (["mhgl", "--preset", "big"], "pml-ext recipes: error: --preset must be one of small, "),
    ],
)
def test_unknown_names(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["recipes", *words])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(message)
