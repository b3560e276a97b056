"""Why does a method help, or not? What attention, learners, messages and margins do in the networks of retrieval.py.

python benchmarks/retrieval_causes.py --data omniglot.npz --class-embeddings array:strokes --settings image_size=28 \
    --budget epochs:30 --seeds 0 1 2 --jobs 2      trains again, measures, prints the table
python benchmarks/retrieval_causes.py --data glyphs --tuned-on omniglot --budget epochs:1 --rows mhgl ...
python benchmarks/retrieval_causes.py --show      the tables alone

A finished run is not repeated: each is a line of DATA-causes.jsonl under --out.
"""

from importlib.metadata import version
from pathlib import Path

import run_files
from causes import attention, learners, margins, messages
from harness import in_processes, make_parser
from retrieval import trained, tuned_settings
from retrieval_rows import ROWS, row_of, value_of
from retrieval_tables import show, tables_of_causes

MEASURES = {"mhgl": attention, "attention_ensemble": learners, "intra_batch": messages, "adaptive_margin": margins}
MEASURED = (
    "mhgl",
    "4 heads",
    "4 learners",
    "4 learners, divergence",
    "refiner",
    "refiner, starts with similarity",
    "no margin",
    "margin from distance",
)


def check(rows):
    """Stop where a row cannot be looked into, before anything is trained."""
    for row in rows:
        recipe, settings = row_of(row).recipe, row_of(row).settings
        if recipe not in MEASURES:
            raise SystemExit(f"--rows must be of the recipes {', '.join(MEASURES)}, got {row!r}")
        if recipe == "intra_batch" and settings.get("refined_weight") == 0:
            raise SystemExit(f"--rows must have a refiner to look into, got {row!r}")
        if "epochs" in settings:
            raise SystemExit(f"--rows must not set epochs, which --budget does, got {row!r}")


def is_done(job, runs, path):
    """Return whether a job is among the finished runs of a file; one with other settings stops everything."""
    which = {name: job[name] for name in ("row", "seed", "epochs")}
    run = run_files.find(runs, **which)
    if run is not None and run["settings"] != job["given"]:
        raise SystemExit(
            f"{path}: row {job['row']!r}, seed {job['seed']}, epochs {job['epochs']} is a run with settings = "
            f"{run['settings']}, got {job['given']}: choose another --out"
        )
    return run is not None


def measure(job):
    """Train once and measure; return the line of the file."""
    made, data, _, _ = trained(job)
    measured = MEASURES[row_of(job["row"]).recipe](made, data)
    return {
        "row": job["row"],
        "data": Path(job["data"]).stem,
        "epochs": job["epochs"],
        "seed": job["seed"],
        "settings": job["given"],
        "versions": {package: version(package) for package in ("torch", "pytorch-metric-learning", "pml-ext")},
        "measured": {name: round(float(value), 4) for name, value in measured.items()},
    }


def main(data, rows, seeds, budget, jobs, results, out, tuned_on, class_embeddings, settings, show_only):
    """Train, measure, write and print."""
    if not show_only:
        if data is None:
            raise SystemExit("--data must be given, got none")
        given = {key: value_of(value) for key, _, value in (pair.partition("=") for pair in settings)}
        epochs, name = int(budget.removeprefix("epochs:")), Path(data).stem
        shared = {"data": data, "class_embeddings": class_embeddings, "epochs": epochs, "validation": False}
        check(rows)
        chosen = {row: tuned_settings(Path(results), tuned_on or name, row) if row in ROWS else {} for row in rows}
        wanted = [
            shared | {"row": row, "seed": seed, "given": given, "settings": given | chosen[row]}
            for seed in seeds
            for row in rows
        ]
        path = run_files.path_of(out, name, "causes")
        finished = run_files.read(path)
        todo = [job for job in wanted if not is_done(job, finished, path)]
        for line in in_processes(measure, todo, jobs):
            run_files.append(path, line)
    show(tables_of_causes(out))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--data", help="as for retrieval.py, which must have been tuned on it")
    parser.add_argument("--rows", nargs="+", default=MEASURED, help="of mhgl and the three other papers' recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="epochs:30")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--results", default="benchmarks/results/retrieval", help="of retrieval.py: what was tuned")
    parser.add_argument("--out", default="benchmarks/results/retrieval")
    parser.add_argument("--tuned-on", help="as for retrieval.py")
    parser.add_argument("--class-embeddings", help='a file, "names" or "array:NAME"')
    parser.add_argument("--settings", nargs="+", default=(), help="of all rows: image_size=28 ...")
    parser.add_argument("--show", action="store_true", dest="show_only", help="train nothing")
    main(**vars(parser.parse_args()))
