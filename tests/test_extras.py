"""What a user reads who lacks a package that comes with an extra."""

import importlib.metadata
import re
import sys

import pytest
import torch

from pml_ext import visualization
from pml_ext.extras import comes_with

IMAGES, LABELS = torch.rand(4, 8, 8), torch.arange(4) // 2
PICTURES = {
    "attention_overlay": lambda f: f(IMAGES[0], torch.ones(2, 2)),
    "batch_attention": lambda f: f(torch.ones(4, 4) / 4, LABELS),
    "mask_grid": lambda f: f(IMAGES, torch.rand(4, 2, 3, 3)),
    "plot_curves": lambda f: f({"loss": [2.0, 1.0]}),
    "retrieval_gallery": lambda f: f(torch.eye(4), LABELS, IMAGES),
}


def test_every_picture_has_a_case():
    assert set(PICTURES) == set(visualization.__all__) - {"retrieval_report"}  # that one has pictures of its own


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_without_matplotlib(name, monkeypatch):
    draw, picture = PICTURES[name], getattr(visualization, name)
    assert draw(picture) is not None
    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=rf"^{name} needs matplotlib: pip install 'pml-ext\[visualization\]'$"):
        draw(picture)


def test_a_report_needs_no_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = visualization.retrieval_report(torch.randn(8, 4), LABELS.repeat(2), path=tmp_path / "report.html")
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("missing", ["matplotlib", "cycler"])
def test_the_missing_package_is_named(missing, monkeypatch):
    """It need not be the one that is imported, but one of those that this one imports."""
    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    lacks = "" if missing == "matplotlib" else ", which does not find cycler"
    message = rf"^plot_curves needs matplotlib{lacks}: pip install 'pml-ext\[visualization\]'$"
    with pytest.raises(ImportError, match=message):
        PICTURES["plot_curves"](visualization.plot_curves)


@pytest.mark.parametrize(
    ("package", "module"), [("umap-learn", "umap"), ("sentence-transformers", "sentence_transformers.util")]
)
def test_modules_of_another_name(package, module):
    with pytest.raises(ImportError, match=rf"^it needs {package}: pip"), comes_with("extra", package, "it"):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    message = rf"^it needs {package}, which does not find numba: pip"
    with pytest.raises(ImportError, match=message), comes_with("extra", package, "it"):
        raise ModuleNotFoundError("No module named 'numba'", name="numba")


def test_what_is_broken_says_so_itself():
    """Installing it again would not help."""
    with pytest.raises(ImportError, match=r"^numpy is too old$"), comes_with("text", "sentence-transformers", "it"):
        raise ImportError("numpy is too old")


@pytest.mark.parametrize(
    ("extra", "package"), [("visualization", "matplotlib"), ("text", "sentence-transformers"), ("umap", "umap-learn")]
)
def test_the_extras_that_messages_name(extra, package):
    requires = importlib.metadata.requires("pml-ext")
    assert [r for r in requires if re.match(rf"{package}\b", r) and re.search(rf"extra == .{extra}.$", r)], requires
