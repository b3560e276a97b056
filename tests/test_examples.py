"""Every example runs, briefly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import adaptive_margin, attention_ensemble, global_local, intra_batch, quickstart, train_distributed
from tests.needs import needs
from tests.processes import run_scripts

pytestmark = pytest.mark.trains

RUNS = {
    "adaptive_margin",
    "attention_ensemble",
    "distributed_accelerate",
    "distributed_fabric",
    "global_local",
    "intra_batch",
    "quickstart",
    "train_distributed",
}


def test_every_example_is_run_here():
    assert {path.stem for path in Path(quickstart.__file__).parent.glob("*.py")} == RUNS


def test_quickstart(tmp_path, capsys):
    table = quickstart.main(epochs=1, samples_per_class=4, width=8, out=tmp_path)
    printed = capsys.readouterr().out
    assert list(table) == ["raw pixels", "PML MultiSimilarityLoss", "PML ProxyAnchorLoss", "pml_ext HybridLoss"]
    for row in table.values():
        assert set(row) == set(quickstart.METRICS)
        assert all(0 < value < 1 for value in row.values())
        assert f"{100 * row['precision_at_1']:.1f}" in printed
    for name in ("quickstart_gallery.png", "quickstart_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_quickstart_is_deterministic(tmp_path, monkeypatch):
    for draw in ("retrieval_gallery", "plot_curves"):  # which takes longer than the training
        monkeypatch.setattr(quickstart, draw, lambda *args, **kwargs: None)
    first, same, other = (
        quickstart.main(epochs=1, seed=seed, samples_per_class=2, width=4, out=tmp_path) for seed in (0, 0, 1)
    )
    assert first == same != other


def test_adaptive_margin(tmp_path, capsys):
    results = adaptive_margin.main(epochs=1, seeds=2, samples_per_class=4, width=4, out=tmp_path)
    printed = capsys.readouterr().out
    assert [name.split()[0] for name in results] == ["no", "constant", "distance", "similarity"]
    for metrics in results.values():
        assert len(metrics) == 2
        mean = sum(100 * one["precision_at_1"] for one in metrics) / 2
        assert 0 < mean < 100
        assert f"{mean:.1f} (" in printed
    losses = adaptive_margin.make_losses(4, torch.randn(4, 3)).values()
    margins = [loss_func.get_margins(torch.arange(4)) for loss_func in losses]
    assert all(not torch.equal(a, b) for i, a in enumerate(margins) for b in margins[:i])
    assert margins[1].mean().item() == pytest.approx(margins[2].mean().item(), rel=1e-4)  # constant and distance
    assert (tmp_path / "adaptive_margin.png").read_bytes().startswith(b"\x89PNG")


def test_global_local(tmp_path, capsys):
    """On folders of images, one a class."""
    from PIL import Image

    for split, classes in (("train", "abc"), ("test", "de")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = (255 * torch.rand(20, 24, 3)).byte().numpy()
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    folders = {"train_folder": tmp_path / "train", "test_folder": tmp_path / "test"}
    results = global_local.main(epochs=2, seeds=2, backbone="resnet10t", out=tmp_path, **folders)
    printed = capsys.readouterr().out
    assert list(results) == list(global_local.make_trunks("resnet10t", 3))
    for metrics in results.values():
        mean = sum(50 * one["precision_at_1"] for one in metrics)
        assert 0 <= mean <= 100
        assert f"{mean:.1f} (" in printed
    assert "2 unseen classes, resnet10t, 2 epochs" in printed
    for name in ("global_local_curves.png", "global_local_attention.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_global_local_on_glyphs():
    images, labels = global_local.load(None, "test", samples_per_class=2)
    assert images.shape == (534, 1, 32, 32)
    assert labels.unique().tolist() == list(range(267))
    for make in global_local.make_trunks("resnet10t", 1).values():
        assert make()(images[:2]).shape == (2, global_local.EMBEDDING_SIZE)


def test_attention_ensemble(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention_ensemble, "EMBEDDING_SIZE", 12)
    monkeypatch.setattr(attention_ensemble, "IMAGE_SIZE", 16)
    sizes = {"backbone": "test_resnet", "learners": (2,), "samples_per_class": 3}
    results = attention_ensemble.main(epochs=1, seeds=2, **sizes, out=tmp_path)
    printed = capsys.readouterr().out
    assert list(results) == ["single head", "M = 1", "M = 2, no divergence", "M = 2, with divergence"]
    for metrics in results.values():
        mean = sum(50 * one["precision_at_1"] for one in metrics)
        assert 0 < mean < 100
        assert f"{mean:.1f} (" in printed
    collapsed, apart = ([one["cosine"] for one in results[f"M = 2, {x} divergence"]] for x in ("no", "with"))
    assert all(a > b for a, b in zip(collapsed, apart, strict=True))
    assert (tmp_path / "attention_ensemble_masks.png").read_bytes().startswith(b"\x89PNG")


def test_intra_batch(tmp_path, capsys):
    results = intra_batch.main(epochs=1, seeds=2, width=4, samples_per_class=4, out=tmp_path)
    printed = capsys.readouterr().out
    names = ["+ mean of the same neighbors", "+ refinement at test time"]
    assert list(results) == [*intra_batch.TRAININGS, *names]
    for metrics in results.values():
        for metric in intra_batch.METRICS:
            mean = sum(50 * one[metric] for one in metrics)
            assert 0 < mean < 100
            assert f"{mean:.1f} (" in printed
    rows = list(results.values())
    assert all(rows[i] != rows[j] for i in range(5) for j in range(i))
    emb = torch.randn(4, intra_batch.EMBEDDING_SIZE)
    alone = intra_batch.Alone(intra_batch.EMBEDDING_SIZE).eval()
    torch.testing.assert_close(alone(emb)[:2], alone(emb[:2]))
    assert (tmp_path / "intra_batch_attention.png").read_bytes().startswith(b"\x89PNG")


EXAMPLES = Path(train_distributed.__file__).parent
SMALL = {"width": 4, "samples_per_class": 4}


def test_train_distributed_goes_on_where_it_stopped(tmp_path):
    """What a killed and resumed run ends with is what an uninterrupted one does."""
    whole = train_distributed.main(epochs=2, out=tmp_path / "whole", **SMALL)
    first = train_distributed.main(epochs=1, out=tmp_path / "parts", **SMALL)
    (tmp_path / "parts" / "checkpoint.pt.new").write_text("what a run killed while saving leaves")
    assert train_distributed.main(epochs=2, out=tmp_path / "parts", resume=True, **SMALL) == whole != first
    with pytest.raises(SystemExit, match="--resume needs"):
        train_distributed.main(out=tmp_path / "nothing", resume=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


AS_COMMAND = """
import gc
import runpy
import sys

