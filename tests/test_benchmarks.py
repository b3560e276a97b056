"""Every benchmark runs, briefly."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import finetuning_rows
import harness
import numpy as np
import pytest
import retrieval
import retrieval_tables
import run_files
import torch
from PIL import Image
from retrieval_rows import QUESTIONS, ROWS, row_of
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    causes,
    distributed,
    ensemble,
    evaluation,
    finetuning,
    glyph_classes,
    hybrid_defaults,
    large_batches,
    losses,
    pair_scaling,
    product_pictures,
    proxy_scaling,
    refiner,
    report,
    retrieval_causes,
    second_order_attention,
)
from pml_ext.datasets import open_data
from pml_ext.recipes import embed, recipe, retrieval_metrics
from pml_ext.trunks import AttentionEnsemble, BackboneFeatures
from tests.processes import START_METHOD, run_scripts

pytestmark = pytest.mark.trains

FOLDER = Path(harness.__file__).parent
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch):
    """Fork processes from a server that has imported torch: it takes each of them seconds."""
    monkeypatch.setattr(harness, "START_METHOD", START_METHOD)


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure here what a benchmark measures in a process of its own."""
    monkeypatch.setattr(harness, "in_fresh_process", lambda function, *arguments: function(*arguments))


def cells_of(printed):
    """Return the cells of each line of the tables that are printed."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


def test_scripts_start_from_any_folder(tmp_path):
    """All but hybrid_defaults, which is run with -m, and glyph_classes, which has no options."""
    paths = sorted(set(map(str, FOLDER.glob("*.py"))) - {hybrid_defaults.__file__, glyph_classes.__file__})
    paths = [path for path in paths if "__main__" in Path(path).read_text()]
    printed, _ = run_scripts([[path, "--help"] for path in paths], tmp_path)
    assert printed.count("usage: ") == printed.count("exit status: 0\n") == len(paths) >= 8


def test_candidates_take_turns_and_the_first_repeat_is_not_counted(monkeypatch):
    calls, clock = [], iter([0, 0, 0, 1, 0, 3, 0, 2, 0, 5])  # the warm-up only begins
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = harness.time_in_turn(candidates, 2, number=2, before=lambda: calls.append("-"))
    assert seconds == {"a": [0.5, 1.0], "b": [1.5, 2.5]}
    assert "".join(calls) == 3 * "-aa-bb"
    assert harness.median_ratio(seconds["b"], seconds["a"]) == 2.75


def peak_of_steps():
    held, sizes = torch.zeros(2**23), iter((2**22, 2**24, 2**22))  # 16, 64 and 16 MB beyond 32 that are there
    return harness.measure_steps(lambda: torch.ones(next(sizes)), 2), len(held)


@linux_only
def test_peak_memory_is_that_of_the_steps():
    """In a process of its own: others may keep freed memory."""
    (seconds, peak), held = harness.in_fresh_process(peak_of_steps)
    assert len(seconds) == 2 and held == 2**23
    assert 60 < peak < 80


def measure_here(name, seconds, factor):
    return harness.Measured([factor * seconds], {"a": seconds, "b": 7}[name])


def test_each_measurement_has_a_process_of_its_own(in_this_process):
    measured = harness.measure_in_turn(measure_here, [("a", 1), ("b", 2)], 3, 10)
    assert measured == {("a", 1): ([10, 10, 10], 1), ("b", 2): ([20, 20, 20], 7)}


@pytest.mark.parametrize("method", ["spawn", START_METHOD])
def test_a_fresh_process_is_another_one(method, monkeypatch):
    monkeypatch.setattr(harness, "START_METHOD", method)
    first, second = (harness.in_fresh_process(os.getpid) for _ in range(2))
    assert len({first, second, os.getpid()}) == 3


def test_tables_and_metadata(tmp_path):
    table = harness.markdown_table(["name", "ms"], [["a", "1.0"], ["longer", "10.25"]], numbers=1)
    assert table == "| name   |    ms |\n| ------ | ----: |\n| a      |   1.0 |\n| longer | 10.25 |"
    assert harness.median_and_quartiles([1, 2, 3], 1, 1e3) == (2000, [1000, 3000])
    about = harness.metadata(threads=3, steps=5)
    assert (about["torch"], about["device"], about["threads"], about["steps"]) == (torch.__version__, "cpu", 3, 5)
    assert harness.save(tmp_path / "out.json", about) == json.loads((tmp_path / "out.json").read_text())


def test_losses(tmp_path):
    threads = torch.get_num_threads()
    kept = losses.main(batch_sizes=(16,), repeats=2, threads=threads, out=tmp_path / "losses.json")
    assert {row["batch_size"] for row in kept["results"]} == {16}
    for row in kept["results"]:
        assert row["ms"] > 0 and row["pml_ms"] > 0
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high
        assert (
            low - 0.05 < row["ms"] / row["pml_ms"] < high + 0.05
        )  # two repeats: between their ratios, but for rounding
    assert (tmp_path / "losses.json").exists()


def test_glyph_classes_derives_the_committed_lists(capsys):
    from pml_ext.datasets.glyph_characters import TEST_CHARACTERS, TRAIN_CHARACTERS

    glyph_classes.main()
    lists = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("00")]
    derived = {chr(int(code_point, 16)) for half in lists for code_point in half}
    assert len(derived & set(TRAIN_CHARACTERS + TEST_CHARACTERS)) > 0.97 * 534  # other versions draw and name others


def test_hybrid_defaults(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (260, 16, 16, 3), dtype=np.uint8)
    split = np.array(["train"] * 240 + ["test"] * 20)
    np.savez(tmp_path / "toy.npz", images=images, labels=np.arange(260) // 5, split=split)
    monkeypatch.setattr(hybrid_defaults, "WIDTH", 4)
    results = hybrid_defaults.main([str(tmp_path / "toy.npz")], epochs=(1,), seeds=1, out=tmp_path / "out.json")
    assert len(results["toy"]) == 13
    for row in results["toy"].values():
        assert all(0 <= values[0] <= 100 for values in row.values())
    assert (tmp_path / "out.json").exists()


@linux_only
def test_proxy_scaling(tmp_path, capsys, in_this_process):
    sizes, threads = ((300, 16, 8), (40_000, 16, 8)), torch.get_num_threads()
    files = {"out": tmp_path / "out.json", "picture": tmp_path / "out.png"}
    kept = proxy_scaling.main(sizes, steps=2, rounds=1, threads=threads, **files)
    rows = {(row["num_classes"], row["method"]): row for row in kept["results"]}
    assert set(rows) == {(size[0], method) for size in sizes for method in proxy_scaling.METHODS}
    assert all(row["seconds"] > 0 for row in rows.values())
    for ours, theirs in proxy_scaling.BESIDE.items():
        assert rows[40_000, ours]["extra_mb"] < rows[40_000, theirs]["extra_mb"]
    assert ["40,000 x 16 x 8", "ProxyAnchorLoss"] in [cells[:2] for cells in cells_of(capsys.readouterr().out)]
    for path in files.values():
        assert path.stat().st_size > 0


@linux_only
def test_pair_scaling(tmp_path, capsys, in_this_process):
    sizes, threads = ((600, 0), (900, 0), (16, 20_000)), torch.get_num_threads()
    kept = pair_scaling.main(sizes, steps=2, rounds=1, threads=threads, out=tmp_path / "out.json")
    rows = {(row["batch_size"], row["num_refs"], row["method"]): row for row in kept["results"]}
    assert set(rows) == {(*size, method) for size in sizes for method in pair_scaling.METHODS}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows[900, 0, "tiles"]["extra_mb"] < rows[900, 0, "dense"]["extra_mb"] < rows[900, 0, "PML"]["extra_mb"]
    assert ["16 x 20,000", "MultiSimilarityLoss, epsilon=0.1"] in [
        cells[:2] for cells in cells_of(capsys.readouterr().out)
    ]
    assert pair_scaling.methods_of(65_536, 0) == ("floor", "tiles", "mined")
    assert json.loads((tmp_path / "out.json").read_text()) == kept


def test_pairs_page_has_the_kept_table():
    kept = json.loads((FOLDER / "results" / "pair_scaling-cpu.json").read_text())
    assert pair_scaling.table(kept) in (FOLDER.parent / "docs" / "pairs.md").read_text()


@linux_only
def test_second_order_attention(tmp_path, capsys, in_this_process):
    sizes, threads = ((48, 16),), torch.get_num_threads()
    kept = second_order_attention.main(sizes, steps=2, rounds=1, threads=threads, out=tmp_path / "out.json")
    peaks = {row["method"]: row["peak_mb"] for row in kept["results"]}
    assert peaks["ours"] < peaks["explicit"] / 3
    assert ["48 x 48 x 16", "SecondOrderAttention"] in [cells[:2] for cells in cells_of(capsys.readouterr().out)]
    assert (tmp_path / "out.json").stat().st_size > 0


def test_ensemble(tmp_path, capsys):
    kept = ensemble.main(
        image_size=32,
        batch_size=2,
        loss_batch_size=16,
        repeats=2,
        learners=(2, 4),
        counted=("resnet18",),
        threads=torch.get_num_threads(),
        out=tmp_path / "out.json",
    )
    assert {(row["learners"], row["name"]) for row in kept["trunks"]} == {
        (m, name) for m in (2, 4) for name in ("folded", "loop", "backbone alone")
    }
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in kept["trunks"] + kept["losses"])
    counts = kept["parameters"]["resnet18"]
    assert counts["shared attention trunk"] < counts["an attention trunk each"] < counts["separate networks"]
    assert ["M = 2", "folded"] in [cells[:2] for cells in cells_of(capsys.readouterr().out)]
    assert (tmp_path / "out.json").stat().st_size > 0


def test_ensemble_compares_the_same_embeddings():
    trunk = AttentionEnsemble.from_backbone("resnet18", None, 2, 8, input_size=(3, 32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ensemble.in_a_loop(trunk, images), trunk(images))


@linux_only
def test_refiner(tmp_path, capsys, monkeypatch, in_this_process):
    monkeypatch.setattr(refiner, "EMBEDDING_SIZE", 16)
    threads = torch.get_num_threads()
    sizes = {"batch_sizes": (6,), "graph": (20, 3), "share": (4, 32)}
    kept = refiner.main(**sizes, steps=2, rounds=1, threads=threads, out=tmp_path / "out.json")
    rows = {(row["nodes"], row["senders"], row["method"]) for row in kept["results"]}
    assert rows == {(6, 6, method) for method in refiner.METHODS} | {(20, 3, "edges")}
    assert kept["resnet18"]["ms_with"] > 0 and kept["resnet18"]["ms_without"] > 0
    printed = capsys.readouterr().out
    assert ["6 x 6", "dense"] in [cells[:2] for cells in cells_of(printed)]
    assert "ResNet-18, 4 images of 32 x 32: a step takes" in printed
    assert (tmp_path / "out.json").stat().st_size > 0


def test_refiner_compares_the_same_work():
    """Dense and along edges the same numbers; the same parameters as the encoder layer has."""
    emb = torch.randn(6, refiner.EMBEDDING_SIZE)
    torch.manual_seed(0)
    dense, module = refiner.make("dense", 6, 6)
    module.eval()
    torch.manual_seed(0)
    edges, other = refiner.make("edges", 6, 6)
    other.eval()
    torch.testing.assert_close(edges(emb), dense(emb), rtol=1e-4, atol=1e-4)
    layer = refiner.make("transformer", 6, 6)[1]
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in module.parameters())


@linux_only
def test_distributed(tmp_path, capsys):
    """What is sent is what the arithmetic says."""
    kept = distributed.main(sizes=(2_000,), losses=("ProxyAnchorLoss",), steps=1, out=tmp_path / "out.json")
    rows = {row["way"]: row for row in kept["results"]}
    assert set(rows) == set(distributed.WAYS)
    assert rows["two ranks, classes split"]["bytes"] == distributed.expected_bytes("ProxyAnchorLoss")
    assert rows["one process"]["bytes"] == 0
    assert all(row["ms"] > 0 and row["peak_mb"] > 0 for row in rows.values())
    assert ["512", "0.16", "67.1"] in cells_of(capsys.readouterr().out)
    assert (tmp_path / "out.json").stat().st_size > 0


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Gray images of 12 classes, 8 of them for training, in which a class is a place of a bright square."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # a run sets it, in a process of its own
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 160, (72, 28, 28), dtype=np.uint8), np.arange(72) // 6
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 4, 2 * label : 2 * label + 4] = 255
    path = tmp_path / "toy.npz"
    rows = rng.normal(size=(12, 5)).astype(np.float32)
    split = np.where(labels < 8, "train", "test")
    np.savez(path, images=images, labels=labels, split=split, class_embeddings=rows)
    return path


TINY_ROWS = ("image_size=28", "width=4", "batch_size=12", "samples_per_class=3", "embedding_size=16")


TINY_SETTINGS = {name: int(value) for name, _, value in (pair.partition("=") for pair in TINY_ROWS)}


def retrieval_line(toy, row, seed=0, validation=False, epochs=2, **settings):
    job = {"row": row, "data": str(toy), "class_embeddings": None, "epochs": epochs, "validation": validation}
    return retrieval.run(job | {"seed": seed, "settings": TINY_SETTINGS | settings, "tuned": {}})


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_and_is_reproduced(row, toy):
    line, again = (retrieval_line(toy, row) for _ in range(2))
    for one in (line, again):
        assert one.pop("seconds") > 0 and one.pop("peak_memory_mb") > 0
    assert line == again
    assert line["images_seen"] == 2 * 48 and len(line["loss"]) == 2
    assert len(line["metrics"]) == 2 + ("refiner" in row) and {"", " + mean of 8 neighbours"} <= set(line["metrics"])
    assert all(0 <= value <= 100 for metrics in line["metrics"].values() for value in metrics.values())
    json.dumps(line)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_starts_with_similarity(heads, toy):
    """Scores are gain times cosine in the mean over heads; what is left to the null message tells their size."""
    job = {"data": str(toy), "class_embeddings": None, "epochs": 1, "validation": False, "seed": 0}
    job["settings"] = TINY_SETTINGS | {"lr": 1e-12, "proxy_lr": 1e-12, "heads": heads}  # as it starts
    x = torch.nn.functional.normalize(torch.randn(6, 16, dtype=torch.float64))
    attention = {}
    for row in ("refiner", "refiner, starts with similarity"):
        made, *_ = retrieval.trained(job | {"row": row})
        attention[row] = made.loss.refiner.eval().double().attention_weights(x)[0]  # e^score / (1 + sum of e^score)
    weights = attention["refiner, starts with similarity"]
    scores = (weights / (1 - weights.sum(2, keepdim=True))).log().mean(0)
    torch.testing.assert_close(scores, 10 * x @ x.T, atol=1e-3, rtol=1e-3)
    assert attention["refiner"].std() < 0.1 * weights.std()


def test_all_rows_have_four_trials_with_settings_they_know():
    for name, row in ROWS.items():
        trials = row.trials()
        assert len(trials) == 4 and len({json.dumps(trial) for trial in trials}) == 4, name
        assert not set(row.settings) & set(trials[0]), name  # a trial must not undo what makes the row


def test_tuning_does_not_look_at_test_classes(toy, tmp_path):
    arrays = dict(np.load(toy))
    arrays["images"][arrays["split"] == "test"] = 0
    np.savez(tmp_path / "toy2.npz", **arrays)
    paths = (toy, tmp_path / "toy2.npz")
    both = [retrieval_line(path, "proxy_anchor", validation=True) for path in paths]
    assert both[0]["metrics"] == both[1]["metrics"] and both[0]["loss"] == both[1]["loss"]
    changed = [retrieval_line(path, "proxy_anchor")["metrics"] for path in paths]
    assert changed[0] != changed[1]


def test_shuffled_class_embeddings_are_those_of_other_classes(toy, monkeypatch):
    rows, seen = np.load(toy)["class_embeddings"][:8], []
    make = retrieval.recipe

    def spy(*args, class_embeddings=None, **kwargs):
        seen.append(class_embeddings)
        return make(*args, class_embeddings=class_embeddings, **kwargs)

    monkeypatch.setattr(retrieval, "recipe", spy)
    for row in ("margin from distance", "margin from shuffled distance"):
        retrieval_line(toy, row, epochs=1)
    given, shuffled = seen
    assert np.array_equal(given, rows)
    assert sorted(shuffled.tolist()) == sorted(rows.tolist()) and (shuffled.numpy() != rows).any(1).all()


def test_retrieval_is_tuned_resumed_and_shown(toy, tmp_path, capsys):
    out, rows = tmp_path / "out", ["proxy_anchor", "cosface"]
    tuning, finished = (run_files.path_of(out, "toy", kind) for kind in ("tuning", "test"))
    common = {"data": str(toy), "budget": "epochs:1", "out": out, "settings": TINY_ROWS, "jobs": 2}
    for row in rows:  # three of four trials are there already
        for trial in ROWS[row].trials()[1:]:
            line = {"row": row, "trial": trial, "seed": 0, "epochs": 1, "validation": True}
            line |= {"metrics": {"": {retrieval_tables.TUNED_FOR: 0.0}}, "settings": TINY_SETTINGS | trial}
            run_files.append(tuning, line)
    retrieval.main(recipes=rows, tune=True, seeds=(0,), **common)
    assert len(run_files.read(tuning)) == 8
    chosen = run_files.find(run_files.read(tuning), row="cosface", trial=ROWS["cosface"].trials()[0])
    assert chosen["validation"] and chosen["metrics"][""][retrieval_tables.TUNED_FOR] > 0
    metrics = dict.fromkeys(retrieval_tables.METRICS, 50.0)
    line = {"data": "toy", "seed": 0, "metrics": {"": metrics}, "epochs": 1, "tuned": chosen["trial"]}
    line |= {"validation": False, "settings": TINY_SETTINGS | chosen["trial"]}
    for row in rows[::-1]:
        run_files.append(finished, line | {"row": row})
    for other, message in (
        ({"budget": "epochs:2"}, "is a run with epochs = 1, got 2"),
        ({"settings": (*TINY_ROWS, "width=8")}, "is a run with width = 4, got 8"),
    ):
        with pytest.raises(SystemExit, match=rf"toy-test.jsonl: row 'cosface', seed 0 {message}: choose another --out"):
            retrieval.main(recipes=["cosface"], seeds=(0,), **(common | other))
    with pytest.raises(SystemExit, match=r"row 'cosface', trial \{.*\} is a run with seed = 0, got 1"):
        retrieval.main(recipes=["cosface"], seeds=(1,), tune=True, **common)
    with finished.open("a") as file:
        file.write('{"row": "cosface", "seed": 1, "metr')  # by a process that was killed
    retrieval.main(recipes=["cosface"], seeds=(0, 1, 2), baseline="proxy_anchor", **common)
    assert 'toy-test.jsonl: the last line is cut off and counts as not run: b\'{"row"' in capsys.readouterr().err
    lines = run_files.read(finished)
    assert len(lines) == 4 and lines[1]["metrics"][""] == metrics  # a finished run is not repeated
    written = finished.read_bytes()
    retrieval.main(recipes=["cosface"], seeds=(2, 1, 0), **common)
    assert finished.read_bytes() == written
    for seed in (1, 2):
        new = run_files.find(lines, row="cosface", seed=seed)
        assert {name: new["settings"][name] for name in ("lr", "margin")} == chosen["trial"] and new["data"] == "toy"
        assert not new["validation"] and new["tuned_on"] == "toy" and new["tuned"] == chosen["trial"]
    mean = np.mean([one["metrics"][""]["precision_at_1"] for one in lines if one["row"] == "cosface"])
    capsys.readouterr()
    retrieval.main(out=out, show_only=True, baseline="proxy_anchor", plot=tmp_path / "plot.png")
    (cells,) = (cells for cells in cells_of(capsys.readouterr().out) if cells[0] == "cosface")
    assert cells[1] == "3" and cells[2].split()[0] == f"{mean:.1f}"
    assert cells[-1] == f"lr {chosen['trial']['lr']:g}, margin {chosen['trial']['margin']:g}"
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"must have 4 trials of 'triplet' under .*, got 0"):
        retrieval.main(recipes=["triplet"], **common)
    tuning.write_text("".join(tuning.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(SystemExit, match=r"must have 4 trials of 'cosface' under .*, got 2"):
        retrieval.main(recipes=["cosface"], **common)
    with pytest.raises(SystemExit, match="--class-embeddings must be given for the row 'margin from distance'"):
        retrieval.main(recipes=["margin from distance"], untuned=True, **common)
    with pytest.raises(SystemExit, match="--data must be given"):
        retrieval.main()
    with pytest.raises(SystemExit, match="--plot needs finished runs"):
        retrieval.main(show_only=True, out=tmp_path, plot=tmp_path / "none.png")
    with pytest.raises(SystemExit, match="--budget must be epochs:N, got 'hours:2'"):
        retrieval.main(**(common | {"budget": "hours:2"}))


def test_what_is_compared_on_validation_classes_says_so(toy, tmp_path, capsys):
    common = {"data": str(toy), "out": tmp_path, "settings": TINY_ROWS, "untuned": True, "seeds": (1,)}
    asked = {"recipes": ["cosface:lr=0.003,epochs=3"], "budget": "epochs:1", "validation": True}
    retrieval.main(**asked, **common)
    table = capsys.readouterr().out
    assert "\ntoy, validation classes: percent" in table and "differences" not in table
    path = run_files.path_of(tmp_path, "toy", "validation")
    (line,), written = run_files.read(path), path.read_bytes()
    retrieval.main(**asked, **common)
    assert path.read_bytes() == written  # a finished run is not repeated
    with pytest.raises(SystemExit, match="--validation must not be given with --tune"):
        retrieval.main(**asked, tune=True, **common)
    capsys.readouterr()
    retrieval.main(recipes=["cosface:lr=0.003"], budget="epochs:3", **common)  # on test classes, beside it
    table = capsys.readouterr().out
    assert "\ntoy, validation classes: percent" in table and "\ntoy: percent" in table
    (of_test,) = run_files.read(run_files.path_of(tmp_path, "toy", "test"))
    assert path.read_bytes() == written
    assert line["validation"] and not of_test["validation"] and line["metrics"] != of_test["metrics"]
    again = {"recipes": ["cosface:lr=0.003"], "budget": "epochs:3", "validation": True, "out": tmp_path / "other"}
    retrieval.main(**(common | again))
    (again,) = run_files.read(run_files.path_of(tmp_path / "other", "toy", "validation"))
    assert again["validation"] and again["metrics"] == line["metrics"]
    assert line["images_seen"] == again["images_seen"] and len(line["loss"]) == line["epochs"] == 3


def test_runs_are_read_as_they_were_written(tmp_path):
    path = run_files.path_of(tmp_path / "new", "my-data", "test")
    assert run_files.read(path) == []
    for run in ({"row": "a", "seed": 0}, {"row": "a", "seed": 1, "x": [1.5, None, "±"]}):
        run_files.append(path, run)
    runs = run_files.read(path)
    assert runs == [{"row": "a", "seed": 0}, {"row": "a", "seed": 1, "x": [1.5, None, "±"]}]
    assert len(path.read_text().splitlines()) == 2
    assert run_files.paths_of(path.parent, "test") == {"my-data": path} and not run_files.paths_of(
        path.parent, "tuning"
    )
    assert run_files.find(runs, row="a", seed=1) == runs[1] and run_files.find(runs, row="b", seed=1) is None


@pytest.mark.parametrize("tail", [b'{"seed": 1, "x"', b'{"seed": 1', b"{", b'{"seed": "\xc2'])
def test_a_line_that_is_cut_off_is_named_and_written_over(tail, tmp_path, capsys):
    path = tmp_path / "toy-test.jsonl"
    run_files.append(path, {"seed": 0})
    path.write_bytes(path.read_bytes() + tail)
    assert run_files.read(path) == [{"seed": 0}]
    assert f"{path}: the last line is cut off and counts as not run" in capsys.readouterr().err
    run_files.append(path, {"seed": 2})
    assert path.read_text() == '{"seed": 0}\n{"seed": 2}\n'
    assert run_files.read(path) == [{"seed": 0}, {"seed": 2}] and not capsys.readouterr().err


def test_a_last_line_without_line_break_is_whole(tmp_path, capsys):
    path = tmp_path / "toy-test.jsonl"
    path.write_text('{"seed": 0}')
    assert run_files.read(path) == [{"seed": 0}] and not capsys.readouterr().err
    run_files.append(path, {"seed": 1})
    assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'


def test_a_broken_line_in_between_stops(tmp_path):
    path = tmp_path / "toy-test.jsonl"
    path.write_text('{"seed": 0}\n<<<<<<< ours\n{"seed": 1}\n')
    with pytest.raises(SystemExit, match=r"toy-test.jsonl, line 2 must be a run as JSON, got b'<<<<<<< ours'"):
        run_files.read(path)


def test_two_processes_append_to_one_file(tmp_path):
    path = tmp_path / "toy-test.jsonl"
    code = "import pathlib, run_files, sys\nfor seed in range(100):\n"
    code += " run_files.append(pathlib.Path(sys.argv[1]), {'process': sys.argv[2], 'seed': seed, 'long': 5000 * 'x'})"
    workers = [subprocess.Popen([sys.executable, "-c", code, path, name], cwd=FOLDER) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    runs = run_files.read(path)
    for process in "ab":
        assert [run["seed"] for run in runs if run["process"] == process] == list(range(100))


@linux_only
def test_workers_end_with_the_process_that_is_killed():
    code = "import time, multiprocessing as m\nfrom harness import quiet\n"
    code += "if __name__ == '__main__':\n pool = m.get_context('spawn').Pool(1, initializer=quiet)\n"
    code += " pool.apply(time.sleep, (0,))\n print(pool._pool[0].pid, flush=True)\n pool.apply(time.sleep, (60,))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=FOLDER) as asking:
        number = asking.stdout.readline().strip()
        assert number.isdigit() and is_running(number)
        asking.kill()
        asking.wait()
        waited = time.monotonic()
        while is_running(number):
            assert time.monotonic() - waited < 20
            time.sleep(0.1)


def is_running(process):
    try:
        return "zombie" not in Path("/proc", process, "status").read_text()
    except OSError:
        return False


def test_differences_are_paired_by_seed():
    metric = retrieval_tables.TUNED_FOR
    row, baseline = ({seed: {metric: x} for seed, x in enumerate(values)} for values in ((3, 5, 9), (1, 4, 6)))
    mean, half = retrieval_tables.difference(row | {7: {metric: 99}}, baseline, metric)
    assert mean == pytest.approx(2)  # of 2, 1, 3
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # t of 97.5% and 2 degrees of freedom, deviation 1
    assert retrieval_tables.difference({0: {metric: 1}}, baseline, metric) is None


def test_rows_of_recipes_with_settings():
    row = row_of("mhgl:attention=printed,proxy_weight=0.1,pretrained=False")
    assert (row.recipe, row.settings) == ("mhgl", {"attention": "printed", "proxy_weight": 0.1, "pretrained": False})
    assert len({json.dumps(trial) for trial in row.trials()}) == 4 and row.class_embeddings is None
    assert row_of("combined:proxy_loss=adaptive_margin").class_embeddings == "given"


def test_questions_compare_rows_that_exist():
    for pairs in QUESTIONS.values():
        for name in (name for pair in pairs for name in pair):
            row, _, later = name.partition(" + ")
            assert row in (*ROWS, "recommended") and later in ("", "refinement at test time", "mean of 8 neighbours")


@pytest.mark.parametrize("page", retrieval_tables.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_that_the_command_writes(page):
    text = page.read_text(encoding="utf-8")
    assert retrieval_tables.fill(text, retrieval_tables.all_tables()) == text, "run benchmarks/retrieval_tables.py"


def test_every_table_is_on_a_page():
    shown = [
        name for page in retrieval_tables.PAGES for _, name, _ in retrieval_tables.MARKED.findall(page.read_text())
    ]
    assert sorted(shown) == sorted(retrieval_tables.all_tables())


def test_committed_runs_are_whole_and_there_once(capsys):
    paths = [
        path for kind in ("retrieval", "finetuning") for path in sorted((retrieval_tables.RESULTS / kind).iterdir())
    ]
    assert len(paths) == 23
    for path in paths:
        keys = [(run["row"], run["seed"], str(run["epochs"]), str(run.get("trial"))) for run in run_files.read(path)]
        assert len(set(keys)) == len(keys) > 2
        assert {run["data"] for run in run_files.read(path)} == {path.name.split("-")[0]}
    assert not capsys.readouterr().err


def test_what_tables_leave_out():
    """Columns without a value, and the settings of a row that say the same as two words."""
    seeds = {0: dict.fromkeys(retrieval_tables.METRICS, 50.0) | {"chosen": {}}}
    row = "mhgl:levels=global,attention=none,pool_type=avg,lr=0.1"
    (header, *_, line) = cells_of(retrieval_tables.table_of_rows({row: seeds}, "multi_similarity"))
    assert header == ["row", "seeds", *retrieval_tables.METRICS.values()]
    assert line == ["hybrid: pool_type=avg,lr=0.1", "1", "50.0", "50.0", "50.0", "50.0"]
    assert finetuning_rows.full(line[0]) == row and finetuning_rows.full("hybrid, avg+max") == "hybrid, avg+max"
    assert retrieval_tables.shorter("mhgl:levels=global,attention=nonesuch") == "mhgl:levels=global,attention=nonesuch"


def test_tables_of_made_up_runs(tmp_path):
    rows = {"hybrid": (50.0, 60.0), "multi_similarity": (41.0, 49.0), "zzz:lr=1": (1.0,), "cosface:lr=1": (2.0,)}
    for row, values in rows.items():
        for seed, value in enumerate(values):
            metrics = dict.fromkeys(retrieval_tables.METRICS, value)
            line = {"row": row, "seed": seed, "settings": {"lr": 0.001, "base": 0.5}, "tuned": {"base": 0.5}}
            line["metrics"] = {"": metrics, " + mean of 8 neighbours": metrics}
            run_files.append(run_files.path_of(tmp_path, "toy", "test"), line)
    tables = {name: cells_of(table) for name, (_, table) in retrieval_tables.tables_of_rows(tmp_path).items()}
    first, *others = tables["toy-test rows"][2:]
    assert first == ["multi_similarity", "2", *4 * ["45.0 (5.7)"], "", "lr 0.001, base 0.5"]
    assert [cells[0] for cells in others] == [
        "multi_similarity + mean of 8 neighbours",
        "hybrid",
        "cosface:lr=1",
        "zzz:lr=1",
    ]  # means of neighbours only where a question asks for them
    interval = "+10.0 ± 12.7"  # of 9 and 11: the t of 97.5% and 1 degree of freedom is 12.7, times 2**0.5 / 2**0.5
    assert others[1] == ["hybrid", "2", *4 * ["55.0 (7.1)"], interval, "lr 0.001, base 0.5"]
    assert ["pairs and proxies", "hybrid", "multi_similarity", interval, interval] in tables["toy-test questions"]


def test_rows_with_settings_of_their_own_have_tables_of_their_own(tmp_path):
    for kind in ("test", "halves"):
        for row, value in (("recommended", 50.0), ("proxy_anchor", 40.0), ("recommended:epsilon=None", 45.0)):
            for seed in (0, 1):
                metrics = {"": dict.fromkeys(retrieval_tables.METRICS, value + seed)}
                line = {"row": row, "seed": seed, "settings": {"lr": 0.001}, "tuned": {}, "metrics": metrics}
                run_files.append(run_files.path_of(tmp_path, "toy", kind), line)
    found = {name: cells_of(table)[2:] for name, (_, table) in retrieval_tables.tables_of_finetuning(tmp_path).items()}
    rows = {name: [cells[0] for cells in lines] for name, lines in found.items() if name.endswith("rows")}
    assert rows == {
        "toy-test rows": ["recommended", "proxy_anchor"],
        "toy-test variant rows": ["recommended", "recommended:epsilon=None"],
        "toy-halves rows": ["recommended", "proxy_anchor", "recommended:epsilon=None"],
    }
    gap = ["recommended", "recommended:epsilon=None", "+5.0 ± 0.0", "+5.0 ± 0.0"]
    other = ["recommended:epsilon=None", "proxy_anchor", "+5.0 ± 0.0", "+5.0 ± 0.0"]
    named = ["recommended", "proxy_anchor", "+10.0 ± 0.0", "+10.0 ± 0.0"]
    assert [cells[1:] for cells in found["toy-test questions"]] == [named]
    assert [cells[1:] for cells in found["toy-test variant questions"]] == [gap, other]
    assert [cells[1:] for cells in found["toy-halves questions"]] == [named, gap, other]


def test_the_picture_has_a_panel_for_each_metric(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.append(figure))
    for data in ("cars196", "toy"):
        for row in ("recommended", "recommended:epsilon=None"):
            metrics = {"": dict.fromkeys(retrieval_tables.METRICS, 30.0) | {"precision_at_1": 40.0}}
            line = {"row": row, "seed": 0, "settings": {"lr": 0.001}, "tuned": {}, "metrics": metrics}
            run_files.append(run_files.path_of(tmp_path, data, "test"), line)
    finetuning.main(out=tmp_path, show_only=True, plot=tmp_path / "plot.png")
    panels = [
        (axis.get_title().split(":")[0], axis.get_xlabel(), axis.lines[0].get_xdata()[0]) for axis in drawn[0].axes
    ]
    p_at_1, map_at_r = (f"{name} on unseen classes, percent" for name in ("P@1", "MAP@R"))
    assert panels == [
        (data, label, value) for data in ("cars196", "toy") for label, value in ((p_at_1, 40.0), (map_at_r, 30.0))
    ]
    assert [text.get_text() for text in drawn[0].axes[0].get_yticklabels()] == ["recommended"]


def test_tables_of_what_is_inside(tmp_path):
    """A column for each measure that all rows or all hybrids have; what single methods have is a table of its own."""
    size, gradient, _ = list(retrieval_tables.OF_EACH)[1:]
    for row, seed, measured in (
        ("hybrid", 0, {size: 0.5, gradient: 2.0}),
        ("hybrid", 1, {size: 0.7, gradient: 2.0, "MAP@R": 9.04}),
        ("frozen", 0, {}),
        ("cosface", 0, {size: 0.25}),
    ):
        run_files.append(run_files.path_of(tmp_path, "toy", "test"), {"row": row, "seed": seed, "measured": measured})
    tables = {name: cells_of(table)[2:] for name, (_, table) in retrieval_tables.tables_of_measured(tmp_path).items()}
    hybrid, cosface = tables.pop("toy-test measured")
    assert hybrid == ["hybrid", "2", "", "0.60 (0.14)", "2.00 (0.00)", ""]
    assert cosface == ["cosface", "1", "", "0.25", "", ""]
    assert tables == {"toy-test parts": [["hybrid", "MAP@R", "9.0"]]}


def test_a_page_is_filled(tmp_path):
    page, new = tmp_path / "page.md", "| a |\n| - |\n| 1 |"
    text = (
        "x\n\n<!-- table one -->\n\n| a |\n\n<!-- end of table -->\n\n<!-- table two -->\n\n\n<!-- end of table -->\n"
    )
    filled = retrieval_tables.fill(text, {"one": ("", new), "two": ("", new), "three": ("", "")})
    assert filled == text.replace("| a |\n", "").replace("-->\n\n\n<", f"-->\n\n{new}\n\n<")
    with pytest.raises(SystemExit, match="must be one of one, got two"):
        retrieval_tables.fill(text, {"one": ("", new)})
    with pytest.raises(SystemExit, match="must be closed behind its table, got that of two"):
        retrieval_tables.fill(text.replace("<!-- end of table -->", "", 1), {"two": ("", new)})
    page.write_text("<!-- table omniglot-test rows -->\n\n\n<!-- end of table -->\n")
    retrieval_tables.main([page])
    assert "\n| hybrid  " in page.read_text()


def test_the_summary_has_the_best_of_pmls_losses_for_each_metric(tmp_path):
    found = {"recommended": (5, 7), "contrastive": (2, 2), "cosface": (1, 1), "hybrid": (9, 9)}
    run_files.append(
        run_files.path_of(tmp_path / "retrieval", "lonely", "test"),  # no row to compare with
        {
            "row": "recommended",
            "seed": 0,
            "settings": {"lr": 1},
            "tuned": {},
            "metrics": {"": dict.fromkeys(retrieval_tables.METRICS, 1)},
        },
    )
    for row, values in (found | {"contrastive": (2, 2, 99)}).items():  # seed 2 is that of one row alone
        for seed, value in enumerate(values):
            metrics = dict.fromkeys(retrieval_tables.METRICS, value)
            if row == "cosface":
                metrics["precision_at_1"] = 4
            line = {"row": row, "seed": seed, "settings": {"lr": 0.001}, "tuned": {}, "metrics": {"": metrics}}
            run_files.append(run_files.path_of(tmp_path / "retrieval", "toy", "test"), line)
    _, table = retrieval_tables.summary(tmp_path)["summary"]
    assert cells_of(table)[2:] == [
        ["toy", "4.0 cosface", "6.0 (+2.0 ± 12.7)", "2.0 contrastive", "6.0 (+4.0 ± 12.7)", "2"],
    ]
    for kind, epochs, ours in (("test", 6, 1), ("long", 15, 3)):  # both are shown
        for row, value in (("recommended", ours), ("contrastive", 2)):
            metrics = {"": dict.fromkeys(retrieval_tables.METRICS, value)}
            line = {"row": row, "seed": 0, "settings": {"lr": 1, "epochs": epochs}, "tuned": {}, "metrics": metrics}
            run_files.append(run_files.path_of(tmp_path / "finetuning", "photos", kind), line)
    lines = cells_of(retrieval_tables.summary(tmp_path)["summary"][1])
    assert lines[3:] == [
        ["photos, pretrained, 6 epochs", *(["2.0 contrastive", "1.0"] * 2), "1"],
        ["photos, pretrained, 15 epochs", *(["2.0 contrastive", "3.0"] * 2), "1"],
    ]
    assert retrieval_tables.summary(tmp_path / "none") == {}


def test_product_pictures(tmp_path):
    for name in ("once", "again"):
        product_pictures.main(tmp_path / name, classes=2, pictures=3)
    once, again = (sorted((tmp_path / name).rglob("*.png")) for name in ("once", "again"))
    pixels = [np.asarray(Image.open(path)) for path in once]
    assert len(once) == len(again) == 12 and {x.shape for x in pixels} == {(96, 96, 3)}
    assert all(first.read_bytes() == second.read_bytes() for first, second in zip(once, again, strict=True))
    assert len({x.tobytes() for x in pixels}) == 12
    data = open_data(tmp_path / "once")
    assert (data.num_classes, len(data.train), data.test.num_classes) == (2, 6, 2)


@pytest.mark.parametrize("row", [*retrieval_causes.MEASURED, "mhgl, normalized attention", "hybrid, two levels"])
def test_causes_are_measured(row, toy):
    job = {"row": row, "data": str(toy), "class_embeddings": None, "epochs": 2, "validation": False, "seed": 0}
    line = retrieval_causes.measure(job | {"settings": TINY_SETTINGS, "given": {}})
    assert (line["row"], line["seed"], line["epochs"], line["data"]) == (row, 0, 2, "toy")
    measured = line["measured"]
    assert all(np.isfinite(value) for value in measured.values())
    assert all(0 <= value <= 100 for what, value in measured.items() if "percent" in what and "added" not in what)
    if row == "no margin":
        assert measured["margins, mean"] == measured["margins, standard deviation"] == 0
    if row == "margin from distance":
        assert measured["margins, mean"] > 0 and measured["margins, standard deviation"] > 0
    if row == "mhgl":
        assert measured["local: added, of the map's norm, percent"] > 0
        assert 0 < measured["global: entropy of the attention, percent of the largest"] <= 100
    if row.startswith("refiner"):  # 4 classes x 3 samples
        assert measured["that share of the batch, percent"] == pytest.approx(100 * 2 / 12, abs=1e-3)


def test_mean_cosine():
    assert causes.mean_cosine(torch.zeros(3, 2)) == 0
    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert causes.mean_cosine(rows).item() == pytest.approx(2 * 0.5**0.5 / 3)  # of 0, and twice 45 degrees


def test_spread():
    """Four directions at right angles, evenly taken: three are left when their mean is taken away."""
    found = causes.spread(2 * torch.eye(6)[[0, 1, 2, 3] * 3])
    assert found["numbers of the embedding in use"].item() == pytest.approx(3, rel=1e-5)
    assert found["cosine between two images"].item() == pytest.approx(4 * 3 * 2 / (12 * 11))


def test_gradients_of_pairs_and_proxies():
    """Weights scale them; two losses that are one have one gradient."""
    from pml_ext.losses import HybridLoss, MultiSimilarityLoss

    made = recipe("mhgl", 3, in_channels=1, image_size=28, width=4, batch_size=8, samples_per_class=2)
    images = torch.utils.data.TensorDataset(torch.rand(12, 1, 28, 28), torch.arange(12) // 4)
    data = SimpleNamespace(train=images, test=SimpleNamespace(transform=None))
    images.labels = torch.arange(12) // 4
    made.loss = HybridLoss(
        pair_loss=MultiSimilarityLoss(), proxy_loss=MultiSimilarityLoss(), pair_weight=3.0, proxy_weight=2.0
    )
    found = causes.pairs_and_proxies(made, data)
    assert found["gradient of the pair loss / of the proxy loss"].item() == pytest.approx(1.5, rel=1e-4)
    assert found["cosine between the two"].item() == pytest.approx(1, rel=1e-4)


def test_gradients_reach_other_samples_by_messages_only():
    from pml_ext.losses import IntraBatchLoss
    from pml_ext.recipes.silent_refiner import SilentRefiner

    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 6), torch.arange(8) // 2
    silent = IntraBatchLoss(4, 6, refiner=SilentRefiner(6)).eval()
    own, others = causes.gradient_shares(silent, embeddings, labels, samples=8)
    assert own > 0 and others == 0
    own, others = causes.gradient_shares(IntraBatchLoss(4, 6).eval(), embeddings, labels, samples=8)
    assert own > 0 and others > 0


def test_causes_are_written_resumed_and_shown(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(retrieval_causes, "tuned_settings", lambda results, data, row: {"lr": 0.003})
    options = {"data": str(toy), "seeds": (0,), "budget": "epochs:1", "jobs": 1, "results": tmp_path}
    options |= {"out": tmp_path, "tuned_on": None, "class_embeddings": None, "settings": TINY_ROWS}
    options["rows"] = ("4 heads", "mhgl:levels=global")
    retrieval_causes.main(**options, show_only=False)
    printed, path = capsys.readouterr().out, run_files.path_of(tmp_path, "toy", "causes")
    measured = run_files.find(run_files.read(path), row="4 heads", seed=0, epochs=1)["measured"]
    cells = cells_of(printed)
    assert ["4 heads", "MAP@R of all", f"{measured['MAP@R of all']:.1f}"] in cells
    assert measured["MAP@R of all"] > 0
    assert sum(line[0] == "mhgl:levels=global" for line in cells) == 6
    written = path.read_bytes()
    retrieval_causes.main(**options, show_only=False)
    assert path.read_bytes() == written and capsys.readouterr().out == printed  # a finished run is not repeated
    retrieval_causes.main(**(options | {"rows": ("mhgl:levels=global,attention=none",)}), show_only=False)
    longer = capsys.readouterr().out
    assert len(longer.splitlines()) == len(printed.splitlines()) + 2  # beside what was there
    retrieval_causes.main(**(options | {"rows": ("4 heads",), "seeds": (0, 1)}), show_only=False)
    seeds = [run["measured"]["MAP@R of all"] for run in run_files.read(path) if run["row"] == "4 heads"]
    printed, written = capsys.readouterr().out, path.read_bytes()
    assert "toy: mean (standard deviation) over 1 to 2 seeds, epochs: 1" in printed
    assert ["4 heads", "MAP@R of all", f"{np.mean(seeds):.1f} ({np.std(seeds, ddof=1):.1f})"] in cells_of(printed)
    for other, message in (
        ({"settings": ()}, r"toy-causes.jsonl: row '4 heads', seed 0, epochs 1 is a run with settings = .*, got \{\}"),
        ({"rows": ("4 heads", "cosface")}, "--rows must be of the recipes mhgl, .*, got 'cosface'"),
        (
            {"rows": ("smoothed cross-entropy",)},
            "--rows must have a refiner to look into, got 'smoothed cross-entropy'",
        ),
        ({"rows": ("mhgl:epochs=2",)}, "--rows must not set epochs, which --budget does, got 'mhgl:epochs=2'"),
    ):
        with pytest.raises(SystemExit, match=message):
            retrieval_causes.main(**(options | other), show_only=False)
    assert path.read_bytes() == written
    retrieval_causes.main(**options, show_only=True)
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="--data must be given"):
        retrieval_causes.main(**(options | {"data": None}), show_only=False)


def test_the_table_of_evaluation_is_that_of_its_results():
    page = FOLDER.parent / "docs" / "evaluation.md"
    rows = json.loads((FOLDER / "results" / "evaluation-cpu.json").read_text())["rows"]
    assert evaluation.table(rows) in page.read_text()
    assert {row["embeddings"] for row in rows} >= {10_000, 60_502, 100_000}
    assert sum(evaluation.labels_of(evaluation.SIZES["large"]) == 0) == 12_000
    for size in evaluation.SIZES.values():
        labels = evaluation.labels_of(size)
        assert (len(labels), len(labels.unique())) == (size.embeddings, size.classes)


@linux_only
def test_evaluation(tmp_path, monkeypatch, capsys):
    tiny = {"tiny": evaluation.Size("tiny", 400, 40, 0), "large": evaluation.Size("a large class", 300, 21, 100)}
    monkeypatch.setattr(evaluation, "SIZES", tiny)
    kept = evaluation.main(rounds=1, threads=1, out=tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == kept
    measured = {(row["size"], row["candidate"]) for row in kept["rows"] if "seconds" in row}
    assert measured == {("tiny", name) for name in evaluation.CANDIDATES} | {
        ("large", "retrieval_metrics"),
        ("large", "product"),
    }
    assert evaluation.table(kept["rows"]) in capsys.readouterr().out


def test_the_table_of_reports_is_that_of_its_results():
    page = FOLDER.parent / "docs" / "visualization.md"
    kept = json.loads((FOLDER / "results" / "report-cpu.json").read_text())
    assert report.table(kept["rows"]) in page.read_text()
    assert kept["metadata"]["images"] == report.IMAGES == 50_000
    assert [row["title"] for row in kept["rows"]] == [case.title for case in report.CASES]
    assert all(row["peak_mb"] < 1000 and row["file_mb"] < 15 for row in kept["rows"])  # as the docstring says


@linux_only
def test_report(tmp_path, monkeypatch, capsys, in_this_process):
    cases = [case._replace(classes=4) for case in report.CASES]
    monkeypatch.setattr(report, "CASES", cases)
    kept = report.main(images=60, out=tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == kept
    assert all(row["file_mb"] > 0 for row in kept["rows"]) and len(kept["rows"]) == 4
    assert report.table(kept["rows"]) in capsys.readouterr().out


def test_the_tables_of_large_batches_are_those_of_their_results():
    page = (FOLDER.parent / "docs" / "large_batches.md").read_text()
    kept = json.loads((FOLDER / "results" / "large_batches-cpu.json").read_text())
    assert large_batches.table(kept) in page
    assert {row["batch_size"] for row in kept["results"]} == set(large_batches.BATCH_SIZES)
    runs = run_files.read(FOLDER / "results" / "large_batches-omniglot.jsonl")
    assert large_batches.training_table(runs) in page
    for size, (_, rates) in large_batches.TRAININGS.items():
        own = [run for run in runs if run["batch_size"] == size]
        assert {run["lr"] for run in own if run["seed"] == 0} == set(rates)
        assert all(run["settings"]["chunk_size"] == large_batches.TRAINED_CHUNK for run in own)


@linux_only
def test_large_batches(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(large_batches, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(large_batches, "CHUNK_SIZE", 16)
    kept = large_batches.measure((256,), repeats=2, out=tmp_path / "out.json")
    rows = {row["way"]: row for row in kept["results"]}
    assert set(rows) == set(large_batches.WAYS) and "seconds" not in rows["loss"]
    assert rows["chunks"]["peak_mb"] < rows["plain"]["peak_mb"] / 2
    assert rows["plain"]["ratio"] == 1 and rows["chunks"]["ratio"] > 1
    assert large_batches.table(kept) in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == kept


def test_trainings_with_large_batches(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(large_batches, "TRAININGS", {8: (2, (1e-3, 4e-3)), 12: (2, (2e-3,))})
    for name, value in {"IMAGES_SEEN": 72, "TRAINED_CHUNK": 5, "WIDTH": 4}.items():
        monkeypatch.setattr(large_batches, name, value)
    path = tmp_path / "toy.jsonl"
    large_batches.train_all(toy, path, seeds=(1, 2))
    runs, printed = run_files.read(path), capsys.readouterr().out
    assert [(run["batch_size"], run["seed"]) for run in runs] == [
        (8, 0),
        (8, 0),
        (12, 0),
        (8, 1),
        (12, 1),
        (8, 2),
        (12, 2),
    ]
    best = max(runs[:2], key=large_batches.map_at_r)
    assert {run["lr"] for run in runs if run["batch_size"] == 8 and run["seed"]} == {best["lr"]}
    assert [(run["steps"], run["images_seen"]) for run in runs[1:3]] == [(8, 64), (6, 72)]
    values = [run["metrics"]["precision_at_1"] for run in runs if run["batch_size"] == 12 and run["seed"]]
    cells = cells_of(printed)[-1]
    assert cells[:5] == ["12", "2", "0.002", "6", "72"]
    assert cells[5] == f"{np.mean(values):.1f} ({np.std(values, ddof=1):.1f})"
    written = path.read_bytes()
    large_batches.main(train=toy, out=path)  # seed 3 is new, nothing else is repeated
    assert path.read_bytes().startswith(written)
    assert [run["seed"] for run in run_files.read(path)[len(runs) :]] == [3, 3]


def folders_of_noise(folder):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in "abc":
            (folder / part / f"{part} {label}").mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"{part} {label}" / f"{i}.png")


@pytest.mark.parametrize("row", finetuning_rows.ROWS)
def test_each_row_of_finetuning_runs_to_its_end(row, tmp_path):
    folders_of_noise(tmp_path / "data")
    small = {"image_size": 32, "batch_size": 8, "epochs": 1, "backbone": "test_resnet", "pretrained": False}
    small |= {"split": "layer2"} if row in ("4 learners", "4 learners, divergence", "all together") else {}
    job = {"row": row, "data": str(tmp_path / "data"), "class_embeddings": None, "validation": None, "seed": 0}
    run = finetuning.run(job | {"autocast": None, "tuned": {}, "settings": small})
    inside = "".join(run["measured"])
    assert ("numbers of the embedding in use" in inside) == (row != "frozen")
    assert ("gradient of the pair loss" in inside) == row.startswith(("recommended", "hybrid", "mhgl"))
    assert ("MAP@R of one learner" in inside) == (row.startswith("4 learners") or row == "all together")
    assert ("attention to the sample's class" in inside) == row.startswith("refiner")
    assert ("margins, mean" in inside) == row.startswith("margin from")
    assert ("of the map's norm" in inside) == (row == "mhgl")


def test_finetuning(tmp_path, capsys):
    """Rows behind a small network of timm's, on folders of noise."""
    folders_of_noise(tmp_path / "data")
    small = ["image_size=32", "batch_size=8", "epochs=2", "backbone=test_efficientnet", "pretrained=false"]
    small += ["frozen_stages=0"]
    options = {"seeds": [0], "out": tmp_path / "out", "settings": small, "tuned_on": "other"}
    for weight, found in ((0.1, 1.0), (0.25, 3.0), (0.5, 2.0)):
        metrics = {"": {"precision_at_1": 50.0, retrieval_tables.TUNED_FOR: found}}
        trial = {"row": "mhgl", "trial": {"proxy_weight": weight}, "metrics": metrics}
        run_files.append(run_files.path_of(options["out"], "other", "tuning"), trial)
    for _ in range(2):  # what is there is not run again
        finetuning.main(tmp_path / "data", ["frozen", "mhgl"], **options)
    frozen, trained = run_files.read(tmp_path / "out" / "data-test.jsonl")
    assert frozen["row"] == "frozen" and frozen["loss"] == [] and frozen["measured"] == {}
    assert trained["measured"]["local: added, of the map's norm, percent"] > 0
    assert "global: entropy of the attention, percent of the largest" not in trained["measured"]  # of one position
    assert 1 <= trained["measured"]["numbers of the embedding in use"] <= trained["settings"]["embedding_size"]
    assert len(trained["loss"]) == len(trained["epochs"]["precision_at_1"]) == 2
    assert trained["epochs"]["precision_at_1"][-1] == trained["metrics"][""]["precision_at_1"] < 100
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    made = recipe("proxy_anchor", 3, **frozen["settings"] | {"preset": "finetune"})
    test = open_data(tmp_path / "data").test
    test.transform = made.transforms.test
    found = retrieval_metrics(*embed(BackboneFeatures(made.trunk), test))
    assert frozen["metrics"][""]["precision_at_1"] == pytest.approx(100 * found["precision_at_1"], abs=1e-3)
    cells, metric = cells_of(capsys.readouterr().out), retrieval_tables.TUNED_FOR
    printed = [row[:3] for row in cells]
    assert ["frozen", "1", f"{100 * found['precision_at_1']:.1f}"] in printed
    assert ["mhgl", "proxy_weight 0.25", "50.0", "3.0"] in cells
    assert trained["settings"]["attention"] == "normalized" and trained["settings"]["proxy_weight"] == 0.25
    soon = 1 if trained["epochs"][metric][0] >= 0.95 * max(trained["epochs"][metric]) else 2
    inside = f"{trained['measured']['numbers of the embedding in use']:.2f}"
    assert any(row[:3] == ["mhgl", "1", inside] for row in cells)
    shown = dict(zip(*(cells[i] for i in (0, 3)), strict=True))
    assert shown["epochs to 95%"] == f"{soon:.1f}" and shown["chosen"] == "lr 0.0003, proxy_weight 0.25"
    with pytest.raises(SystemExit, match="of --tune, --validation, --halves and --long only one"):
        finetuning.main(tmp_path / "data", ["frozen"], **options, long=True, halves=True)
    with pytest.raises(SystemExit, match="--long trains as long as the preset: --settings must not have epochs, got 2"):
        finetuning.main(tmp_path / "data", ["frozen"], **options, long=True)
    options["settings"] = [setting for setting in small if setting != "epochs=2"]
    finetuning.main(tmp_path / "data", ["frozen"], **options, long=True)
    (again,) = run_files.read(tmp_path / "out" / "data-long.jsonl")
    assert again["metrics"] == frozen["metrics"] and again["settings"]["epochs"] == 15


def test_rows_that_are_compared_cost_as_much():
    """As many multiplications at 120 pixels in one head as at 96 in four learners."""
    found = []
    for name, size in (("multi_similarity, 256 dimensions, 120 pixels", 120), ("4 learners", 96)):
        row = finetuning_rows.row_of(name)
        settings = {"image_size": size} | row.settings
        trunk = recipe(row.recipe, 49, preset="finetune", weights=None, pretrained=False, **settings).trunk.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trunk(torch.zeros(1, 3, size, size))
        found.append(counter.get_total_flops() / 2)
    assert found == pytest.approx([114.1e6, 116.0e6], rel=1e-3)
