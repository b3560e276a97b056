"""What all commands share."""

import json
import sys
import warnings

import pytest

from pml_ext.commands.command_line import Command, warn


def make(wording=None):
    command = Command("half", "half 3", wording)
    command.add_argument("number", metavar="NUMBER", type=int)
    command.add_argument("--json", action="store_true")
    return command


def raising(error):
    def main(number):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("number must be even, got 3"), "half: error: NUMBER must be even, got 3"),
        (TypeError("source must be there\nand more"), "half: error: DATA must be there"),
        (ImportError("x needs y"), "half: error: x needs y"),
        (OSError(28, "No space left"), "half: error: [Errno 28] No space left"),
    ],
)
def test_bad_input_ends_in_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        make({"source must": "DATA must"}).run(raising(error), ["3"])
    assert (stopped.value.code, capsys.readouterr()) == (2, ("", f"{line}\n"))


def test_what_is_no_bad_input_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        make().run(raising(ZeroDivisionError()), ["3"])


def test_interrupted(capsys):
    with pytest.raises(SystemExit) as stopped:
        make().run(raising(KeyboardInterrupt()), ["3"], lambda options: f"stopped at {options['number']}")
    assert (stopped.value.code, capsys.readouterr()) == (130, ("", "stopped at 3\n"))


def test_json_is_alone_on_stdout(capsys):
    def main(number):
        print("half of", number)
        warnings.warn("odd\nnumber", stacklevel=2)
        return {"half": number / 2, "rest": float("nan")}

    make().run(main, ["3", "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"half": 1.5, "rest": None}
    assert printed.err == "half of 3\nwarning: odd\n"
    make().run(main, ["3"])
    assert capsys.readouterr().out == "half of 3\n"


def test_warnings_are_as_they_were_afterward():
    before = warnings.showwarning, list(warnings.filters)
    make().run(lambda number: None, ["3"])
    assert (warnings.showwarning, list(warnings.filters)) == before


def test_a_warning_is_told_once_in_a_command(capsys):
    def main(number):
        for text in ("odd", "odd", "small", "odd"):
            warn(text)
        warnings.warn("odd", stacklevel=2)

    for _ in range(2):
        make().run(main, ["3"])
        assert capsys.readouterr().err == "warning: odd\nwarning: small\n"
    warn("odd")
    warn("odd")
    assert capsys.readouterr().err == "warning: odd\n" * 2


def test_help_begins_with_an_example(capsys):
    with pytest.raises(SystemExit):
        make().run(print, ["--help"])
    assert capsys.readouterr().out.startswith("half 3\n\nusage: half ")


def test_a_pipe_that_is_closed_is_no_error(capfd):
    make().run(raising(BrokenPipeError()), ["3"])
    assert capfd.readouterr().err == ""
    assert sys.stdout is not None
