"""What is each method worth? Zero-shot retrieval, same network, batches, images and evaluation for all rows.

python benchmarks/retrieval.py --data omniglot.npz --tune --jobs 2 --out DIR      four trials a row, validation classes
python benchmarks/retrieval.py --data omniglot.npz --seeds 0 1 2 3 4 --jobs 2 --out DIR      the runs and the tables
python benchmarks/retrieval.py --data cifar100.npz --tuned-on omniglot ...      with what was chosen on another data set
python benchmarks/retrieval.py --data glyphs --validation --untuned ...      compared before the test
python benchmarks/retrieval.py --show --out DIR      the tables alone

A finished run is not repeated: each is a line under --out of DATA-tuning.jsonl, DATA-test.jsonl or
DATA-validation.jsonl. ``--recipes`` takes rows of retrieval_rows.py, or a recipe with settings of yours:
"mhgl:attention=printed,proxy_weight=0.1,epochs=60". retrieval_tables.py writes the tables into the documentation.
"""

import platform
import random
import resource
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import run_files
import torch
from harness import in_processes, make_parser
from retrieval_rows import ROWS, row_of, value_of
from retrieval_tables import BASELINE, METRICS, TUNED_FOR, draw, show, tables_of_rows
from torch import nn

from pml_ext import class_embeddings
from pml_ext.datasets import open_data
from pml_ext.neighbors import neighbor_groups, refine_with_neighbors
from pml_ext.recipes import Trainer, embed, recipe, retrieval_metrics
from pml_ext.trunks import IntraBatchRefiner

VALIDATION_CLASSES = 0.25


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
    with attention_starts_with_similarity(row.similarity_gain):
        made = recipe(
            row.recipe,
            data.num_classes,
            class_embeddings=rows,
            in_channels=data.in_channels,
            **({"epochs": job["epochs"], "sampler": "MPerClassSampler"} | row.settings | settings),
        )
    data.train.transform, data.test.transform = made.transforms.train, made.transforms.test
    started = time.perf_counter()
    trainer = Trainer(made, data.train, autocast=torch.bfloat16, channels_last=True)
    trainer.train()
    return made, data, trainer, time.perf_counter() - started


@contextmanager
def attention_starts_with_similarity(gain):
    """Let refiners that are made here ``start_with_similarity``; with a gain of 0 as they are drawn.

    Right after a refiner has been drawn, not when all is made: a seed keeps drawing the same network behind it.
    """
    make = IntraBatchRefiner.__init__

    def make_and_start(self, *args, **kwargs):
        make(self, *args, **kwargs)
        start_with_similarity(self, gain)

    if gain:
        IntraBatchRefiner.__init__ = make_and_start
    try:
        yield
    finally:
        IntraBatchRefiner.__init__ = make


@torch.no_grad()
def start_with_similarity(refiner, gain):
    """Let the first layer's scores, in the mean over heads, start as ``gain`` times the cosine of two embeddings.

    As drawn otherwise they start near 0, so that a sample listens to all others alike.
    """
    width, attend = refiner.in_features // refiner.heads, refiner.layers[0].attend
    for linear, size in ((refiner.input, 1.0), (attend.query, (gain * refiner.heads * width**0.5) ** 0.5)):
        nn.init.orthogonal_(linear.weight, size)
        nn.init.zeros_(linear.bias)
    attend.key.load_state_dict(attend.query.state_dict())


