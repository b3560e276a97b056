"""What is each method worth behind a pretrained network, on photographs? Zero-shot retrieval, all else the same.

python benchmarks/finetuning.py --data data/cars196 --tune --jobs 2      the trials, on validation classes
python benchmarks/finetuning.py --data data/cars196 --seeds 0 1 2 --jobs 2      the runs on test classes
python benchmarks/finetuning.py --data data/grocery81 --tuned-on cars196 ...      with what was chosen elsewhere
python benchmarks/finetuning.py --data data/cars196 --long --seeds 0 1 2 ...      as long as the preset trains
python benchmarks/finetuning.py --data data/cars196 --validation --seeds 0 --rows proxy_anchor:lr=1e-3      a trial
python benchmarks/finetuning.py --show --plot photographs.png      the tables alone, and a picture

Preset "finetune": EfficientNet-Lite0 with the weights of the extra ``pretrained``. A finished run is not repeated: each
is a line of DATA-KIND.jsonl under --out. The metrics of the last epoch count. Those of each epoch tell how fast a row
learns; where there are 40 test classes or more, they are of every fourth. "frozen" is the network without any training.
The runs on test classes also say what is inside the network (causes.py).
Settings: the preset's, then --settings, then those of the row, then those that were chosen for it.
"""

import platform
import random
import time
from importlib.metadata import version
from pathlib import Path

import finetuning_rows
import numpy as np
import run_files
import torch
from causes import measured
from finetuning_rows import ROWS, full, row_of
from harness import in_processes, make_parser
from retrieval_rows import value_of
from retrieval_tables import COMPARED, METRICS, TUNED_FOR, draw, show, tables_of_finetuning

from pml_ext import class_embeddings
from pml_ext.commands.freed_memory import keep_freed_memory
from pml_ext.datasets import ClassSubset, open_data
from pml_ext.neighbors import refine_with_neighbors
from pml_ext.recipes import Trainer, embed, recipe, retrieval_metrics
from pml_ext.trunks import BackboneFeatures

VALIDATION_CLASSES = {"tuning": 0.25, "validation": 0.25, "halves": 0.5}
EACH_EPOCH = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


def load(job):
    """Return the data, with embeddings of classes if the row asks for them."""
    data = open_data(job["data"])
    if row_of(job["row"]).class_embeddings:
        rows = job["class_embeddings"]
        rows = class_embeddings.from_text(data.train.class_names, model="tfidf") if rows is None else rows
        data = open_data(job["data"], class_embeddings=rows)
    return data.hold_out(job["validation"], job["seed"]) if job["validation"] else data


