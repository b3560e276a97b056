"""What is each method worth? Zero-shot retrieval, same network, batches, images and evaluation for all rows.

python benchmarks/retrieval.py --data omniglot.npz --tune --jobs 2 --out DIR      four trials a row, validation classes
python benchmarks/retrieval.py --data omniglot.npz --seeds 0 1 2 3 4 --jobs 2 --out DIR      the runs and the tables
python benchmarks/retrieval.py --data cifar100.npz --tuned-on omniglot ...      with what was chosen on another data set
python benchmarks/retrieval.py --data glyphs --validation --untuned --out OTHER ...     compared before the test
python benchmarks/retrieval.py --show --out DIR      the tables alone

A finished run is not repeated: each has a JSON file of its own under --out. ``--recipes`` takes rows of
ROWS below, or a recipe with settings of yours: "mhgl:attention=printed,proxy_weight=0.1,epochs=60".
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import threading
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

from pml_ext import class_embeddings
from pml_ext.datasets import open_data
from pml_ext.inference import neighbor_groups, refine_with_neighbors
from pml_ext.recipes import embed, recipe, retrieval_metrics

METRICS = {
    "precision_at_1": "P@1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "MAP@R",
    "NMI": "NMI",
}
COMPARED = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R"}
VALIDATION_CLASSES, TUNED_FOR = 0.25, "mean_average_precision_at_r"


class Row(NamedTuple):
    """A recipe, its settings, the values that are tried on validation classes, and its class embeddings.

    ``tuned``: two settings with two values each, four trials. ``class_embeddings``: None, "given", or "shuffled": those
    of other classes.
    """

    recipe: str
    settings: dict[str, Any]
    tuned: dict[str, tuple[Any, Any]]
    class_embeddings: str | None = None

    def trials(self) -> list[dict[str, Any]]:
        """Return the settings of the four trials."""
        return [dict(zip(self.tuned, values, strict=True)) for values in product(*self.tuned.values())]


_RATES = {"lr": (1e-3, 3e-3)}
_PLAIN = {"levels": "global", "attention": "none", "pool_type": "avg"}
_SOLAR = {"attention": "solar"}
_BASE = _RATES | {"base": (0.5, 1.0)}
_PROXY_WEIGHT = _RATES | {"proxy_weight": (0.03, 0.3)}
_DIVERGENCE = _RATES | {"divergence_weight": (0.1, 1.0)}
_TEMPERATURE = _RATES | {"temperature": (0.1, 0.3)}
_SCALE = {"scale": (16.0, 32.0)}
_MARGIN = _SCALE | {"margin_scale": (0.1, 0.3)}  # of the margin rows, all of which learn at lr 3e-3
_SOFT = {"scale": (4.0, 8.0)}  # below those of the other rows, all of which chose the smaller one
_SOFT_MARGIN = _SOFT | {"margin_scale": (0.3, 1.0)}
_TWELVE_BY_EIGHT = {"samples_per_class": 8}
_LEARNERS = {"num_learners": 4, "refined_weight": 0.0}

ROWS: dict[str, Row] = {
    "contrastive": Row("contrastive", {}, _RATES | {"neg_margin": (0.5, 1.0)}),
    "triplet": Row("triplet", {}, _RATES | {"margin": (0.1, 0.3)}),
    "multi_similarity": Row("multi_similarity", {}, _BASE),
    "proxy_anchor": Row("proxy_anchor", {}, _RATES | {"proxy_lr": (1e-2, 1e-1)}),
    "cosface": Row("cosface", {}, _RATES | {"margin": (0.2, 0.35)}),
    "normalized_softmax": Row("normalized_softmax", {}, _RATES | {"temperature": (0.05, 0.1)}),
    "cross_entropy": Row("cross_entropy", {}, _RATES | {"proxy_lr": (2e-3, 2e-2)}),
    "hybrid": Row("mhgl", _PLAIN, _PROXY_WEIGHT),
    "hybrid, light proxies": Row("mhgl", _PLAIN, _RATES | {"proxy_weight": (0.003, 0.01)}),
    "hybrid, avg+max": Row("mhgl", _PLAIN | {"pool_type": "avg+max"}, _PROXY_WEIGHT),
    "hybrid, avg+max, attention": Row("mhgl", {"levels": "global"} | _SOLAR, _PROXY_WEIGHT),
    "hybrid, two levels": Row("mhgl", {"attention": "none"}, _PROXY_WEIGHT),
    "mhgl": Row("mhgl", _SOLAR, _PROXY_WEIGHT),
    "mhgl, normalized attention": Row("mhgl", {"attention": "normalized"}, _PROXY_WEIGHT),
    "multi_similarity, width 74": Row("multi_similarity", {"width": 74}, _BASE),
    "4 heads": Row("attention_ensemble", {"masks": False, "divergence_weight": 0.0}, _BASE),
    "4 heads, divergence": Row("attention_ensemble", {"masks": False}, _DIVERGENCE),
    "4 learners": Row("attention_ensemble", {"divergence_weight": 0.0}, _BASE),
    "4 learners, divergence": Row("attention_ensemble", {}, _DIVERGENCE),
    "smoothed cross-entropy": Row("intra_batch", {"refined_weight": 0.0}, _TEMPERATURE),
    "refiner without messages": Row("intra_batch", {"messages": False}, _TEMPERATURE),
    "refiner": Row("intra_batch", {}, _TEMPERATURE),
    "refiner, starts with similarity": Row("intra_batch", {"similarity_gain": 10.0}, _TEMPERATURE),
    "smoothed cross-entropy, 12 x 8": Row("intra_batch", {"refined_weight": 0.0} | _TWELVE_BY_EIGHT, _TEMPERATURE),
    "refiner without messages, 12 x 8": Row("intra_batch", {"messages": False} | _TWELVE_BY_EIGHT, _TEMPERATURE),
    "refiner, 12 x 8": Row("intra_batch", _TWELVE_BY_EIGHT, _TEMPERATURE),
    "no margin": Row("adaptive_margin", {"margin_scale": 0.0}, _RATES | _SCALE),
    "constant margin": Row("adaptive_margin", {"margin_scale": 0.0, "lr": 3e-3}, _SCALE | {"base_margin": (0.1, 0.3)}),
    "margin from distance": Row("adaptive_margin", {"lr": 3e-3}, _MARGIN, "given"),
    "margin from similarity": Row("adaptive_margin", {"lr": 3e-3, "direction": "similarity"}, _MARGIN, "given"),
    "margin from shuffled distance": Row("adaptive_margin", {"lr": 3e-3}, _MARGIN, "shuffled"),
    "no margin, soft": Row("adaptive_margin", {"margin_scale": 0.0}, _RATES | _SOFT),
    "constant margin, soft": Row(
        "adaptive_margin", {"margin_scale": 0.0, "lr": 3e-3}, _SOFT | {"base_margin": (0.3, 1.0)}
    ),
    "margin from distance, soft": Row("adaptive_margin", {"lr": 3e-3}, _SOFT_MARGIN, "given"),
    "margin from similarity, soft": Row(
        "adaptive_margin", {"lr": 3e-3, "direction": "similarity"}, _SOFT_MARGIN, "given"
    ),
    "margin from shuffled distance, soft": Row("adaptive_margin", {"lr": 3e-3}, _SOFT_MARGIN, "shuffled"),
    "hybrid, 4 learners": Row("combined", _LEARNERS, _DIVERGENCE),
    "hybrid, refiner": Row("combined", {}, _RATES | {"refined_weight": (0.1, 1.0)}),
    "hybrid with margins, 4 learners, refiner": Row(
        "combined",
        {"num_learners": 4, "proxy_loss": "adaptive_margin", "divergence_weight": 0.1, "lr": 3e-3},
        {"proxy_weight": (0.03, 0.3), "refined_weight": (0.1, 1.0)},
        "given",
    ),
}

QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "pairs and proxies": [
        ("hybrid", "multi_similarity"),
        ("hybrid", "proxy_anchor"),
        ("hybrid, light proxies", "hybrid"),
        ("hybrid, light proxies", "multi_similarity"),
    ],
    "global and local heads, attention": [
        ("hybrid, avg+max", "hybrid"),
        ("hybrid, avg+max, attention", "hybrid, avg+max"),
        ("hybrid, two levels", "hybrid, avg+max"),
        ("mhgl", "hybrid, two levels"),
        ("mhgl", "hybrid"),
        ("mhgl, normalized attention", "mhgl"),
        ("mhgl, normalized attention", "hybrid, two levels"),
        ("mhgl, normalized attention", "hybrid"),
    ],
    "ensembles": [
        ("4 heads", "multi_similarity"),
        ("4 heads, divergence", "4 heads"),
        ("4 learners", "4 heads"),
        ("4 learners, divergence", "4 learners"),
        ("4 learners, divergence", "multi_similarity"),
        ("multi_similarity, width 74", "multi_similarity"),
        ("4 learners, divergence", "multi_similarity, width 74"),
    ],
    "messages": [
        ("refiner without messages", "smoothed cross-entropy"),
        ("refiner", "refiner without messages"),
        ("refiner", "smoothed cross-entropy"),
        ("refiner, starts with similarity", "refiner without messages"),
        ("refiner + refinement at test time", "refiner"),
        ("refiner + mean of 8 neighbours", "refiner"),
        ("refiner, 12 x 8", "refiner without messages, 12 x 8"),
        ("refiner, 12 x 8", "smoothed cross-entropy, 12 x 8"),
        ("multi_similarity + mean of 8 neighbours", "multi_similarity"),
    ],
    "margins": [
        ("constant margin", "no margin"),
        ("margin from distance", "constant margin"),
        ("margin from similarity", "constant margin"),
        ("margin from distance", "margin from shuffled distance"),
        ("no margin, soft", "no margin"),
        ("constant margin, soft", "no margin, soft"),
        ("margin from distance, soft", "constant margin, soft"),
        ("margin from similarity, soft", "constant margin, soft"),
        ("margin from distance, soft", "margin from shuffled distance, soft"),
    ],
    "combinations": [
        ("hybrid, refiner", "hybrid"),
        ("hybrid, 4 learners", "4 learners, divergence"),
        ("hybrid with margins, 4 learners, refiner", "hybrid, 4 learners"),
    ],
}
"""What is compared with what: a row and its baseline, which it shares all else with."""


def row_of(spec):
    """Return a row by its name, or one of "recipe:setting=value,..."."""
    if spec in ROWS:
        return ROWS[spec]
    name, _, settings = spec.partition(":")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    given = {key: value_of(value) for key, _, value in pairs}
    tuned = {key: values for key, values in (_RATES | {"weight_decay": (1e-4, 1e-2)}).items() if key not in given}
    return Row(name, given, tuned, "given" if "adaptive_margin" in spec else None)


def value_of(text):
    """Return a number, True, False or None where the text is one, else the text."""
    try:
        return json.loads(text.replace("True", "true").replace("False", "false").replace("None", "null"))
    except json.JSONDecodeError:
        return text


def load(source, embeddings):
    """Return the data; ``embeddings``: a file, "names" of classes, or "array:NAME", class means of such an array."""
    if embeddings == "names":
        data = open_data(source)
        rows = class_embeddings.from_text(data.train.class_names, model="tfidf")
        return open_data(source, class_embeddings=rows)
    if embeddings is not None and embeddings.startswith("array:"):
        arrays = np.load(source)
        features = torch.from_numpy(arrays[embeddings.removeprefix("array:")]).float()
        rows = class_embeddings.from_samples(features, torch.from_numpy(arrays["labels"]))
        return open_data(source, class_embeddings=rows)
    return open_data(source, class_embeddings=embeddings)


def trained(job):
    """Train once; return the recipe, the data, the trainer, and the seconds that it took."""
    row, seed, settings = row_of(job["row"]), job["seed"], job["settings"]
    torch.set_num_threads(1)
    data = load(job["data"], job["class_embeddings"])
    if job["validation"]:
        data = data.hold_out(VALIDATION_CLASSES, seed)
    for seeded in (torch.manual_seed, np.random.seed, random.seed):  # before the network is made
        seeded(seed)
    rows = data.class_embeddings if row.class_embeddings else None
    if row.class_embeddings and rows is None:
        raise ValueError(f"--class-embeddings must be given for the row {job['row']!r}, got none")
    if row.class_embeddings == "shuffled":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows[order[order.argsort().add(1) % len(rows)]]  # a cycle in random order: no class keeps its own
    made = recipe(
        row.recipe,
        data.num_classes,
        class_embeddings=rows,
        in_channels=data.in_channels,
        **({"epochs": job["epochs"]} | row.settings | settings),
    )
    data.train.transform, data.test.transform = made.transforms.train, made.transforms.test
    started = time.perf_counter()
    trainer = made.trainer(data.train, autocast=torch.bfloat16, channels_last=True)
    trainer.train()
    return made, data, trainer, time.perf_counter() - started


def run(job):
    """Train and evaluate once; write and return what was found. A process of its own: memory is that of this run."""
    made, data, trainer, seconds = trained(job)
    device = next(made.trunk.parameters()).device
    embeddings, labels = embed(made.trunk, data.test, autocast=torch.bfloat16)
    found = {
        name: percent(retrieval_metrics(x, labels, metrics=tuple(METRICS)))
        for name, x in at_test_time(made, embeddings).items()
    }
    found = job | {
        "epochs": made.settings.epochs,
        "settings": dict(made.settings.items()),
        "metrics": found,
        "images_seen": trainer.iterations_per_epoch * trainer.batch_size * made.settings.epochs,
        "loss": [round(entry["loss"], 4) for entry in trainer.history],
        "seconds": round(seconds, 2),
        "peak_memory_mb": peak_memory(device),
        "versions": {name: version(name) for name in ("torch", "pytorch-metric-learning", "timm", "pml-ext")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    found["data"] = Path(job["data"]).stem
    if job["class_embeddings"] is not None:
        found["class_embeddings"] = Path(job["class_embeddings"]).name
    write(Path(job["path"]), {name: value for name, value in found.items() if name != "path"})
    return found


def peak_memory(device):
    """Return the most memory of a device, or for the CPU of this process, in MB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def at_test_time(made, embeddings):
    """Return the embeddings, plain means of neighbours, and where there is a refiner, neighbours that it refines."""
    groups = neighbor_groups(embeddings, k1=30, size=8)
    found = {"": embeddings, " + mean of 8 neighbours": nn.functional.normalize(embeddings[groups].mean(1))}
    if getattr(made.loss, "refiner", None) is not None:
        found[" + refinement at test time"] = nn.functional.normalize(
            refine_with_neighbors(made.loss.refiner, embeddings, k1=30, size=8)
        )
    return found


