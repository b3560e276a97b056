"""Every benchmark runs, briefly."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    distributed,
    ensemble,
    glyph_classes,
    hybrid_defaults,
    losses,
    proxy_scaling,
    refiner,
    retrieval,
    retrieval_causes,
    second_order_attention,
)
from pml_ext.trunks import AttentionEnsemble

pytestmark = pytest.mark.trains

RUNS = {
    "distributed",
    "ensemble",
    "glyph_classes",
    "hybrid_defaults",
    "losses",
    "proxy_scaling",
    "refiner",
    "retrieval",
    "retrieval_causes",
    "second_order_attention",
}


def test_every_benchmark_is_run_here():
    assert {path.stem for path in Path(losses.__file__).parent.glob("*.py")} == RUNS


def test_losses(tmp_path):
    found = losses.main(batch_sizes=(16,), repeats=2, out=tmp_path / "losses.json")
    assert {row["batch_size"] for row in found["results"]} == {16}
    assert all(row["ms"] > 0 and row["pml_ms"] > 0 and row["ratio"] > 0 for row in found["results"])
    assert (tmp_path / "losses.json").exists()


def test_glyph_classes_derives_the_committed_lists(capsys):
    from pml_ext.datasets.glyph_characters import TEST_CHARACTERS, TRAIN_CHARACTERS

    glyph_classes.main()
    lists = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("00")]
    found = {chr(int(code_point, 16)) for half in lists for code_point in half}
    assert len(found & set(TRAIN_CHARACTERS + TEST_CHARACTERS)) > 0.97 * 534  # other versions draw and name others


def test_hybrid_defaults(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (260, 16, 16, 3), dtype=np.uint8)
    split = np.array(["train"] * 240 + ["test"] * 20)
    np.savez(tmp_path / "toy.npz", images=images, labels=np.arange(260) // 5, split=split)
    monkeypatch.setattr(hybrid_defaults, "WIDTH", 4)
    found = hybrid_defaults.main([str(tmp_path / "toy.npz")], epochs=(1,), seeds=1, out=tmp_path / "out.json")
    assert len(found["toy"]) == 13
    for row in found["toy"].values():
        assert all(0 <= values[0] <= 100 for values in row.values())
    assert (tmp_path / "out.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_proxy_scaling(tmp_path, capsys, monkeypatch):
    """One measurement in a process of its own, the others here."""
    sizes, arguments = ((300, 16, 8), (40_000, 16, 8)), ["floor", 300, 16, 8, 2, 1, "cpu"]
    assert len(proxy_scaling.run_alone(arguments)["seconds"]) == 2
    monkeypatch.setattr(proxy_scaling, "run_alone", lambda arguments: proxy_scaling.measure(*arguments))
    found = proxy_scaling.main(
        sizes,
        steps=2,
        rounds=1,
        threads=torch.get_num_threads(),
        out=tmp_path / "out.json",
        picture=tmp_path / "out.png",
    )
    rows = {(row["num_classes"], row["method"]): row for row in found["results"]}
    assert set(rows) == {(size[0], method) for size in sizes for method in proxy_scaling.METHODS}
    assert all(row["seconds"] > 0 for row in rows.values())
    for ours, theirs in proxy_scaling.BESIDE.items():
        assert rows[40_000, ours]["extra_mb"] < rows[40_000, theirs]["extra_mb"]
    assert "| 40,000 x 16 x 8 | ProxyAnchorLoss |" in capsys.readouterr().out
    for name in ("out.json", "out.png"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_second_order_attention(tmp_path, capsys, monkeypatch):
    assert len(second_order_attention.run_alone(["ours", 4, 8, 2, 1, "cpu"])["seconds"]) == 2
    monkeypatch.setattr(second_order_attention, "run_alone", lambda args: second_order_attention.measure(*args))
    sizes, threads = ((48, 16),), torch.get_num_threads()
    found = second_order_attention.main(sizes, steps=2, rounds=1, threads=threads, out=tmp_path / "out.json")
    peaks = {row["method"]: row["peak_mb"] for row in found["results"]}
    assert peaks["ours"] < peaks["explicit"] / 3
    assert "| 48 x 48 x 16 | SecondOrderAttention |" in capsys.readouterr().out
    assert (tmp_path / "out.json").stat().st_size > 0


def test_ensemble(tmp_path, capsys):
    found = ensemble.main(
        image_size=32,
        batch_size=2,
        loss_batch_size=16,
        repeats=2,
        learners=(2, 4),
        counted=("resnet18",),
        threads=torch.get_num_threads(),
        out=tmp_path / "out.json",
    )
    assert {(row["learners"], row["name"]) for row in found["trunks"]} == {
        (m, name) for m in (2, 4) for name in ("folded", "loop", "backbone alone")
    }
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found["trunks"] + found["losses"])
    counts = found["parameters"]["resnet18"]
    assert counts["shared attention trunk"] < counts["an attention trunk each"] < counts["separate networks"]
    assert "| M = 2 | folded |" in capsys.readouterr().out
    assert (tmp_path / "out.json").stat().st_size > 0


def test_ensemble_compares_the_same_embeddings():
    trunk = AttentionEnsemble.from_backbone("resnet18", None, 2, 8, input_size=(3, 32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ensemble.in_a_loop(trunk, images), trunk(images))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_refiner(tmp_path, capsys, monkeypatch):
    assert len(refiner.run_alone(["edges", 8, 3, 2, 1, "cpu"])["seconds"]) == 2
    monkeypatch.setattr(refiner, "run_alone", lambda args: refiner.measure(*args))
    monkeypatch.setattr(refiner, "EMBEDDING_SIZE", 16)
    threads = torch.get_num_threads()
    sizes = {"batch_sizes": (6,), "graph": (20, 3), "share": (4, 32)}
    found = refiner.main(**sizes, steps=2, rounds=1, threads=threads, out=tmp_path / "out.json")
    rows = {(row["nodes"], row["senders"], row["method"]) for row in found["results"]}
    assert rows == {(6, 6, method) for method in refiner.METHODS} | {(20, 3, "edges")}
    printed = capsys.readouterr().out
    assert "| 6 x 6 | dense |" in printed
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_distributed(tmp_path, capsys):
    """What is sent is what the arithmetic says."""
    found = distributed.main(sizes=(2_000,), losses=("ProxyAnchorLoss",), steps=1, out=tmp_path / "out.json")
    rows = {row["way"]: row for row in found["results"]}
    assert set(rows) == set(distributed.WAYS)
    assert rows["two ranks, classes split"]["bytes"] == distributed.expected_bytes("ProxyAnchorLoss")
    assert rows["one process"]["bytes"] == 0
    assert all(row["ms"] > 0 and row["peak_mb"] > 0 for row in rows.values())
    assert "| 512 | 0.16 | 67.1 |" in capsys.readouterr().out
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


def retrieval_job(toy, path, row, seed=0, validation=False, epochs=2, **settings):
    job = {"row": row, "data": str(toy), "class_embeddings": None, "epochs": epochs, "validation": validation}
    return retrieval.run(job | {"seed": seed, "settings": TINY_SETTINGS | settings, "tuned": {}, "path": str(path)})


@pytest.mark.parametrize("row", retrieval.ROWS)
def test_every_row_trains_and_is_reproduced(row, toy, tmp_path):
    entries = []
    for name in ("a.json", "b.json"):
        retrieval_job(toy, tmp_path / name, row)
        entries.append(json.loads((tmp_path / name).read_text()))
        assert entries[-1].pop("seconds") > 0 and entries[-1].pop("peak_memory_mb") > 0
    found, again = entries
    assert found == again
    assert found["images_seen"] == 2 * 48 and len(found["loss"]) == 2
    assert len(found["metrics"]) == 2 + ("refiner" in row) and {"", " + mean of 8 neighbours"} <= set(found["metrics"])
    assert all(0 <= value <= 100 for metrics in found["metrics"].values() for value in metrics.values())


def test_all_rows_have_four_trials_with_settings_they_know():
    for name, row in retrieval.ROWS.items():
        trials = row.trials()
        assert len(trials) == 4 and len({json.dumps(trial) for trial in trials}) == 4, name
        assert not set(row.settings) & set(trials[0]), name  # a trial must not undo what makes the row


def test_tuning_does_not_look_at_test_classes(toy, tmp_path):
    arrays = dict(np.load(toy))
    arrays["images"][arrays["split"] == "test"] = 0
    np.savez(tmp_path / "toy2.npz", **arrays)
    both = []
    for number, path in enumerate((toy, tmp_path / "toy2.npz")):
        found = retrieval_job(path, tmp_path / f"{number}.json", "proxy_anchor", validation=True)
        both.append((found["metrics"], found["loss"]))
    assert both[0] == both[1]
    changed = [
        retrieval_job(path, tmp_path / f"t{number}.json", "proxy_anchor")["metrics"]
        for number, path in enumerate((toy, tmp_path / "toy2.npz"))
    ]
    assert changed[0] != changed[1]


def test_shuffled_class_embeddings_are_those_of_other_classes(toy, tmp_path, monkeypatch):
    rows, seen = np.load(toy)["class_embeddings"][:8], []
    make = retrieval.recipe

    def spy(*args, class_embeddings=None, **kwargs):
        seen.append(class_embeddings)
        return make(*args, class_embeddings=class_embeddings, **kwargs)

    monkeypatch.setattr(retrieval, "recipe", spy)
    for row in ("margin from distance", "margin from shuffled distance"):
        retrieval_job(toy, tmp_path / f"{len(seen)}.json", row, epochs=1)
    given, shuffled = seen
    assert np.array_equal(given, rows)
    assert sorted(shuffled.tolist()) == sorted(rows.tolist()) and (shuffled.numpy() != rows).any(1).all()


def test_retrieval_is_tuned_resumed_and_shown(toy, tmp_path, capsys):
    out, rows = tmp_path / "out", ["proxy_anchor", "cosface"]
    common = {"data": str(toy), "budget": "epochs:1", "out": out, "settings": TINY_ROWS, "jobs": 2}
    for row in rows:  # three of four trials are there already
        for number in range(1, 4):
            path = out / "toy" / "tuning" / row / f"trial-{number}.json"
            trial = retrieval.ROWS[row].trials()[number]
            fake = {"metrics": {"": {retrieval.TUNED_FOR: 0.0}}, "settings": TINY_SETTINGS | trial, "trial": trial}
            fake |= {"epochs": 1, "validation": True}
            retrieval.write(path, fake)
    retrieval.main(recipes=rows, tune=True, seeds=(0,), **common)
    chosen = json.loads((out / "toy" / "tuning" / "cosface" / "trial-0.json").read_text())
    assert chosen["validation"] and chosen["metrics"][""][retrieval.TUNED_FOR] > 0
    seed0 = out / "toy" / "cosface" / "seed-0.json"
    metrics = dict.fromkeys(retrieval.METRICS, 50.0)
    entry = {"data": "toy", "seed": 0, "metrics": {"": metrics}, "epochs": 1, "tuned": chosen["trial"]}
    entry["validation"] = False
    entry["settings"] = TINY_SETTINGS | chosen["trial"]
    retrieval.write(seed0, entry | {"row": "cosface"})
    retrieval.write(out / "toy" / "proxy_anchor" / "seed-0.json", entry | {"row": "proxy_anchor"})
    with pytest.raises(SystemExit, match=r"seed-0.json is a run with epochs = 1, got 2: choose another --out"):
        retrieval.main(recipes=["cosface"], seeds=(0,), **(common | {"budget": "epochs:2"}))
    with pytest.raises(SystemExit, match=r"seed-0.json is a run with width = 4, got 8: choose another --out"):
        retrieval.main(recipes=["cosface"], seeds=(0,), **(common | {"settings": (*TINY_ROWS, "width=8")}))
    with pytest.raises(SystemExit, match=r"seed-0.json is a run with validation = False, got True: choose another"):
        retrieval.main(recipes=["cosface"], seeds=(0,), validation=True, **common)
    retrieval.main(recipes=["cosface"], seeds=(0, 1), baseline="proxy_anchor", **common)
    assert json.loads(seed0.read_text())["metrics"][""] == metrics  # a finished run is not repeated
    new = json.loads((out / "toy" / "cosface" / "seed-1.json").read_text())
    assert {name: new["settings"][name] for name in ("lr", "margin")} == chosen["trial"]
    assert not new["validation"] and new["tuned_on"] == "toy" and new["tuned"] == chosen["trial"]
    mean = (50.0 + new["metrics"][""]["precision_at_1"]) / 2
    capsys.readouterr()
    retrieval.main(out=out, show_only=True, baseline="proxy_anchor", plot=tmp_path / "plot.png")
    table = capsys.readouterr().out
    (line,) = (line for line in table.splitlines() if line.startswith("| cosface"))
    assert line.split("|")[2].strip() == "2" and line.split("|")[3].split()[0] == f"{mean:.1f}"
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert f"lr {chosen['trial']['lr']:g}, margin {chosen['trial']['margin']:g}" in line
    with pytest.raises(SystemExit, match=r"must have 4 trials of 'triplet' under .*, got 0"):
        retrieval.main(recipes=["triplet"], **common)
    (out / "toy" / "tuning" / "cosface" / "trial-2.json").unlink()
    with pytest.raises(SystemExit, match=r"must have 4 trials of 'cosface' under .*, got 3"):
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
    common = {"budget": "epochs:1", "out": tmp_path, "settings": TINY_ROWS, "untuned": True}
    asked = {"data": str(toy), "recipes": ["cosface:lr=0.003,epochs=3"], "seeds": (1,), "validation": True}
    retrieval.main(**asked, **common)
    table = capsys.readouterr().out
    assert "\ntoy, validation classes: percent" in table and "differences" not in table
    (path,) = tmp_path.glob("*/*/seed-1.json")
    found, written = json.loads(path.read_text()), path.stat().st_mtime_ns
    retrieval.main(**asked, **common)
    assert path.stat().st_mtime_ns == written  # a finished run is not repeated
    with pytest.raises(SystemExit, match="--validation must not be given with --tune"):
        retrieval.main(**asked, tune=True, **common)
    other = asked | common | {"out": tmp_path / "other", "budget": "epochs:3", "recipes": ["cosface:lr=0.003"]}
    retrieval.main(**other)
    (path,) = other["out"].glob("*/*/seed-1.json")
    again = json.loads(path.read_text())
    assert found["validation"] and again["validation"] and found["metrics"] == again["metrics"]
    assert found["images_seen"] == again["images_seen"] and len(found["loss"]) == found["epochs"] == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_the_process_that_is_killed():
    code = "import time, multiprocessing as m\nfrom benchmarks.retrieval import quiet\n"
    code += "if __name__ == '__main__':\n pool = m.get_context('spawn').Pool(1, initializer=quiet)\n"
    code += " pool.apply(time.sleep, (0,))\n print(pool._pool[0].pid, flush=True)\n pool.apply(time.sleep, (60,))"
    root = Path(retrieval.__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as asking:
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
    metric = retrieval.TUNED_FOR
    row, baseline = ({seed: {metric: x} for seed, x in enumerate(values)} for values in ((3, 5, 9), (1, 4, 6)))
    mean, half = retrieval.difference(row | {7: {metric: 99}}, baseline, metric)
    assert mean == pytest.approx(2)  # of 2, 1, 3
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # t of 97.5% and 2 degrees of freedom, deviation 1
    assert retrieval.difference({0: {metric: 1}}, baseline, metric) is None


def test_rows_of_recipes_with_settings():
    row = retrieval.row_of("mhgl:attention=printed,proxy_weight=0.1,pretrained=False")
    assert (row.recipe, row.settings) == ("mhgl", {"attention": "printed", "proxy_weight": 0.1, "pretrained": False})
    assert len({json.dumps(trial) for trial in row.trials()}) == 4 and row.class_embeddings is None
    assert retrieval.row_of("combined:proxy_loss=adaptive_margin").class_embeddings == "given"


def test_questions_compare_rows_that_exist():
    for pairs in retrieval.QUESTIONS.values():
        for name in (name for pair in pairs for name in pair):
            row, _, later = name.partition(" + ")
            assert row in retrieval.ROWS and later in ("", "refinement at test time", "mean of 8 neighbours")


def test_tables_of_the_docs_are_those_of_the_results(capsys):
    """Each number comes from a committed JSON, under the data set's heading, and each row of the results is there."""
    root = Path(retrieval.__file__).parent
    shown, data = {}, None
    folders = [root / "results" / name for name in ("retrieval", "retrieval_validation")]
    for folder in folders:
        retrieval.main(out=folder, show_only=True)
    for line in capsys.readouterr().out.splitlines():
        data = line.split(":")[0] if line.endswith((" interval", " points")) else data
        if line.startswith("| "):
            shown.setdefault(data, []).append(line)
    page = (root.parent / "docs" / "retrieval.md").read_text()
    headed = re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    sections = {title.lower().replace("-", ""): text for title, text in headed}
    assert len(shown) == sum(len(list(folder.iterdir())) for folder in folders)
    for data, lines in shown.items():
        assert len(lines) > (8 if "validation" in data else 20)
        assert [line for line in sections[data].splitlines() if line.startswith("| ")] == lines


