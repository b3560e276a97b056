import warnings

import pytest
from matplotlib.figure import Figure

from pml_ext.visualization import plot_curves
from pml_ext.visualization.saving import save_figure


def test_folders_are_made_and_files_replaced(tmp_path):
    for _ in range(2):
        save_figure(Figure(figsize=(1, 1)), tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    save_figure(Figure(figsize=(1, 1)), None)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "a.png"]


def test_names_that_the_font_lacks_are_no_news(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.suptitle("a\tb \u4e00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()


def test_a_folder_is_no_file(tmp_path):
    """Matplotlib would save beside it."""
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=f"^path must be a file, got the folder {tmp_path / 'run'}$"):
        plot_curves({"loss": [1.0]}, path=tmp_path / "run")
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]