def percent(metrics):
    return {name: round(100 * float(metrics[name]), 3) for name in METRICS}


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    new.replace(path)


def tuned_settings(out, data, row):
    """Return the settings of the best trial on a data set's validation classes."""
    paths = sorted((out / data / "tuning" / folder(row)).glob("trial-*.json"))
    if len(paths) != len(row_of(row).trials()):
        raise SystemExit(
            f"--tuned-on {data} must have {len(row_of(row).trials())} trials of {row!r} under {out}, got {len(paths)}: "
            "run --tune first, or give --untuned"
        )
    best = max((json.loads(path.read_text()) for path in paths), key=lambda trial: trial["metrics"][""][TUNED_FOR])
    return best["trial"]


def folder(row):
    return row.replace(" ", "-").replace(",", "").replace("+", "-and-").replace(":", "_").replace("=", "-")


def jobs_of(data, recipes, seeds, epochs, out, tune, validation, tuned_on, embeddings, settings):
    """Return what is to be run and has not been."""
    name, found = Path(data).stem, []
    for row in recipes:
        if row_of(row).class_embeddings and embeddings is None:
            raise SystemExit(f"--class-embeddings must be given for the row {row!r}, got none")
        shared = {"row": row, "data": data, "class_embeddings": embeddings, "epochs": epochs}
        shared["validation"] = tune or validation
        if tune:
            for number, trial in enumerate(row_of(row).trials()):
                path = out / name / "tuning" / folder(row) / f"trial-{number}.json"
                own = {"seed": seeds[0], "settings": settings | trial, "trial": trial, "path": str(path)}
                found.append(shared | own)
        else:
            chosen = tuned_settings(out, tuned_on, row) if tuned_on else {}
            for seed in seeds:
                path = out / name / folder(row) / f"seed-{seed}.json"
                own = {"seed": seed, "settings": settings | chosen, "tuned_on": tuned_on, "tuned": chosen}
                found.append(shared | own | {"path": str(path)})
    found.sort(key=lambda job: job["seed"])  # all rows of one seed first: what is stopped can be compared
    return [job for job in found if not is_done(job)]


