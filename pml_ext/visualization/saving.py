"""Where pictures are saved."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: str | Path | None) -> None:
    """Save a picture; folders are made, an older file is replaced.

    Args:
        figure: What is drawn.
        path: Path of the file; matplotlib adds ".png" to a name without suffix. None: nowhere.

    Raises:
        ValueError: If it is a folder, beside which matplotlib would save, or matplotlib does not know its suffix.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of names: a box stands for it
        figure.savefig(path)
