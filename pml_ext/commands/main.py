"""The command ``pml-ext``."""

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pml_ext.commands.command_line import Command, did_you_mean, number_of
from pml_ext.commands.first_checks import first_checks
from pml_ext.commands.freed_memory import keep_freed_memory
from pml_ext.commands.parser import COMMANDS, make_parser
from pml_ext.version import __version__


def main(words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: Its name and arguments. None: those of the program.
    """
    is_program = words is None
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if words[0] == "--version":
        print(f"pml-ext {__version__}")
        return
    name, *arguments = words
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS)
        Command("pml-ext", "").error(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}{meant}")

    checked: dict[str, Any] = {}

    def work(**options: Any) -> Any:
        checked.update(first_checks(name)(**options))
        if is_program and name == "train":  # else the process is not ours
            keep_freed_memory()
        return import_module(f"pml_ext.commands.{name}").main(**checked)

    make_parser(name).run(work, arguments, lambda options: what_is_saved(name, words, options | checked))


def overview() -> str:
    """Return the help of ``pml-ext``."""
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    head = "pml-ext train photos/ --out runs/photos\n\nusage: pml-ext COMMAND ...\n\ncommands:\n"
    return head + "\n".join(lines) + '\n\n"pml-ext COMMAND --help" has the arguments of each.'


def what_is_saved(name: str, words: Sequence[str], options: dict[str, Any]) -> str:
    """Return what to say after Ctrl-C: what is saved, and the command that goes on."""
    command = shlex.join(["pml-ext", *words])
    if name != "train":
        return f"interrupted: nothing is saved; again: {command}"
    out = options["out"]
    runs = "" if options.get("seeds") is None else "seed-*/"
    if out is None or not list(Path(out).glob(f"{runs}config.json")):
        return f"interrupted: nothing is saved; again: {command}"
    epochs = 0
    for path in Path(out).glob(f"{runs}metrics.jsonl"):
        epochs += sum('"loss"' in line for line in path.read_text(encoding="utf-8").splitlines())
    saved = f"{number_of(epochs, 'whole epoch')} {'is' if epochs == 1 else 'are'}"
    command += "" if "--resume" in words else " --resume"
    return f"interrupted: {saved} saved in {out}; to go on:\n{command}"