def is_done(job):
    """Return whether a run has a file; one of another run stops everything."""
    path = Path(job["path"])
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    wanted = {"epochs": job["epochs"], "validation": job["validation"]} | row_of(job["row"]).settings | job["settings"]
    there = {"epochs": found["epochs"], "validation": found["validation"]} | found["settings"]
    for name, value in wanted.items():
        if there.get(name) != value:
            raise SystemExit(f"{path} is a run with {name} = {there.get(name)}, got {value}: choose another --out")
    return True


def work(jobs, processes):
    """Run all, each in a process of its own, and show how far it is."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(processes, initializer=quiet, maxtasksperchild=1) as pool,
        tqdm(total=len(jobs), unit="run") as bar,
    ):
        for found in pool.imap_unordered(run, jobs, chunksize=1):
            bar.set_postfix_str(f"{found['row']}: MAP@R {found['metrics'][''][TUNED_FOR]:.1f}")
            bar.update()


def quiet():
    """Keep the progress bars of the runs from the screen, and end with the process that asked for them."""
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def end_with(process):
    process.join()
    os._exit(1)


def collect(out):
    """Return data set -> row -> seed -> run, a run being metrics, and the settings that were chosen for it.

    Of what is computed from a row's embeddings only what a question names.
    """
    found, asked = {}, {row for pairs in QUESTIONS.values() for pair in pairs for row in pair}
    for path in sorted(out.glob("*/*/seed-*.json")):
        run_ = json.loads(path.read_text())
        chosen = {name: run_["settings"][name] for name in ("lr", *run_["tuned"])}
        for suffix, metrics in run_["metrics"].items():
            if suffix and run_["row"] + suffix not in asked:
                continue
            rows = found.setdefault(run_["data"] + run_["validation"] * ", validation classes", {})
            rows.setdefault(run_["row"] + suffix, {})[run_["seed"]] = metrics | {"chosen": chosen}
    names = list(ROWS)

    def place(row):
        name = row.split(" + ")[0]
        return names.index(name) if name in names else len(names)

    return {data: dict(sorted(rows.items(), key=lambda item: place(item[0]))) for data, rows in found.items()}


def difference(row, baseline, metric):
    """Return mean and half width of the 95% interval of the difference, paired by seed; None for fewer than two."""
    seeds = sorted(set(row) & set(baseline))
    if len(seeds) < 2:
        return None
    gaps = np.array([row[seed][metric] - baseline[seed][metric] for seed in seeds])
    return gaps.mean(), stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5


def show(out, baseline):
    """Print a table for each data set."""
    for data, rows in collect(out).items():
        print(f"\n{data}: percent, mean (standard deviation) over seeds; difference to {baseline}: 95% interval\n")
        titles = ["row", "seeds", *METRICS.values(), "MAP@R, difference", "chosen"]
        lines = []
        for row, seeds in rows.items():
            cells = [row, str(len(seeds))]
            for metric in METRICS:
                values = [found[metric] for found in seeds.values()]
                cells.append(f"{np.mean(values):.1f} ({np.std(values, ddof=min(1, len(values) - 1)):.1f})")
            gap = difference(seeds, rows.get(baseline, {}), TUNED_FOR) if row != baseline else None
            cells.append("" if gap is None else f"{gap[0]:+.1f} ± {gap[1]:.1f}")
            chosen = next(iter(seeds.values()))["chosen"]
            cells.append("" if " + " in row else ", ".join(f"{name} {value:g}" for name, value in chosen.items()))
            lines.append(cells)
        print_table(titles, lines)
        lines = []
        for question, pairs in QUESTIONS.items():
            for row, other in pairs:
                gaps = [difference(rows.get(row, {}), rows.get(other, {}), metric) for metric in COMPARED]
                if None not in gaps:
                    lines.append([question, row, other, *(f"{gap[0]:+.1f} ± {gap[1]:.1f}" for gap in gaps)])
        if lines:
            print(f"\n{data}: differences, mean and 95% interval over seeds, in percent points\n")
            print_table(["question", "row", "less", *COMPARED.values()], lines)


def print_table(titles, lines):
    """Print a table that Markdown and people can read."""
    widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
    for line in [titles, ["-" * width for width in widths], *lines]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def draw(out, path):
    """Draw MAP@R of every run, a panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = collect(out)
    if not found:
        raise SystemExit(f"--plot needs finished runs, got none under {out}")
    most = max(len(rows) for rows in found.values())
    figure, axes = plt.subplots(
        1, len(found), figsize=(8 * len(found), 0.22 * most + 1.2), layout="constrained", squeeze=False
    )
    for axis, (data, rows) in zip(axes[0], found.items(), strict=True):
        for place, seeds in enumerate(rows.values()):
            values = [one[TUNED_FOR] for one in seeds.values()]
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6, markersize=4)
            axis.plot([np.mean(values)], [place], "k|", markersize=14)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{data}: one dot a seed, |: mean")
        axis.set_xlabel("MAP@R on unseen classes, percent")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    data=None,
    recipes=None,
    seeds=(0, 1, 2, 3, 4),
    budget="epochs:40",
    jobs=1,
    out="benchmarks/results/retrieval",
    tune=False,
    validation=False,
    tuned_on=None,
    untuned=False,
    class_embeddings=None,
    baseline="multi_similarity",
    settings=(),
    plot=None,
    show_only=False,
):
    """Run what has not been run, and print the tables of all that has."""
    out = Path(out)
    kind, _, number = budget.partition(":")
    if kind != "epochs" or not number.isdigit():
        raise SystemExit(f"--budget must be epochs:N, got {budget!r}")
    if tune and validation:
        raise SystemExit("--validation must not be given with --tune, whose trials look at validation classes anyway")
    if not show_only:
        if data is None:
            raise SystemExit("--data must be given, got none")
        tuned_on = None if untuned else tuned_on or Path(data).stem
        given = {key: value_of(value) for key, _, value in (pair.partition("=") for pair in settings)}
        rows = list(ROWS) if recipes is None else list(recipes)
        todo = jobs_of(data, rows, seeds, int(number), out, tune, validation, tuned_on, class_embeddings, given)
        work(todo, jobs)
    show(out, baseline)
    if plot:
        draw(out, plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help='"glyphs", a folder or an .npz, as pml_ext.datasets.open_data takes it')
    parser.add_argument("--recipes", nargs="+", help="rows; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default="epochs:40")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", default="benchmarks/results/retrieval")
    parser.add_argument("--tune", action="store_true", help="run the trials on validation classes instead")
    parser.add_argument("--validation", action="store_true", help="runs, but on validation classes; --out of their own")
    parser.add_argument("--tuned-on", help="name of the data set whose trials choose the settings; default: this one")
    parser.add_argument("--untuned", action="store_true", help="with the settings of the recipes instead")
    parser.add_argument("--class-embeddings", help='a file, "names" or "array:NAME"')
    parser.add_argument("--baseline", default="multi_similarity")
    parser.add_argument("--settings", nargs="+", default=(), help="of all rows: image_size=28 ...")
    parser.add_argument("--plot", help="a picture of all runs")
    parser.add_argument("--show", action="store_true", dest="show_only", help="train nothing")
    main(**vars(parser.parse_args()))
