"""What ``import pml_ext`` does, and what it must not do."""

import ast
import importlib
import importlib.metadata
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pml_ext

ROOT = Path(__file__).parents[1]

HEAVY = ("timm", "torchvision", "torch_geometric", "matplotlib", "sentence_transformers", "PIL", "faiss", "sklearn")


def python(code):
    """Run code in a fresh interpreter; return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


IMPORTS = f"""
import json, sys, time

def loaded():
    return [name for name in {(*HEAVY, "torch")} if name in sys.modules]

import pml_ext
early = [name for name in sys.modules if name.startswith("pml_ext.") or name == "torch"]
clock = [time.process_time()]
import pytorch_metric_learning.losses
clock.append(time.process_time())
import pml_ext.losses
clock.append(time.process_time())
steps = [loaded()]
import pml_ext.trunks, pml_ext.neighbors
steps.append(loaded())
from pml_ext.trunks import IntraBatchRefiner
steps.append(loaded())
pml_ext.losses.HybridLoss, pml_ext.datasets.Glyphs, pml_ext.visualization.plot_curves
print(json.dumps([early, *steps, (clock[2] - clock[1]) / (clock[1] - clock[0])]))
"""


@pytest.mark.processes
def test_what_is_imported_when():
    """Subpackages on first use, heavy packages with what needs them; the first losses at most 5% on top of PML's own.

    These are seconds of the CPU of one interpreter, best of 3 at the most.
    """
    shares = []
    while len(shares) < 3 and (not shares or min(shares) > 0.05):
        early, with_losses, with_trunks, with_refiner, share = json.loads(python(IMPORTS))
        shares.append(share)
        assert early == ["pml_ext.version"]
        assert with_losses == ["torch"]
        assert "torch_geometric" not in with_trunks
        assert "torch_geometric" in with_refiner
    assert 0 < min(shares) <= 0.05


def test_names_of_the_package():
    assert {"losses", "datasets", "visualization", "set_validation", "__version__"} <= set(dir(pml_ext))
    with pytest.raises(AttributeError, match="module 'pml_ext' has no attribute 'nothing'"):
        pml_ext.nothing  # noqa: B018


def test_metadata():
    assert importlib.metadata.version("pml-ext") == pml_ext.__version__
    requires = importlib.metadata.requires("pml-ext")
    pinned = [r.split(";")[0] for r in requires if "<" in r.split(";")[0] or "==" in r.split(";")[0]]
    assert [name.partition("<")[0] for name in pinned] == ["pytorch-metric-learning"]  # 3.0 is another library
    extras = importlib.metadata.metadata("pml-ext").get_all("Provides-Extra")
    assert {"visualization", "umap", "examples", "text", "test", "docs", "dev"} <= set(extras)


def distribution_names(requires):
    return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in requires}


def test_what_is_imported_is_declared():
    """Or it would arrive through other packages only, until they change their mind."""
    modules = set()
    for path in (ROOT / "pml_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
    modules -= {"pml_ext", *sys.stdlib_module_names}
    assert {"torch", "numpy", "tqdm", "PIL", "sklearn"} <= modules
    known = {"PIL": "pillow", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}
    distributions = {known.get(module, module.replace("_", "-")) for module in modules}
    requires = importlib.metadata.requires("pml-ext")
    needed = distribution_names(r for r in requires if "extra ==" not in r)
    optional = distribution_names(r for r in requires if re.search("extra == .(visualization|text|umap).$", r))
    assert distributions - needed == {"matplotlib", "sentence-transformers"} <= optional
    assert needed <= distributions


PUBLIC = ["pml_ext", *(f"pml_ext.{name}" for name in pml_ext.__all__ if name not in ("__version__", "set_validation"))]


def test_every_subpackage_is_public():
    packages = {m.name for m in pkgutil.iter_modules(pml_ext.__path__, "pml_ext.") if m.ispkg}
    assert packages <= {*PUBLIC, "pml_ext.commands"}  # whose interface is the command


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_exported(name):
    """Each name of ``__all__`` exists, is described and shown by dir(); a package has no public name beside these."""
    module = importlib.import_module(name)
    names = module.__all__
    assert len(set(names)) == len(names) and set(names) <= set(dir(module))
    for exported in names:
        assert getattr(module, exported).__doc__ or exported.isupper()
    if hasattr(module, "__path__"):
        modules = {m.name for m in pkgutil.iter_modules(module.__path__)}
        assert name == "pml_ext" or not modules & set(names)  # documentation would show the module
        others = {n: value for n, value in vars(module).items() if n not in names and not n.startswith("_")}
        allowed = {"import_module", "TYPE_CHECKING", "Any"}  # of the packages that load on first use
        assert not [n for n, value in others.items() if not isinstance(value, type(sys)) and n not in allowed]


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # required by the format
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == pml_ext.__version__
    assert citation["license"] == importlib.metadata.metadata("pml-ext")["License-Expression"]
    papers = {tuple(person["family-names"] for person in p["authors"]): p for p in citation["references"]}
    assert [(names[0], p["year"]) for names, p in papers.items()] == [
        ("Ebrahimpour", 2022),
        ("Seidenschwarz", 2021),
        ("Kim", 2018),
        ("Fehervari", 2020),
    ]
    for paper in papers.values():
        assert {"type", "title", "authors", "year", "identifiers"} <= set(paper)


@pytest.fixture
def check_release(tmp_path):
    """Return a function that runs .ci/check_release for a tag and a change log."""
    for path in (".ci/check_release", "pml_ext/__init__.py", "CITATION.cff", "mkdocs.yml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)

    def check(tag, changelog):
        (tmp_path / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
        command = [sys.executable, str(tmp_path / ".ci/check_release"), tag]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return check


def test_release(check_release):
    version = pml_ext.__version__
    changelog = f"# Changelog\n\n## [Unreleased]\n\n## [{version}] - 2026-01-02\n\n### Added\n\n- All.\n"
    assert check_release(f"v{version}", changelog) == (0, f"pml-ext {version} may be released\n")
    assert check_release("v9.9.9", changelog) == (
        1,
        f"the tag must be v{version}, as pml_ext.__version__ says, got v9.9.9\n",
    )
    for without in (changelog.replace(version, "9.9.9"), changelog.split("### Added")[0]):
        status, message = check_release(f"v{version}", without)
        assert status == 1 and f'CHANGELOG.md must have a section "## [{version}] - YYYY-MM-DD"' in message
