"""What messages inside of a batch cost; run: python benchmarks/refiner.py.

Forward and backward of one layer of IntraBatchRefiner (512 numbers, 2 heads, training mode): dense, along the edges of
the complete graph, and torch's TransformerEncoderLayer of the same sizes, each row in processes of its own; the sparse
path on a graph of 4096 nodes; and what the dense refiner adds to the training step of a ResNet-18. ``--out FILE`` keeps
the figures.
"""

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

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


def resident(field):
    """Return VmRSS or VmHWM (its peak) of this process in MB; Linux with glibc only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


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
    if device == "cpu":
        step(x)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # from here on is the peak
        before = resident("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step(x)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": times[1:], "peak_mb": peak - before}


def measure_share(nodes, image_size, steps, threads, device):
    """Return the seconds of a training step of a ResNet-18 with IntraBatchLoss, with and without the refiner."""
    import timm

    from pml_ext.losses import IntraBatchLoss

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trunk = timm.create_model("resnet18", num_classes=EMBEDDING_SIZE).to(device)
    images = torch.randn(nodes, 3, image_size, image_size, device=device)
    labels = torch.arange(nodes, device=device) % 6
    loss_funcs = {weight: IntraBatchLoss(100, EMBEDDING_SIZE, refined_weight=weight).to(device) for weight in (1, 0)}
    seconds = {weight: [] for weight in loss_funcs}
    for i in range(steps + 1):
        for weight, loss_func in loss_funcs.items():
            start = time.perf_counter()
            trunk.zero_grad()
            loss_func.zero_grad()
            loss_func(trunk(images), labels).backward()
            if device != "cpu":
                torch.cuda.synchronize()
            if i:
                seconds[weight].append(time.perf_counter() - start)
    return {"with": seconds[1], "without": seconds[0]}


def run_alone(arguments):
    """Return what ``measure`` finds in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(
    batch_sizes=BATCH_SIZES, graph=(4096, 16), share=(54, 64), steps=10, rounds=3, threads=2, device="cpu", out=None
):
    """Return the metadata and all rows; print them as tables."""
    sizes = [(size, size, method) for size in batch_sizes for method in METHODS] + [(*graph, "edges")]
    found = {}
    jobs = [size for _ in range(rounds) for size in sizes]
    for nodes, senders, method in tqdm(jobs, desc="measurements"):
        one = run_alone([method, nodes, senders, steps, threads, device])
        row = found.setdefault((nodes, senders, method), {"seconds": [], "peak_mb": []})
        row["seconds"] += one["seconds"]
        row["peak_mb"].append(one["peak_mb"])
    results = []
    print("| samples x senders | | ms | quartiles | peak MB | time / dense |")
    print("| --- | --- | --: | --: | --: | --: |")
    for (nodes, senders, method), row in found.items():
        low, median, high = (1e3 * x for x in statistics.quantiles(row["seconds"], n=4))
        dense = found.get((nodes, senders, "dense"))
        ratio = median / (1e3 * statistics.median(dense["seconds"])) if dense else None
        peak = statistics.median(row["peak_mb"])
        cells = [f"{nodes} x {senders}", METHODS[method], f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{peak:.0f}"]
        print("| " + " | ".join([*cells, f"{ratio:.2f}" if dense else ""]) + " |")
        values = {"ms": round(median, 2), "quartiles": [round(low, 2), round(high, 2)], "peak_mb": round(peak, 1)}
        results.append({"nodes": nodes, "senders": senders, "method": method, "ratio": ratio} | values)
    step = measure_share(*share, steps, threads, device)
    ratios = [a / b for a, b in zip(step["with"], step["without"], strict=True)]
    added = {
        "nodes": share[0],
        "image_size": share[1],
        "ms_with": round(1e3 * statistics.median(step["with"]), 1),
        "ms_without": round(1e3 * statistics.median(step["without"]), 1),
        "ratio": round(statistics.median(ratios), 3),
    }
    print(
        f"\nResNet-18, {share[0]} images of {share[1]} x {share[1]}: a step takes {added['ms_with']} ms with the "
        f"refiner, {added['ms_without']} without, {100 * (added['ratio'] - 1):.0f}% more"
    )
    metadata = {"torch": torch.__version__, "machine": platform.machine(), "device": device, "threads": threads}
    metadata |= {"embedding_size": EMBEDDING_SIZE, "heads": HEADS, "steps": steps, "rounds": rounds, "dtype": "float32"}
    kept = {"metadata": metadata, "results": results, "resnet18": added}
    if out is not None:
        Path(out).write_text(json.dumps(kept, indent=1) + "\n")
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=None, help="JSON file")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(*json.loads(args.measure))))
    else:
        main(device=args.device, out=args.out)
