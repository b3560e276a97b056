"""What messages inside a batch cost; run: python benchmarks/refiner.py.

Forward and backward of one layer of IntraBatchRefiner (512 dimensions, 2 heads, training mode): dense, along edges of
the complete graph, and torch's TransformerEncoderLayer of the same sizes, each row in processes of its own; the sparse
path on a graph of 4096 nodes; and what the dense refiner adds to the training step of a ResNet-18. ``--out FILE`` keeps
the figures.
"""

import statistics
from functools import partial

import torch
from harness import (
    make_parser,
    markdown_table,
    measure_in_turn,
    measure_steps,
    median_and_quartiles,
    median_ratio,
    metadata,
    save,
    time_in_turn,
)

METHODS = {"dense": "dense", "edges": "edge list", "transformer": "TransformerEncoderLayer"}
BATCH_SIZES = (54, 128, 256, 512)
EMBEDDING_SIZE, HEADS = 512, 2


def make(method, nodes, senders):
    """Return a function of embeddings, and the module whose parameters it uses."""
    if method == "transformer":
        layer = torch.nn.TransformerEncoderLayer(EMBEDDING_SIZE, HEADS, 4 * EMBEDDING_SIZE, 0.1, batch_first=True)
        return lambda x: layer(x[None]), layer
    from pml_ext.trunks import IntraBatchRefiner

    refiner = IntraBatchRefiner(EMBEDDING_SIZE, heads=HEADS, input_projection=False)
    if method == "dense":
        return refiner, refiner
    receivers = torch.arange(nodes).repeat_interleave(senders)
    edges = torch.arange(nodes).repeat(nodes) if senders == nodes else torch.randint(nodes, (nodes * senders,))
    edge_index = torch.stack([edges, receivers])
    return lambda x: refiner(x, edge_index.to(x.device)), refiner


def measure(method, nodes, senders, steps, threads, device):
    """Return the seconds of each step and the peak of memory above what was there before."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    forward, module = make(method, nodes, senders)
    module.to(device)

    def step(x):
        x.grad = None
        module.zero_grad()
        forward(x).sum().backward()

    x = torch.randn(nodes, EMBEDDING_SIZE, device=device, requires_grad=True)
    step(x)
    return measure_steps(lambda: step(x), steps, device)


def measure_share(nodes, image_size, steps, threads, device):
    """Return the seconds of a training step of a ResNet-18 with IntraBatchLoss, with and without the refiner."""
    import timm

    from pml_ext.losses import IntraBatchLoss

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trunk = timm.create_model("resnet18", num_classes=EMBEDDING_SIZE).to(device)
    images = torch.randn(nodes, 3, image_size, image_size, device=device)
    labels = torch.arange(nodes, device=device) % 6

    def step(loss_func):
        trunk.zero_grad()
        loss_func.zero_grad()
        loss_func(trunk(images), labels).backward()

    weights = {"with": 1, "without": 0}
    loss_funcs = {name: IntraBatchLoss(100, EMBEDDING_SIZE, refined_weight=w).to(device) for name, w in weights.items()}
    candidates = {name: partial(step, loss_func) for name, loss_func in loss_funcs.items()}
    return time_in_turn(candidates, steps, device)


def main(
    batch_sizes=BATCH_SIZES, graph=(4096, 16), share=(54, 64), steps=10, rounds=3, threads=2, device="cpu", out=None
):
    """Return the metadata and all rows; print them as tables."""
    jobs = [(method, size, size) for size in batch_sizes for method in METHODS] + [("edges", *graph)]
    measured = measure_in_turn(measure, jobs, rounds, steps, threads, device)
    results, lines = [], []
    for (method, nodes, senders), (seconds, peak) in measured.items():
        median, quartiles = median_and_quartiles(seconds, 2, 1e3)
        dense = measured.get(("dense", nodes, senders))
        ratio = statistics.median(seconds) / statistics.median(dense.seconds) if dense else None
        row = {"nodes": nodes, "senders": senders, "method": method, "ratio": ratio}
        results.append(row | {"ms": median, "quartiles": quartiles, "peak_mb": round(peak, 1)})
        cells = [f"{nodes} x {senders}", METHODS[method], f"{median:.1f}", "{:.1f} to {:.1f}".format(*quartiles)]
        lines.append([*cells, f"{peak:.0f}", f"{ratio:.2f}" if dense else ""])
    titles = ["samples x senders", "", "ms", "quartiles", "peak MB", "time / dense"]
    print(markdown_table(titles, lines, numbers=4))
    seconds = measure_share(*share, steps, threads, device)
    added = {"nodes": share[0], "image_size": share[1]}
    added |= {f"ms_{name}": round(1e3 * statistics.median(values), 1) for name, values in seconds.items()}
    added["ratio"] = round(median_ratio(seconds["with"], seconds["without"]), 3)
    print(
        f"\nResNet-18, {share[0]} images of {share[1]} x {share[1]}: a step takes {added['ms_with']} ms with the "
        f"refiner, {added['ms_without']} without, {100 * (added['ratio'] - 1):.0f}% more"
    )
    sizes = {"embedding_size": EMBEDDING_SIZE, "heads": HEADS, "steps": steps, "rounds": rounds, "dtype": "float32"}
    return save(out, {"metadata": metadata(device, threads, **sizes), "results": results, "resnet18": added})


if __name__ == "__main__":
    main(**vars(make_parser(__doc__, "--device", "--out").parse_args()))
