"""JSON of ours has no NaN: what the writers make of it, and that there are no others."""

import ast
import json
from pathlib import Path

import harness
import numpy as np
import pytest
import run_files
import torch

from pml_ext import recipes
from pml_ext.recipes.run_config import describe_run, read_config, write_config
from pml_ext.strict_json import strict_json

ROOT = Path(__file__).parents[1]
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def read_strictly(text):
    def refuse(constant):
        raise ValueError(f"JSON has no {constant}")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null():
    value = {"a": NOT_FINITE, "b": {"c": (1.5, NOT_FINITE[0])}, "d": [True, None, "NaN", 3]}
    assert read_strictly(strict_json(value)) == {
        "a": [None, None, None],
        "b": {"c": [1.5, None]},
        "d": [True, None, "NaN", 3],
    }
    assert strict_json({"a": 1, "b": [0.1]}, indent=1) == json.dumps({"a": 1, "b": [0.1]}, indent=1)
    assert strict_json("dé\udce9") == '"d\\u00e9\\udce9"'  # any file can hold it
    with pytest.raises(ValueError, match="not JSON compliant"):
        strict_json({NOT_FINITE[0]: 1})
    with pytest.raises(TypeError, match=r"JSON must be made of numbers, texts, lists and the like, got \{1\}"):
        strict_json({1})


@pytest.mark.parametrize("array", [np.array, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_numbers_of_numpy_and_tensors(array):
    values = {"one": array(0.25), "nan": array(NOT_FINITE[0]), "many": array([[1.0, NOT_FINITE[1]]])}
    assert read_strictly(strict_json(values)) == {"one": 0.25, "nan": None, "many": [[1.0, None]]}
    assert strict_json([np.float32("nan"), np.float64("nan"), np.int64(3), np.bool_(1)]) == "[null, null, 3, true]"


def test_files_of_benchmarks(tmp_path):
    harness.save(tmp_path / "out.json", {"ms": NOT_FINITE})
    assert read_strictly((tmp_path / "out.json").read_text()) == {"ms": [None] * 3}
    run_files.append(tmp_path / "runs.jsonl", {"seed": 0, "loss": NOT_FINITE[0]})
    assert read_strictly((tmp_path / "runs.jsonl").read_text()) == {"seed": 0, "loss": None}


def test_config_of_a_run(tmp_path):
    made = recipes.recipe("triplet", 2, width=4)
    config = describe_run(made, share=NOT_FINITE[0])
    write_config(tmp_path, config | {"more": NOT_FINITE[1]})
    assert read_strictly((tmp_path / "config.json").read_text()) == config | {"more": None}
    assert config["share"] is None
    assert read_config(tmp_path)["settings"] == config["settings"]
    with pytest.raises(ValueError, match="lr must be finite, got inf"):  # null would stand for the preset's
        recipes.recipe("triplet", 2, lr=NOT_FINITE[1])


def loose(source):
    """Return the lines that write JSON by Python's defaults, by which NaN is a number."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if ast.unparse(call.func) in ("json.dumps", "json.dump", "dumps", "dump")
        and not any(keyword.arg == "allow_nan" and ast.unparse(keyword.value) == "False" for keyword in call.keywords)
    ]


def test_there_is_no_other_writer():
    written = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("pml_ext", "examples", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "dump" in (source := path.read_text(encoding="utf-8"))
        for line in loose(source)
    ]
    assert written == []
    assert loose("import json\njson.dumps(1)\njson.dumps(1, allow_nan=False)") == [2]
