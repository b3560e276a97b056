"""Time and memory of retrieval metrics, beside PML's AccuracyCalculator, a search by faiss, and the bare product.

Run: python benchmarks/evaluation.py --threads 2 --out benchmarks/results/evaluation-cpu.json
P@1, R-precision and MAP@R of random embeddings of 512 dimensions, each candidate in its own process, the candidates
in turn. faiss.IndexFlatIP searches as many neighbors as the largest class needs; the product is that of all pairs in
chunks, and nothing else. PML is left out where its comparison of queries and classes alone would not fit, and with
faiss, by which it searches, for the large class, where each query has 12,000 neighbors: that takes minutes.
"""

import statistics
import time
from typing import NamedTuple

import harness
import torch

WIDTH = 512
METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
PML_BYTES = 9  # that PML takes for each pair of a query and a class: measured at 40,000 x 20,000
PML_LIMIT = 12e9


class Size(NamedTuple):
    """Embeddings and their classes: some large ones, and the rest in classes of about equal size."""

    title: str
    embeddings: int
    classes: int
    largest: int  # images of one class; 0: like the others


SIZES = {
    "small": Size("small", 10_000, 1_000, 0),
    "sop": Size("Stanford Online Products, test half", 60_502, 11_316, 0),
    "many": Size("many classes", 100_000, 50_000, 0),
    "large": Size("a class of 12,000", 24_000, 1_201, 12_000),
}


def labels_of(size):
    """Return labels, ``(N,)``; the largest class is 0."""
    rest = size.embeddings - size.largest
    others = torch.arange(rest) % (size.classes - (size.largest > 0)) + (size.largest > 0)
    return torch.cat([torch.zeros(size.largest, dtype=torch.long), others])


def ours(x, labels):
    from pml_ext.evaluation import retrieval_metrics

    return retrieval_metrics(x, labels, metrics=METRICS)


def pml(x, labels):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=METRICS, k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(x, labels)


def faiss_search(x, labels):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x.numpy())
    index.search(x.numpy(), int(labels.bincount().max()))


def product(x, labels):
    for queries in x.split(256):
        for part in x.tensor_split(-(-len(x) // 65_536)):
            queries @ part.T


CANDIDATES = {"retrieval_metrics": ours, "PML": pml, "faiss": faiss_search, "product": product}


def measure(candidate, size, threads):
    """Return seconds and peak memory of one call."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(size.embeddings, WIDTH))
    labels = labels_of(size)
    CANDIDATES[candidate](x[:256].clone(), torch.arange(256) // 2)  # what is loaded on first use
    start = harness.start_peak()
    begun = time.perf_counter()
    values = CANDIDATES[candidate](x, labels)
    seconds = time.perf_counter() - begun
    if values is not None:
        assert 0 < values["precision_at_1"] < 1
    return harness.Measured([seconds], harness.peak_since(start))


def main(rounds=3, threads=None, sizes=None, out=None):
    threads = threads or torch.get_num_threads()
    sizes = sizes or list(SIZES)
    left_out = {}
    for name in sizes:
        needed = PML_BYTES * SIZES[name].embeddings * SIZES[name].classes
        if needed > PML_LIMIT:
            left_out["PML", name] = f"about {needed / 1e9:.0f} GB"
        if SIZES[name].largest:
            left_out["PML", name] = left_out["faiss", name] = "minutes"
    jobs = [(candidate, SIZES[name]) for name in sizes for candidate in CANDIDATES if (candidate, name) not in left_out]
    measured = harness.measure_in_turn(measure, jobs, rounds, threads)
    rows = []
    for name in sizes:
        own = measured["retrieval_metrics", SIZES[name]]
        for candidate in CANDIDATES:
            row = {"size": name, **SIZES[name]._asdict(), "candidate": candidate}
            if (candidate, name) in left_out:
                row["would_need"] = left_out[candidate, name]
            else:
                seconds, peak_mb = measured[candidate, SIZES[name]]
                row |= {
                    "seconds": round(statistics.median(seconds), 2),
                    "all_seconds": [round(x, 2) for x in seconds],
                    "peak_mb": round(peak_mb),
                    "ours_by_this": round(harness.median_ratio(own.seconds, seconds), 2),
                }
            rows.append(row)
    print(table(rows))
    return harness.save(out, {"metadata": harness.metadata(threads=threads, width=WIDTH), "rows": rows})


def table(rows):
    lines = []
    for row in rows:
        shape = f"{row['embeddings']:,} in {row['classes']:,}"
        shape += f", one of {row['largest']:,}" if row["largest"] else ""
        if "would_need" in row:
            cells = [f"not run: {row['would_need']}", "", ""]
        else:
            spread = f"{min(row['all_seconds']):.1f} to {max(row['all_seconds']):.1f}"
            cells = [f"{row['seconds']:.1f} ({spread})", f"{row['peak_mb']:,} MB", f"{row['ours_by_this']:.2f}"]
        lines.append([shape, row["candidate"], *cells])
    titles = ["Embeddings, classes", "Candidate", "Seconds (range)", "Extra memory", "Ours / this"]
    return harness.markdown_table(titles, lines, numbers=3)


if __name__ == "__main__":
    parser = harness.make_parser(__doc__, "--out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    main(**vars(parser.parse_args()))
