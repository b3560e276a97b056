"""Imports of packages that come with an extra."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def comes_with(extra: str, package: str, user: str, instead: str = "") -> Iterator[None]:
    """Tell how to install a package where an import inside does not find it.

    Args:
        extra: The extra of this package that installs it.
        package: Its name on the package index.
        user: What needs it.
        instead: What else the caller can do.

    Raises:
        ImportError: If it is not installed. A package that is installed but broken raises its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{user} needs {package}: pip install 'pml-ext[{extra}]'{instead}") from error
