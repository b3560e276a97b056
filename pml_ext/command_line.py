"""Commands whose bad input ends in one line."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Command(argparse.ArgumentParser):
    """Argument parser of a command: bad input ends it with one line on stderr and exit status 2.

    Args:
        **kwargs: Passed to ``argparse.ArgumentParser``.

    Examples:
        >>> command = Command(prog="half")
        >>> _ = command.add_argument("number", type=int)
        >>> command.run(lambda number: print(number / 2), ["3"])
        1.5
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs))

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
        try:
            main(**vars(self.parse_args(arguments)))
            return
        except (OSError, TypeError, ValueError) as error:
            if sys.flags.dev_mode:
                raise
            message = one_line(error)
        self.error(message)  # out here, where the frames of main() are gone: an open progress bar has ended its line


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