def test_table_of_the_readme_is_that_of_the_results():
    root = Path(retrieval.__file__).parent
    results = retrieval.collect(root / "results" / "retrieval")["omniglot"]
    page = (root.parent / "README.md").read_text().split("| row | P@1 | MAP@R |")[1]
    table = [[cell.strip() for cell in line.split("|")][1:-1] for line in page.splitlines() if line.startswith("| ")]
    table = [line for line in table if line[0] in retrieval.ROWS]
    assert len(table) >= 4
    for row, *cells in table:
        for cell, metric in zip(cells, retrieval.COMPARED, strict=True):
            values = [seed[metric] for seed in results[row].values()]
            assert len(values) == 5 and cell == f"{np.mean(values):.1f} ({np.std(values, ddof=1):.1f})"


@pytest.mark.parametrize("row", [*retrieval_causes.MEASURED, "mhgl, normalized attention", "hybrid, two levels"])
def test_causes_are_measured(row, toy):
    job = {"row": row, "data": str(toy), "class_embeddings": None, "epochs": 2, "validation": False, "seed": 0}
    name, seed, found = retrieval_causes.measure(job | {"settings": TINY_SETTINGS})
    assert (name, seed) == (row, 0)
    assert all(np.isfinite(value) for value in found.values())
    assert all(0 <= value <= 100 for what, value in found.items() if "percent" in what and "added" not in what)
    if row == "no margin":
        assert found["margins, mean"] == found["margins, standard deviation"] == 0
    if row == "margin from distance":
        assert found["margins, mean"] > 0 and found["margins, standard deviation"] > 0
    if row == "mhgl":
        assert found["local: added, of the map's norm, percent"] > 0
        assert 0 < found["global: entropy of the attention, percent of the largest"] <= 100
    if row.startswith("refiner"):  # 4 classes x 3 samples
        assert found["that share of the batch, percent"] == pytest.approx(100 * 2 / 12, abs=1e-3)