def run(job):
    """Train and evaluate once; return the line of the file. A process of its own: memory is that of this run."""
    made, data, trainer, seconds = trained(job)
    device = next(made.trunk.parameters()).device
    embeddings, labels = embed(made.trunk, data.test, autocast=torch.bfloat16)
    searched = at_test_time(made, embeddings)
    line = job | {
        "data": Path(job["data"]).stem,
        "epochs": made.settings.epochs,
        "settings": dict(made.settings.items()),
        "metrics": {
            name: percent(retrieval_metrics(x, labels, metrics=tuple(METRICS))) for name, x in searched.items()
        },
        "images_seen": trainer.iterations_per_epoch * trainer.batch_size * made.settings.epochs,
        "loss": [round(entry["loss"], 4) for entry in trainer.history],
        "seconds": round(seconds, 2),
        "peak_memory_mb": peak_memory(device),
        "versions": {name: version(name) for name in ("torch", "pytorch-metric-learning", "timm", "pml-ext")},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if job["class_embeddings"] is not None:
        line["class_embeddings"] = Path(job["class_embeddings"]).name
    return line


def peak_memory(device):
    """Return the most memory of a device, or for the CPU of this process, in MB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def at_test_time(made, embeddings):
    """Return the embeddings, plain means of neighbours, and where there is a refiner, neighbours that it refines."""
    groups = neighbor_groups(embeddings, k1=30, size=8)
    searched = {"": embeddings, " + mean of 8 neighbours": nn.functional.normalize(embeddings[groups].mean(1))}
    if getattr(made.loss, "refiner", None) is not None:
        searched[" + refinement at test time"] = nn.functional.normalize(
            refine_with_neighbors(made.loss.refiner, embeddings, k1=30, size=8)
        )
    return searched


def percent(metrics):
    return {name: round(100 * float(metrics[name]), 3) for name in METRICS}


def tuned_settings(out, data, row):
    """Return the settings of the best trial on a data set's validation classes."""
    tried = run_files.read(run_files.path_of(out, data, "tuning"))
    wanted = row_of(row).trials()
    trials = [run for trial in wanted if (run := run_files.find(tried, row=row, trial=trial))]
    if len(trials) != len(wanted):
        raise SystemExit(
            f"--tuned-on {data} must have {len(wanted)} trials of {row!r} under {out}, got {len(trials)}: "
            "run --tune first, or give --untuned"
        )
    return max(trials, key=lambda trial: trial["metrics"][""][TUNED_FOR])["trial"]


def jobs_of(data, recipes, seeds, epochs, out, kind, tuned_on, embeddings, settings):
    """Return what is to be run."""
    jobs = []
    for row in recipes:
        if row_of(row).class_embeddings and embeddings is None:
            raise SystemExit(f"--class-embeddings must be given for the row {row!r}, got none")
        shared = {"row": row, "data": data, "class_embeddings": embeddings, "epochs": epochs}
        shared["validation"] = kind != "test"
        if kind == "tuning":
            for trial in row_of(row).trials():
                jobs.append(shared | {"seed": seeds[0], "settings": settings | trial, "trial": trial})
        else:
            chosen = tuned_settings(out, tuned_on, row) if tuned_on else {}
            for seed in seeds:
                own = {"seed": seed, "settings": settings | chosen, "tuned_on": tuned_on, "tuned": chosen}
                jobs.append(shared | own)
    return sorted(jobs, key=lambda job: job["seed"])  # all rows of one seed first: what is stopped can be compared


def is_done(job, runs, path):
    """Return whether a job is among the finished runs of a file; one of other settings stops everything."""
    which = ("row", "trial") if "trial" in job else ("row", "seed")
    run = run_files.find(runs, **{name: job[name] for name in which})
    if run is None:
        return False
    about = ("epochs", "validation", "seed")
    wanted = {name: job[name] for name in about} | row_of(job["row"]).settings | job["settings"]
    there = {name: run[name] for name in about} | run["settings"]
    for name, value in wanted.items():
        if there.get(name) != value:
            key = ", ".join(f"{part} {run[part]!r}" for part in which)
            raise SystemExit(
                f"{path}: {key} is a run with {name} = {there.get(name)}, got {value}: choose another --out"
            )
    return True


def described(line):
    return f"{line['row']}: MAP@R {line['metrics'][''][TUNED_FOR]:.1f}"


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
    baseline=BASELINE,
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
        kind = "tuning" if tune else "validation" if validation else "test"
        path = run_files.path_of(out, Path(data).stem, kind)
        finished = run_files.read(path)
        wanted = jobs_of(data, rows, seeds, int(number), out, kind, tuned_on, class_embeddings, given)
        todo = [job for job in wanted if not is_done(job, finished, path)]
        for line in in_processes(run, todo, jobs, described):
            run_files.append(path, line)
    show(tables_of_rows(out, baseline))
    if plot:
        draw(out, plot, "validation" if validation else "test")


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--data", help='"glyphs", a folder or an .npz, as pml_ext.datasets.open_data takes it')
    parser.add_argument("--recipes", nargs="+", help="rows; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default="epochs:40")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", default="benchmarks/results/retrieval")
    parser.add_argument("--tune", action="store_true", help="run the trials on validation classes instead")
    parser.add_argument("--validation", action="store_true", help="runs, but on validation classes")
    parser.add_argument("--tuned-on", help="name of the data set whose trials choose the settings; default: this one")
    parser.add_argument("--untuned", action="store_true", help="with the settings of the recipes instead")
    parser.add_argument("--class-embeddings", help='a file, "names" or "array:NAME"')
    parser.add_argument("--baseline", default=BASELINE)
    parser.add_argument("--settings", nargs="+", default=(), help="of all rows: image_size=28 ...")
    parser.add_argument("--plot", help="a picture of all runs on test classes, with --validation on those")
    parser.add_argument("--show", action="store_true", dest="show_only", help="train nothing")
    main(**vars(parser.parse_args()))
