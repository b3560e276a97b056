"""Commands whose bad input ends in one line."""

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any, NoReturn

from tqdm import tqdm

from pml_ext.strict_json import strict_json

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_told: ContextVar[set[str] | None] = ContextVar("_told", default=None)
"""The warnings of the running command: with several seeds, each is told once."""


class Command(argparse.ArgumentParser):
    """Argument parser of a command: bad input ends it with one line on stderr and exit status 2.

    Args:
        prog: Name of the command.
        example: What its help begins with.
        wording: What messages begin with, and how the command says it: {"source must": "DATA must"}. Messages on
            arguments of the command, "image_size must ...", name these anyway.
        **kwargs: Passed to ``argparse.ArgumentParser``.

    Examples:
        >>> command = Command("half", "half 3")
        >>> _ = command.add_argument("number", type=int)
        >>> command.run(lambda number: print(number / 2), ["3"])
        1.5
    """

    def __init__(self, prog: str, example: str, wording: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(prog, formatter_class=_Formatter, **kwargs)
        self.example = example
        self.wording = dict(wording or {})

    def format_help(self) -> str:
        """Return the help: an example, then what there is."""
        return f"{self.example}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        """End the program: exit status 2, the message on stderr, no usage."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        message += did_you_mean(unknown.partition(" ")[0].partition("=")[0], self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def run(
        self,
        main: Callable[..., Any],
        words: Sequence[str] | None = None,
        interrupted: Callable[[dict[str, Any]], str] = lambda options: "interrupted",
    ) -> None:
        """Call a function with the arguments by name.

        With an argument ``json`` that is set, what the function returns is printed as one JSON object, and all else
        goes to stderr.

        Args:
            main: Whose ``ImportError``, ``OSError``, ``TypeError`` and ``ValueError`` are taken for bad input. With
                ``python -X dev`` they keep their traceback.
            words: None: those of the program.
            interrupted: Gets the arguments, and returns what to say after Ctrl-C.
        """
        print_any_name()
        options = vars(self.parse_args(words))
        as_json, stdout = options.pop("json", False), sys.stdout
        try:
            with ExitStack() as stack:
                token = _told.set(set())
                stack.callback(_told.reset, token)
                stack.enter_context(warnings.catch_warnings())
                warnings.showwarning = _show_warning
                warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # of torch_geometric
                if as_json:
                    stack.enter_context(redirect_stdout(sys.stderr))
                result = main(**options)
            if as_json:
                print(strict_json(result), file=stdout)
            stdout.flush()
            return
        except KeyboardInterrupt:
            status, message = INTERRUPTED, interrupted(options)
        except BrokenPipeError:  # of "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
            return
        except (ImportError, OSError, TypeError, ValueError) as error:
            if sys.flags.dev_mode:
                raise
            status, message = 2, f"{self.prog}: error: {self._reworded(one_line(error))}"
        # Out here, where the frames of main() are gone, an open progress bar has ended its line.
        self.exit(status, f"{message}\n")

    def _reworded(self, message: str) -> str:
        names = {a.dest: a.option_strings[0] if a.option_strings else str(a.metavar) for a in self._actions}
        wording = {f"{dest} must": f"{name} must" for dest, name in names.items()} | self.wording
        first = max((text for text in wording if message.startswith(text)), key=len, default="")
        return wording.get(first, "") + message[len(first) :]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question that follows a name that does not exist; nothing if none is like it.

    Examples:
        >>> did_you_mean("trin", ["train", "embed"])
        ' (did you mean train?)'
    """
    close = get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """Name what may be given several times only once."""
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    warn(one_line(message) if isinstance(message, Warning) else message)


def warn(text: str) -> None:
    """Print a warning, above a progress bar if there is one; within a command, once."""
    told = _told.get()
    if told is not None:
        if text in told:
            return
        told.add(text)
    tqdm.write(f"warning: {text}", file=sys.stderr)


def print_any_name() -> None:
    """Have print() escape what the terminal does not have, as stderr does: names of files hold anything."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def some_of(names: Sequence[Any]) -> str:
    """Return up to five names, and how many more there are.

    Examples:
        >>> some_of("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more


def number_of(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun.

    Examples:
        >>> number_of(1, "epoch"), number_of(2000, "class", "classes")
        ('1 epoch', '2,000 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def one_line(error: BaseException) -> str:
    r"""Return what an error says, in one line; for one of a ``DataLoader``'s worker, without its traceback.

    Examples:
        >>> one_line(ValueError("Caught OSError in DataLoader worker 0.\nOriginal Traceback:\n  ...\nOSError: full"))
        'full'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and lines[1].startswith("Original Traceback"):
        return re.sub(r"^[\w.]+: ", "", lines[-1])
    return lines[0]
