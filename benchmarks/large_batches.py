"""What gradients chunk by chunk cost, and what a larger batch is worth.

python benchmarks/large_batches.py --out benchmarks/results/large_batches-cpu.json        time and memory of a step
python benchmarks/large_batches.py --train omniglot.npz --out benchmarks/results/large_batches-omniglot.jsonl
python benchmarks/large_batches.py --show FILE                                            the table of kept figures

Time: CPU seconds of plain step and step in chunks, which take turns in one process. Memory: a process of its own for
each step, above what was there before it, images included there. Training: batches of each size with the network in
chunks of 32, so that batch norms see the same number of images, the same number of images in all, on validation classes
that are cut from the training classes; learning rates are tuned on the first seed, which is not reported. What is done
is not repeated.
"""

import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
import run_files
import torch
from harness import (
    Measured,
    in_fresh_process,
    make_parser,
    markdown_table,
    measure_steps,
    median_and_quartiles,
    median_ratio,
    metadata,
    save,
    time_in_turn,
)

from pml_ext.datasets import open_data
from pml_ext.gradient_cache import cached_backward
from pml_ext.losses import MultiSimilarityLoss
from pml_ext.recipes import Trainer, embed, recipe, retrieval_metrics

BATCH_SIZES = (64, 256, 1024, 4096)
CHUNK_SIZE, WIDTH, SIDE = 64, 16, 28
WAYS = {"plain": "plain", "chunks": f"chunks of {CHUNK_SIZE}", "loss": "the loss alone"}

TRAINED_CHUNK, IMAGES_SEEN, HELD_OUT = 32, 10_000, 0.25
TRAININGS = {  # batch size: images of a class, learning rates that are tried
    32: (4, (1e-3, 2e-3, 4e-3, 8e-3)),
    128: (4, (2e-3, 4e-3, 8e-3, 16e-3)),
    512: (8, (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)),
}


def make_step(way, batch_size):
    """Return a function that does forward and backward once."""
    torch.manual_seed(0)
    made = recipe("multi_similarity", 2, in_channels=1, image_size=SIDE, width=WIDTH)
    trunk, loss_func = made.trunk, MultiSimilarityLoss()
    labels = torch.arange(batch_size) // 4
    if way == "loss":
        embeddings = torch.randn(batch_size, made.settings.embedding_size, requires_grad=True)
        return lambda: torch.autograd.grad(loss_func(embeddings, labels), embeddings)
    images = torch.randn(batch_size, 1, SIDE, SIDE)

    def step():
        trunk.zero_grad()
        if way == "plain":
            loss_func(trunk(images), labels).backward()
        else:
            cached_backward(trunk, loss_func, images, labels, CHUNK_SIZE)

    return step


def measure_memory(way, batch_size):
    """Return seconds and peak of two steps; for a process of its own."""
    torch.set_num_threads(1)
    make_step(way, 8)()  # libraries load what they need
    return measure_steps(make_step(way, batch_size), 1)


def measure_time(batch_size, repeats):
    """Return the CPU seconds of plain steps and steps in chunks, which take turns; for a process of its own."""
    torch.set_num_threads(1)
    steps = {way: make_step(way, batch_size) for way in ("plain", "chunks")}
    return time_in_turn(steps, repeats, clock=time.process_time)


def measure(batch_sizes=BATCH_SIZES, repeats=7, out=None):
    """Return the metadata and a row for each size and way; print them as a table."""
    rows = []
    for batch_size in batch_sizes:
        seconds = in_fresh_process(measure_time, batch_size, repeats)
        for way in WAYS:
            measured: Measured = in_fresh_process(measure_memory, way, batch_size)
            row = {"batch_size": batch_size, "way": way, "peak_mb": round(measured.peak_mb, 1)}
            if way in seconds:
                median, quartiles = median_and_quartiles(seconds[way], 6)
                row |= {"seconds": median, "quartiles": quartiles}
                row["ratio"] = round(median_ratio(seconds[way], seconds["plain"]), 3)
            rows.append(row)
            print(row, flush=True)
    about = metadata(threads=1, repeats=repeats, chunk_size=CHUNK_SIZE, width=WIDTH, image_size=SIDE, dtype="float32")
    kept = save(out, {"metadata": about, "results": rows})
    print(table(kept))
    return kept


