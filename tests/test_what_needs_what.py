"""The table of docs/install.md: each part runs with what its row names, and not without."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

PAGE = Path(__file__).parents[1] / "docs" / "install.md"
ROWS = re.findall(r"^\| (.*`.*) \| (.+) \|$", PAGE.read_text().split("## What needs what")[1], re.MULTILINE)
BRINGS = {"timm": {"torchvision", "PIL"}, "matplotlib": {"PIL"}}
IMPORTED_AS = {
    "Pillow": "PIL",
    "faiss-cpu": "faiss",
    "sentence-transformers": "sentence_transformers",
    "torch-geometric": "torch_geometric",
    "umap-learn": "umap",
}
ALL = {"PIL", "faiss", "matplotlib", "sentence_transformers", "timm", "torch_geometric", "torchvision", "umap"}
USES = [  # of the rows, in their order
    """
import pml_ext.distributed, pml_ext.learners, pml_ext.reducers, pml_ext.regularizers, pml_ext.streaming
from pml_ext import class_embeddings, losses
losses.HybridLoss(3, 4)(torch.randn(6, 4), torch.arange(6) // 2).backward()
class_embeddings.from_text(["red apple", "green apple"], model="tfidf")
class_embeddings.from_samples(torch.randn(6, 4), torch.arange(6) // 2)
""",
    """
from pml_ext.evaluation import retrieval_metrics
from pml_ext.neighbors import knn_graph, neighbor_groups, refine_with_neighbors
retrieval_metrics(torch.randn(8, 4), torch.arange(8) // 2)
knn_graph(torch.randn(9, 4), 2)
refine_with_neighbors(torch.nn.Linear(4, 4), torch.randn(1, 4)[:0])
neighbor_groups(torch.eye(4), 2, 2)
""",
    """
from pml_ext.evaluation import retrieval_metrics
retrieval_metrics(torch.randn(8, 4), torch.arange(8) // 2, metrics=("NMI",))
""",
    """
from pml_ext.trunks import AttentionEnsemble, GlobalLocalTrunk, PooledTrunk, param_groups
PooledTrunk("resnet18")
""",
    "from pml_ext.losses import IntraBatchLoss; IntraBatchLoss(3, 4)",
    """
from pml_ext.recipes import recipe
recipe("intra_batch", 3, in_channels=1, width=4).transforms
""",
    """
from pml_ext.datasets import ImageFolder
folder = pathlib.Path("photos/cat")
folder.mkdir(parents=True, exist_ok=True)
(folder / "1.ppm").write_bytes(b"P6 1 1 255 abc")
ImageFolder("photos")[0]
""",
    """
from pml_ext.datasets import Glyphs
from pml_ext.visualization import retrieval_gallery
retrieval_gallery(torch.eye(4), torch.arange(4) // 2, torch.rand(4, 8, 8))
Glyphs("test", samples_per_class=1, image_size=8)
""",
    """
from pml_ext.visualization import retrieval_report
retrieval_report(torch.randn(8, 4), torch.arange(8) // 2, torch.rand(8, 8, 8))
""",
    """
from pml_ext.visualization import retrieval_report
retrieval_report(torch.randn(8, 4), torch.arange(8) // 2, method="umap")
""",
    'from pml_ext.class_embeddings import from_text; from_text(["red apple"], model="all-MiniLM-L6-v2")',
]
NOT_TRIED = {"umap", "sentence_transformers"}  # the one need not be installed, the other downloads a model
SLOW = {  # to import: they are loaded once, when no more try is blocked from what they bring
    "timm": {"timm", *BRINGS["timm"]},
    "torch_geometric": {"torch_geometric"},
}
TRIES = """
import importlib, json, os, pathlib, sys, warnings
import torch
from pytorch_metric_learning import losses

warnings.simplefilter("ignore")
slow, tries = json.load(sys.stdin)
for i, (blocked, code) in enumerate(tries):
    for name, brought in slow.items():
        if not any(set(brought) & set(others) for others, _ in tries[i:]):
            importlib.import_module(name)
    loaded = set(blocked) & set(sys.modules)
    assert not loaded, f"loaded by torch, PML, {' or '.join(slow)}: {loaded}"
    child = os.fork()  # loading torch for each try would take minutes
    if not child:
        sys.modules.update(dict.fromkeys(blocked))  # importing them raises ModuleNotFoundError
        try:
            exec(code)
        except Exception as error:
            kinds = ModuleNotFoundError, NameError  # PML goes on without faiss until it needs it
            while error.__context__ is not None and not isinstance(error, kinds):
                error = error.__context__
            print(json.dumps(error.name if isinstance(error, kinds) else repr(error)), flush=True)
        else:
            print("null", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def needed(cell):
    """Return the modules that a cell of the table names."""
    names = [] if cell == "nothing" else cell.split(", ")
    return [IMPORTED_AS.get(name, name) for name in names]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_parts_need_what_the_table_says(tmp_path):
    assert len(ROWS) == len(USES)
    cases = []  # what is blocked, the code, and the module that it is to miss
    for (_, cell), code in zip(ROWS, USES, strict=True):
        names = needed(cell)
        assert set(names) <= ALL, cell
        there = set(names).union(*(BRINGS.get(name, ()) for name in names))
        if not NOT_TRIED & set(names):
            cases.append((sorted(ALL - there), code, None))
        cases += [([name], code, name) for name in names]
    cases.sort(key=lambda case: [brought.isdisjoint(case[0]) for brought in SLOW.values()])
    tries, expected = [case[:2] for case in cases], [name for *_, name in cases]
    done = subprocess.run(
        [sys.executable, "-c", TRIES],
        input=json.dumps([{name: sorted(brought) for name, brought in SLOW.items()}, tries]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PAGE.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    missed = [json.loads(line) for line in done.stdout.splitlines()]
    roots = [name and name.split(".")[0] for name in missed]
    assert roots == expected, [
        (one, name, wanted) for one, name, wanted in zip(tries, missed, expected, strict=True) if name != wanted
    ]