def test_mean_cosine():
    assert retrieval_causes.mean_cosine(torch.zeros(3, 2)) == 0
    rows = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert retrieval_causes.mean_cosine(rows).item() == pytest.approx(2 * 0.5**0.5 / 3)  # of 0, and twice 45 degrees


def test_gradients_reach_other_samples_by_messages_only():
    from pml_ext.losses import IntraBatchLoss
    from pml_ext.recipes.intra_batch import SilentRefiner

    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 6), torch.arange(8) // 2
    silent = IntraBatchLoss(4, 6, refiner=SilentRefiner(6)).eval()
    own, others = retrieval_causes.gradient_shares(silent, embeddings, labels, samples=8)
    assert own > 0 and others == 0
    own, others = retrieval_causes.gradient_shares(IntraBatchLoss(4, 6).eval(), embeddings, labels, samples=8)
    assert own > 0 and others > 0


def test_table_of_causes_in_the_docs_is_that_of_the_results(capsys):
    root = Path(retrieval.__file__).parent
    retrieval_causes.show(root / "results" / "retrieval_causes")
    tables = re.findall(r"\n\w+: mean .*\n\n((?:\| .*\n)+)", capsys.readouterr().out)
    page = (root.parent / "docs" / "retrieval.md").read_text()
    assert len(tables) == 2 and all(len(table.splitlines()) > 20 and table in page for table in tables)