def table(kept):
    """Return the table of a step's time and memory in Markdown."""
    lines = []
    for row in kept["results"]:
        cells = [f"{row['batch_size']:,}", WAYS[row["way"]]]
        if "seconds" in row:
            quartiles = " to ".join(f"{1e3 * x:,.0f}" for x in row["quartiles"])
            cells += [f"{1e3 * row['seconds']:,.0f} ({quartiles})", f"{row['ratio']:.2f}"]
        else:
            cells += ["", ""]
        lines.append([*cells, f"{row['peak_mb']:,.0f}"])
    return markdown_table(["batch", "step", "CPU ms (quartiles)", "/ plain", "peak MB"], lines, numbers=3)


def train(data, batch_size, lr, seed):
    """Train once and return what is kept of it."""
    torch.set_num_threads(1)
    opened = open_data(data).hold_out(HELD_OUT, seed)
    for seeded in (torch.manual_seed, np.random.seed, random.seed):  # before the network is made
        seeded(seed)
    settings = {"batch_size": batch_size, "samples_per_class": TRAININGS[batch_size][0], "lr": lr}
    settings |= {"chunk_size": TRAINED_CHUNK, "in_channels": opened.in_channels, "image_size": SIDE, "width": WIDTH}
    per_epoch = len(opened.train) // batch_size * batch_size
    made = recipe("multi_similarity", opened.num_classes, epochs=round(IMAGES_SEEN / per_epoch), **settings)
    opened.train.transform, opened.test.transform = made.transforms
    trainer = Trainer(made, opened.train, device="cpu")
    trainer.train()
    metrics = retrieval_metrics(*embed(made.trunk, opened.test))
    return {
        "data": Path(data).stem,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "steps": trainer.iterations_per_epoch * made.epochs,
        "images_seen": trainer.iterations_per_epoch * trainer.batch_size * made.epochs,
        "metrics": {name: round(100 * value, 3) for name, value in metrics.items()},
        "settings": dict(made.settings.items()),
    }


def train_all(data, out, seeds=(1, 2, 3)):
    """Train what has not been trained: all learning rates with seed 0, the best ones with the others; print a table."""
    path = Path(out)

    def done(**job):
        run = run_files.find(run_files.read(path), **job)
        if run is None:
            run = train(data, **job)
            run_files.append(path, run)
            print({key: run[key] for key in ("batch_size", "lr", "seed", "steps", "metrics")}, flush=True)
        return run

    for batch_size, (_, rates) in TRAININGS.items():
        for lr in rates:
            done(batch_size=batch_size, lr=lr, seed=0)
    best = {run["batch_size"]: run["lr"] for run in best_of_first_seed(run_files.read(path))}
    for seed in seeds:
        for batch_size, lr in best.items():
            done(batch_size=batch_size, lr=lr, seed=seed)
    print(training_table(run_files.read(path)))


def best_of_first_seed(runs):
    """Return the run of each batch size whose MAP@R is largest among those of seed 0."""
    tried = [run for run in runs if run["seed"] == 0]
    return [
        max((run for run in tried if run["batch_size"] == size), key=map_at_r)
        for size in sorted({run["batch_size"] for run in tried})
    ]


def map_at_r(run):
    return run["metrics"]["mean_average_precision_at_r"]


def training_table(runs):
    """Return mean and standard deviation over the seeds behind the first, in Markdown."""
    lines = []
    for best in best_of_first_seed(runs):
        own = [
            run for run in runs if run["seed"] and (run["batch_size"], run["lr"]) == (best["batch_size"], best["lr"])
        ]
        cells = [f"{best['batch_size']:,}", f"{best['settings']['samples_per_class']}", f"{best['lr']:g}"]
        cells += [f"{best['steps']:,}", f"{best['images_seen']:,}"]
        for name in ("precision_at_1", "mean_average_precision_at_r"):
            values = [run["metrics"][name] for run in own]
            cells.append(f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})")
        lines.append(cells)
    return markdown_table(["batch", "of a class", "lr", "steps", "images", "P@1", "MAP@R"], lines, numbers=7)


def main(out=None, repeats=7, train=None, show=None):
    """Measure, train or show."""
    if show is not None:
        print(
            training_table(run_files.read(Path(show)))
            if show.endswith("l")
            else table(json.loads(Path(show).read_text()))
        )
    elif train is not None:
        train_all(train, out)
    else:
        measure(repeats=repeats, out=out)


if __name__ == "__main__":
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train", default=None, help="data to train on, as pml_ext.datasets.open_data takes it")
    parser.add_argument("--show", default=None, help="file to print instead of measuring")
    main(**vars(parser.parse_args()))