def run(job):
    """Train and evaluate once; return the line of the file."""
    row, seed = row_of(job["row"]), job["seed"]
    autocast = job["autocast"] and getattr(torch, job["autocast"])
    keep_freed_memory()
    torch.set_num_threads(1)
    data = load(job)
    for seeded in (torch.manual_seed, np.random.seed, random.seed):  # before the network is made
        seeded(seed)
    rows = data.class_embeddings
    if row.class_embeddings == "shuffled":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        rows = rows[order[order.argsort().add(1) % len(rows)]]  # a cycle in random order: no class keeps its own
    settings = {"preset": "finetune", "in_channels": data.in_channels} | job["settings"] | row.settings | job["tuned"]
    frozen = row.recipe == "frozen"
    made = recipe("proxy_anchor" if frozen else row.recipe, data.num_classes, class_embeddings=rows, **settings)
    data.train.transform, data.test.transform = made.transforms.train, made.transforms.test
    network = BackboneFeatures(made.trunk) if frozen else made.trunk
    started = time.perf_counter()
    evaluating = 0.0

    watched = data.test
    if not job["validation"] and data.test.num_classes >= 40:
        watched = ClassSubset(data.test, range(0, data.test.num_classes, 4))

    def evaluate(trunk, view=watched, metrics=EACH_EPOCH):
        nonlocal evaluating
        before = time.perf_counter()
        embeddings, labels = embed(trunk, view, autocast=autocast)
        values = {name: float(value) for name, value in retrieval_metrics(embeddings, labels, metrics=metrics).items()}
        evaluating += time.perf_counter() - before
        return values, embeddings, labels

    history = []
    if not frozen:
        trainer = Trainer(made, data.train, validate=lambda trunk: evaluate(trunk)[0])
        history = trainer.train()
    last, embeddings, labels = evaluate(network, data.test, tuple(METRICS))
    found = {"": last}
    if getattr(made.loss, "refiner", None) is not None:
        refined = refine_with_neighbors(made.loss.refiner, embeddings, k1=30, size=8)
        found[" + refinement at test time"] = retrieval_metrics(
            torch.nn.functional.normalize(refined), labels, metrics=tuple(METRICS)
        )
    inside = {} if frozen or job["validation"] else measured(made, data, embeddings, autocast)  # changes the network
    return job | {
        "data": Path(job["data"]).stem,
        "class_embeddings": job["class_embeddings"] and Path(job["class_embeddings"]).name,
        "settings": dict(made.settings.items()),
        "metrics": {name: {metric: percent(values[metric]) for metric in METRICS} for name, values in found.items()},
        "epochs": {metric: [percent(entry[metric]) for entry in history] for metric in EACH_EPOCH},
        "measured": {name: round(float(x), 4) for name, x in inside.items() if np.isfinite(float(x))},
        "loss": [round(entry["loss"], 4) for entry in history],
        "seconds": round(time.perf_counter() - started - evaluating, 1),
        "versions": {name: version(name) for name in ("torch", "pytorch-metric-learning", "timm", "pml-ext")},
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def percent(value):
    return round(100 * float(value), 3)


def jobs_of(data, rows, seeds, kind, tuned, shared):
    """Return what is to be run; ``tuned``: row -> the settings that were chosen for it."""
    jobs = []
    for name in rows:
        job = {"row": name, "data": data, "validation": VALIDATION_CLASSES.get(kind)} | shared
        if kind == "tuning":
            jobs += [job | {"seed": seeds[0], "trial": x, "tuned": x} for x in row_of(name).trials()]
        else:
            jobs += [job | {"seed": seed, "tuned": tuned.get(name, {})} for seed in seeds]
    return sorted(jobs, key=lambda job: job["seed"])  # all rows of one seed first: what is stopped can be compared


def chosen(out, data):
    """Return row -> the settings of its best trial on the validation classes of a data set."""
    best = {}
    for run in run_files.read(run_files.path_of(out, data, "tuning")):
        found = run["metrics"][""][TUNED_FOR]
        if run["row"] not in best or found > best[run["row"]][0]:
            best[run["row"]] = found, run["trial"]
    return {row: trial for row, (_, trial) in best.items()}


def main(
    data=None,
    rows=None,
    seeds=(0, 1, 2),
    jobs=1,
    out="benchmarks/results/finetuning",
    tune=False,
    validation=False,
    halves=False,
    long=False,
    tuned_on=None,
    class_embeddings=None,
    settings=(),
    autocast=None,
    show_only=False,
    plot=None,
):
    """Run what has not been run, and print the tables of all that has."""
    out = Path(out)
    if not show_only:
        if data is None:
            raise SystemExit("--data must be given, got none")
        asked = {"tuning": tune, "validation": validation, "halves": halves, "long": long}
        if sum(asked.values()) > 1:
            raise SystemExit("of --tune, --validation, --halves and --long only one must be given")
        given = {key: value_of(value) for key, _, value in (pair.partition("=") for pair in settings)}
        if long and "epochs" in given:
            rule = "--long trains as long as the preset: --settings must not have epochs"
            raise SystemExit(f"{rule}, got {given['epochs']}")
        kind = next((name for name, wanted in asked.items() if wanted), "test")
        path = run_files.path_of(out, Path(data).stem, kind)
        finished = run_files.read(path)
        which = ("row", "trial") if tune else ("row", "seed")
        tuned = chosen(out, tuned_on or Path(data).stem)
        shared = {"class_embeddings": class_embeddings, "settings": given, "autocast": autocast}
        wanted = jobs_of(data, list(ROWS) if rows is None else list(map(full, rows)), seeds, kind, tuned, shared)
        todo = [job for job in wanted if run_files.find(finished, **{name: job[name] for name in which}) is None]
        for line in in_processes(run, todo, jobs, lambda done: f"{done['row']}: {done['metrics'][''][TUNED_FOR]:.1f}"):
            run_files.append(path, line)
    show(tables_of_finetuning(out))
    if plot:
        draw(out, plot, rows_of=finetuning_rows, metrics=tuple(COMPARED))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--data", help="a folder with train/ and test/, or what pml_ext.datasets.open_data takes")
    parser.add_argument("--rows", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--out", default="benchmarks/results/finetuning")
    parser.add_argument("--tune", action="store_true", help="run the trials on validation classes instead")
    parser.add_argument("--validation", action="store_true", help="runs, but on validation classes")
    parser.add_argument("--halves", action="store_true", help="as --validation, with half of the training classes")
    parser.add_argument(
        "--long", action="store_true", help="on test classes, with the epochs of the preset, in files of their own"
    )
    parser.add_argument("--tuned-on", help="name of the data set whose trials choose the settings; default: this one")
    parser.add_argument("--class-embeddings", help="a file; default: the names of the classes")
    parser.add_argument("--settings", nargs="+", default=(), help="of all rows: image_size=96 ...")
    parser.add_argument(
        "--autocast", choices=["bfloat16"], help="of the evaluation, for processors that are faster in it"
    )
    parser.add_argument("--show", action="store_true", dest="show_only", help="train nothing")
    parser.add_argument("--plot", help="a picture of all runs on test classes")
    main(**vars(parser.parse_args()))
