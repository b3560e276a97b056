"""Time and memory of pair losses, all pairs at once or in tiles; run: python benchmarks/pair_scaling.py.

Every row is measured in processes of its own, in turn with the other rows of its size. The floor is what tiles cannot
avoid: for a batch against itself, two half products for the similarities, in forward and backward, and one full product
for the gradient; against references, three full products. ``--out benchmarks/results/pair_scaling-cpu.json`` keeps
the figures, ``--show FILE`` prints the table of kept ones.
"""

import json
from pathlib import Path

import torch
from harness import make_parser, markdown_table, measure_in_turn, measure_steps, median_and_quartiles, metadata, save

METHODS = {
    "floor": "matrix products in tiles",
    "PML": "PML MultiSimilarityLoss",
    "dense": "MultiSimilarityLoss, all pairs at once",
    "tiles": "MultiSimilarityLoss",
    "PML, mined": "PML MultiSimilarityLoss and miner",
    "mined": "MultiSimilarityLoss, epsilon=0.1",
    "PML SupCon": "PML SupConLoss",
    "SupCon": "SupConLoss",
    "NTXent": "NTXentLoss",
    "PML contrastive": "PML ContrastiveLoss",
    "contrastive": "ContrastiveLoss",
}
BESIDE = {
    "dense": "PML",
    "tiles": "PML",
    "mined": "PML, mined",
    "SupCon": "PML SupCon",
    "contrastive": "PML contrastive",
}
WIDTH, TILE = 128, 512
SIZES = ((1024, 0), (2048, 0), (8192, 0), (65_536, 0), (128, 500_000), (128, 1_000_000))
IN_TILES = ("floor", "tiles", "mined", "SupCon", "NTXent", "contrastive")


def methods_of(batch_size, num_refs):
    """Return what is measured at a size: with the largest ones only what needs no matrix of all pairs."""
    pairs = batch_size * (num_refs or batch_size)
    if pairs > 2**30:
        return "floor", "tiles", "mined"
    if pairs > 2**26:
        return IN_TILES
    without = {"PML, mined", "PML SupCon"} if pairs > 2**25 else set()  # many GB each
    return tuple(method for method in METHODS if method not in without)


def make(method):
    """Return a function of embeddings, labels and references."""
    from pytorch_metric_learning import losses, miners

    from pml_ext.losses import ContrastiveLoss, MultiSimilarityLoss, NTXentLoss, SupConLoss

    if method == "PML, mined":
        miner, loss_func = miners.MultiSimilarityMiner(0.1), losses.MultiSimilarityLoss()
        return lambda emb, labels, **refs: loss_func(emb, labels, miner(emb, labels, **refs), **refs)
    if method == "dense":
        loss_func = MultiSimilarityLoss()
        loss_func._can_stream = lambda *_: False
        return loss_func
    classes = {
        "PML": losses.MultiSimilarityLoss,
        "PML SupCon": losses.SupConLoss,
        "tiles": MultiSimilarityLoss,
        "mined": lambda: MultiSimilarityLoss(epsilon=0.1),
        "SupCon": SupConLoss,
        "NTXent": NTXentLoss,
        "PML contrastive": losses.ContrastiveLoss,
        "contrastive": ContrastiveLoss,
    }
    return classes[method]()


@torch.no_grad()
def floor(emb, refs):
    """Take the products that no exact walk over tiles can avoid."""
    grad = torch.zeros_like(emb)
    others, rows = (emb, TILE) if refs is None else (refs, len(emb))
    columns = TILE**2 // rows
    memory = emb.new_empty(rows * columns)
    for walk in range(2):
        for start in range(0, len(others), columns):
            right = others[start : start + columns]
            for first in range(0, start + 1 if refs is None else len(emb), rows):
                left = emb[first : first + rows]
                block = torch.mm(left, right.T, out=memory[: len(left) * len(right)].view(len(left), len(right)))
                if walk:
                    grad[first : first + rows].addmm_(block, right)
                if walk and refs is None and first < start:
                    grad[start : start + columns].addmm_(block.T, left)


def measure(method, batch_size, num_refs, steps, threads):
    """Return the seconds of each step and the peak of memory beyond embeddings and references."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    emb = torch.randn(batch_size, WIDTH, requires_grad=True)
    labels = torch.arange(batch_size) // 4
    given = {}
    if num_refs:
        given = {"ref_emb": torch.randn(num_refs, WIDTH), "ref_labels": torch.randint(11_000, (num_refs,))}

    def step(emb, labels, refs):
        if method == "floor":
            floor(emb, refs.get("ref_emb"))
        else:
            torch.autograd.grad(loss_of(emb, labels, **refs), emb)

    loss_of = None if method == "floor" else make(method)
    few = {name: x[:600] for name, x in given.items()}
    step(emb[:600].detach().requires_grad_(), labels[:600], few)  # libraries load what they need
    pairs = batch_size * (num_refs or batch_size)
    return measure_steps(lambda: step(emb, labels, given), steps if pairs < 2**30 else 2)


def main(sizes=SIZES, steps=3, rounds=1, threads=1, out=None):
    """Return the metadata and a row for each size and method; print them as a table."""
    jobs = [(method, *size) for size in sizes for method in methods_of(*size)]
    results = []
    for (method, batch_size, num_refs), measured in measure_in_turn(measure, jobs, rounds, steps, threads).items():
        seconds, quartiles = median_and_quartiles(measured.seconds, 6)
        row = {"method": method, "batch_size": batch_size, "num_refs": num_refs, "seconds": seconds}
        results.append(row | {"quartiles": quartiles, "extra_mb": round(measured.peak_mb, 1)})
    about = metadata("cpu", threads, steps=steps, rounds=rounds, embedding_size=WIDTH, dtype="float32")
    kept = save(out, {"metadata": about, "results": results})
    print(table(kept))
    return kept


def table(kept):
    """Return a table in Markdown."""
    sizes, lines = {}, []
    for row in kept["results"]:
        sizes.setdefault((row["batch_size"], row["num_refs"]), {})[row["method"]] = row
    for (batch_size, num_refs), rows in sizes.items():
        for method, row in rows.items():
            pml = rows.get(BESIDE.get(method))
            size = f"{batch_size:,} x {num_refs:,}" if num_refs else f"{batch_size:,}"
            lines.append([size, METHODS[method], f"{row['seconds'] * 1e3:,.0f}"])
            lines[-1] += [" to ".join(f"{x * 1e3:,.0f}" for x in row["quartiles"])]
            lines[-1] += [f"1/{pml['seconds'] / row['seconds']:.1f}" if pml else ""]
            lines[-1] += [f"{row['seconds'] / rows['floor']['seconds']:.2f}" if method != "floor" else ""]
            lines[-1] += [f"{row['extra_mb']:,.0f}"]
    return markdown_table(["batch x references", "", "ms", "quartiles", "/ PML", "/ floor", "extra MB"], lines, 5)


if __name__ == "__main__":
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--show", help="print the table of a kept file")
    options = vars(parser.parse_args())
    kept = options.pop("show")
    if kept:
        print(table(json.loads(Path(kept).read_text())))
    else:
        main(**options)
