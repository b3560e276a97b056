"""``pml-ext`` as a whole: its commands, their help, and how fast it begins."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pml_ext.commands import parser
from pml_ext.commands.main import main, what_is_saved
from pml_ext.datasets import sources
from pml_ext.version import __version__

ROOT = Path(__file__).parents[2]
LIGHT = """
import sys
from pml_ext.commands.main import main

for words in {commands}:
    try:
        main(words)
    except SystemExit as stopped:
        print("status:", stopped.code)
loaded = {{"torch", "numpy", "timm", "matplotlib"}} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize("name", parser.COMMANDS)
def test_help_fits_a_screen(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"pml-ext {name}")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("usage: pml-ext ") for line in lines)


@pytest.mark.parametrize("name", parser.COMMANDS)
def test_examples_of_help_are_accepted(name):
    for line in parser.make_parser(name).example.splitlines():
        words = line.split()
        assert words[:2] == ["pml-ext", name]
        parser.make_parser(name).parse_args(words[2:])


def test_what_comes_before_torch(tmp_path):
    """Help, lists and errors, some of them in one process, since starting takes time."""
    (tmp_path / "photos").mkdir()
    commands = [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["recipes"],
        ["recipes", "mhgl"],
        ["train", "missing/photos"],
        ["train", "photos", "--recipe", "mgl"],
        ["train", "photos", "--set", "lrr=1"],
        ["train", "photos", "--preset", "big"],
        ["embed", "runs/none", "photos"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(commands=commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^status: (.+)$", done.stdout, re.MULTILINE) == ["0", *["2"] * 5]
    assert [line.partition(": error: ")[2][:22] for line in done.stderr.splitlines()] == [
        "DATA must exist, got m",
        "--recipe must be one o",
        "--set must be one of t",
        "--preset must be one o",
        "RUN must hold config.j",
    ]
    assert f"pml-ext {__version__}" in done.stdout.splitlines()


@pytest.mark.processes
def test_the_module_is_the_command(tmp_path):
    given = {"capture_output": True, "text": True, "cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT), "PATH": ""}}
    done = subprocess.run([sys.executable, "-m", "pml_ext", "recipes", "--json"], check=False, **given)
    assert done.returncode == 0
    assert "mhgl" in json.loads(done.stdout)


def test_overview(capsys):
    for words in ([], ["--help"], ["help"]):
        main(words)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == list(parser.COMMANDS)
    with pytest.raises(SystemExit) as stopped:
        main(["retrain"])
    assert stopped.value.code == 2
    line = "pml-ext: error: the command must be one of train, embed, search, "
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["trin", "photos"], "got 'trin' (did you mean train?)"),
        (["frobnicate"], "got 'frobnicate'"),
        (["train", "photos", "--skip-borken"], "--skip-borken (did you mean --skip-broken?)"),
        (["train", "photos", "--recepie=mhgl"], "--recepie=mhgl (did you mean --recipe?)"),
        (["train", "photos", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["train", "photos", ""], "unrecognized arguments: "),
        (["train", "photos", "--recepie=a_long_name_of_nothing"], "of_nothing (did you mean --recipe?)"),
        (["recipes", "recommend"], "got 'recommend' (did you mean recommended?)"),
        (["train", "photos", "--recipe", "recommend"], "got 'recommend' (did you mean recommended?)"),
    ],
)
def test_a_mistyped_word_is_guessed(words, end, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"{end}\n")


def test_names_of_data_sets_are_those_of_open_data():
    assert parser.DATA_NAMES == sources.NAMES


def test_what_is_saved(tmp_path):
    words = ["train", "my photos", "--out", str(tmp_path / "run")]
    options = {"out": str(tmp_path / "run")}
    assert what_is_saved("train", words, options) == (
        f"interrupted: nothing is saved; again: pml-ext train 'my photos' --out {tmp_path / 'run'}"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for entries, saved in ((1, "1 whole epoch is"), (3, "3 whole epochs are")):
        (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2}\n' * entries)
        first, second = what_is_saved("train", words, options).splitlines()
        assert first == f"interrupted: {saved} saved in {tmp_path / 'run'}; to go on:"
        assert second == f"pml-ext train 'my photos' --out {tmp_path / 'run'} --resume"
    for name in ("seed-0", "seed-1", "other-run"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "config.json").write_text("{}")
        (tmp_path / "run" / name / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2}\n' * 4)
    assert "interrupted: 3 whole epochs are saved" in what_is_saved("train", words, options)
    assert "interrupted: 8 whole epochs are saved" in what_is_saved("train", words, options | {"seeds": 2})
    assert "nothing is saved" in what_is_saved("train", words, {"out": str(tmp_path)})  # which holds only others
    again = what_is_saved("train", [*words, "--resume"], options)
    assert again.count("--resume") == 1
    assert what_is_saved("embed", ["embed", "a", "b"], {}) == "interrupted: nothing is saved; again: pml-ext embed a b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=2e-3", 2e-3),
        ("a=true", True),
        ("a=False", False),
        ("a=None", None),
        ("a=max", "max"),
        ("a=(1, 2)", (1, 2)),
        ("a=x=y", "x=y"),
    ],
)
def test_setting(text, value):
    assert parser.setting(text) == ("a", value)
    assert type(parser.setting(text)[1]) is type(value)