def test_causes_are_written_and_shown(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(retrieval_causes, "tuned_settings", lambda results, data, row: {"lr": 0.003})
    options = {"data": str(toy), "seeds": (0,), "budget": "epochs:1", "jobs": 1, "results": tmp_path}
    options |= {"out": tmp_path, "tuned_on": None, "class_embeddings": None, "settings": TINY_ROWS}
    options["rows"] = ("4 heads", "mhgl:levels=global")
    retrieval_causes.main(**options, show_only=False)
    table = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "toy-1.json").read_text())["rows"]["4 heads"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["4 heads", "MAP@R of all", f"{found['MAP@R of all']:.1f} (0.0)"] in cells and found["MAP@R of all"] > 0
    assert sum(line[:1] == ["mhgl:levels=global"] for line in cells) == 6
    retrieval_causes.main(**(options | {"rows": ("mhgl:levels=global,attention=none",)}), show_only=False)
    longer, written = capsys.readouterr().out, (tmp_path / "toy-1.json").read_text()
    assert len(longer.splitlines()) == len(table.splitlines()) + 2  # beside what was there
    for other, message in (
        ({"seeds": (1,)}, r"toy-1.json has seeds = \[0\], got \[1\]: choose another --out"),
        ({"rows": ("4 heads", "cosface")}, "--rows must be of the recipes mhgl, .*, got 'cosface'"),
        (
            {"rows": ("smoothed cross-entropy",)},
            "--rows must have a refiner to look into, got 'smoothed cross-entropy'",
        ),
        ({"rows": ("mhgl:epochs=2",)}, "--rows must not set epochs, which --budget does, got 'mhgl:epochs=2'"),
    ):
        with pytest.raises(SystemExit, match=message):
            retrieval_causes.main(**(options | other), show_only=False)
    assert (tmp_path / "toy-1.json").read_text() == written
    retrieval_causes.main(**options, show_only=True)
    assert capsys.readouterr().out == longer
    with pytest.raises(SystemExit, match="--data must be given"):
        retrieval_causes.main(**(options | {"data": None}), show_only=False)
