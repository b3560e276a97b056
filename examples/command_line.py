"""Commands whose bad input ends in one line."""

import argparse
import io
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

# Raised where torch_geometric is imported; commands import this module first.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning, r"torch\.jit")


class Command(argparse.ArgumentParser):
    """Argument parser of a command: bad input ends it with one line on stderr and exit status 2.

    Args:
        wording: What messages begin with, and how the command says it: {"source must": "--data must"}. Messages on
            arguments that are options, "image_size must ...", name the option anyway.
        **kwargs: Passed to ``argparse.ArgumentParser``.

    Examples:
        >>> command = Command(prog="half")
        >>> _ = command.add_argument("number", type=int)
        >>> command.run(lambda number: print(number / 2), ["3"])
        1.5
    """

    def __init__(self, wording: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(**({"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs))
        self.wording = dict(wording or {})

    def error(self, message: str) -> NoReturn:
        """End the program: exit status 2, the message on stderr, no usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def run(self, main: Callable[..., Any], arguments: list[str] | None = None) -> None:
        """Call a function with the arguments by name.

        Args:
            main: Whose ``OSError``, ``TypeError`` and ``ValueError`` are taken for bad input. With ``python -X dev``
                they keep their traceback.
            arguments: None: those of the program.
        """
        print_any_name()
        try:
            main(**vars(self.parse_args(arguments)))
            return
        except (OSError, TypeError, ValueError) as error:
            if sys.flags.dev_mode:
                raise
            message = one_line(error)
        # Out here, where the frames of main() are gone, an open progress bar has ended its line.
        self.error(self._reworded(message))

    def _reworded(self, message: str) -> str:
        options = {f"{a.dest} must": f"{a.option_strings[0]} must" for a in self._actions if a.option_strings}
        wording = options | self.wording
        first = max((text for text in wording if message.startswith(text)), key=len, default="")
        return wording.get(first, "") + message[len(first) :]


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