_, tests, *sys.argv = sys.argv
sys.path[:0] = [sys.argv[0].rpartition("/")[0], tests]
import gloo_threads

gc.disable()  # what is freed by chance is no proof
runpy.run_path(sys.argv[0], run_name="__main__")
if sys.platform == "linux":
    print("threads of gloo:", gloo_threads.count())
"""
AS_FUNCTION = """
import gc
import sys

_, tests, examples = sys.argv
sys.path[:0] = [examples, tests]
import distributed_fabric
import gloo_threads

gc.disable()
distributed_fabric.main(devices=2)
if sys.platform == "linux":
    print("threads of gloo:", gloo_threads.count())
"""


def check_threads(printed):
    """Check that no thread of a process group is left: with one, a process may abort while it exits."""
    if sys.platform == "linux":
        assert set(re.findall(r"threads of gloo: (\d+)", printed)) == {"0"}  # Fabric's first may end the second


def on_two(tmp_path, monkeypatch, script, launcher, *arguments):
    """Run a script that tells at its end which threads are left, as a command; where one is, torchrun may fail."""
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)  # checkpoints go to runs/
    command = [sys.executable, *launcher, "script.py", Path(__file__).parent, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    check_threads(done.stdout)
    return done


@pytest.mark.processes
def test_train_distributed_on_two_processes(tmp_path, monkeypatch):
    command = (EXAMPLES / "train_distributed.py", "--epochs", 1, "--out", tmp_path)
    done = on_two(tmp_path, monkeypatch, AS_COMMAND, TORCHRUN, *command)
    assert done.stdout.count("267 unseen classes, 1 epochs, seed 0, 2 processes, percent") == 1
    assert done.stderr.count("0/33 [00:00<?, ?it/s]") == 1  # one progress bar
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1
    assert state["loss"]["proxy_loss.proxies"].shape == (267, train_distributed.EMBEDDING_SIZE)


def losses_of(printed, processes):
    """Return the loss that is printed for each epoch."""
    return re.findall(rf"^epoch \d, {processes} processes: loss ([\d.]+)$", printed, re.MULTILINE)


@pytest.mark.processes
def test_distributed_fabric(tmp_path, monkeypatch):
    """Two processes, which Fabric starts, print the losses of one."""
    needs("lightning_fabric")
    printed, _ = run_scripts([[EXAMPLES / "distributed_fabric.py"]], tmp_path)
    one = losses_of(printed, 1)
    two = losses_of(on_two(tmp_path, monkeypatch, AS_FUNCTION, (), EXAMPLES).stdout, 2)
    assert one == two
    assert float(one[1]) < float(one[0])


@pytest.mark.processes
def test_distributed_accelerate(tmp_path):
    """Two processes see two batches at a time: other numbers than one process, and falling too."""
    needs("accelerate")
    printed, _ = run_scripts([[EXAMPLES / "distributed_accelerate.py"]], tmp_path, world=2)
    check_threads(printed)
    losses = losses_of(printed, 2)
    assert float(losses[1]) < float(losses[0])
