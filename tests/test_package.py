"""What ``import pml_ext`` does, and what it must not do."""

import importlib.metadata
import statistics
import subprocess
import sys

import pytest

import pml_ext

HEAVY = ("timm", "torchvision", "torch_geometric", "matplotlib", "sentence_transformers", "PIL", "faiss", "sklearn")


def python(code):
    """Run code in a fresh interpreter; return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_heavy_is_imported():
    code = "import sys, pml_ext, pml_ext.losses; print([m for m in {} if m in sys.modules])"
    assert python(code.format(HEAVY)) == "[]"
    assert python(code.format(("torch", "pytorch_metric_learning"))) == "['torch', 'pytorch_metric_learning']"


def test_torch_geometric_loads_with_the_refiner():
    code = "import sys, pml_ext.trunks, pml_ext.graphs; early = 'torch_geometric' in sys.modules; {}"
    assert python(code.format("print(early)")) == "False"
    late = "from pml_ext.trunks import IntraBatchRefiner; print('torch_geometric' in sys.modules)"
    assert python(code.format(late)) == "True"


def test_subpackages_load_on_first_use():
    code = (
        "import sys, pml_ext; early = [m for m in sys.modules if m.startswith('pml_ext.') or m == 'torch'];"
        "pml_ext.losses.HybridLoss; pml_ext.datasets.Glyphs; pml_ext.visualization.plot_curves; print(early)"
    )
    assert python(code) == "[]"
    assert {"losses", "datasets", "visualization", "set_validation", "__version__"} <= set(dir(pml_ext))
    with pytest.raises(AttributeError, match="module 'pml_ext' has no attribute 'nothing'"):
        pml_ext.nothing  # noqa: B018


def test_import_time():
    """At most 1.15 times PML's own, median of 7 fresh interpreters, alternating."""
    clock = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    ours, theirs = [], []
    for i in range(8):
        seconds = [
            float(python(clock.format(m))) for m in ("pml_ext, pml_ext.losses", "pytorch_metric_learning.losses")
        ]
        if i:  # the first fills the file cache
            ours.append(seconds[0])
            theirs.append(seconds[1])
    assert statistics.median(ours) <= 1.15 * statistics.median(theirs)


def test_metadata():
    assert importlib.metadata.version("pml-ext") == pml_ext.__version__
    requires = importlib.metadata.requires("pml-ext")
    assert not [r for r in requires if "<" in r.split(";")[0] or "==" in r.split(";")[0]]  # no upper pins
    extras = importlib.metadata.metadata("pml-ext").get_all("Provides-Extra")
    assert {"examples", "text", "test", "docs", "dev"} <= set(extras)
