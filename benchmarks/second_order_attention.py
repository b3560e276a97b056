"""Time and peak memory of SecondOrderAttention; run: python benchmarks/second_order_attention.py.

Forward and backward on one feature map, each row in processes of its own: ours, the same block with an explicit softmax
(Q K^T) V, and timm's NonLocalAttn, a relative with fewer channels inside. ``--out FILE`` keeps the figures.
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

METHODS = {
    "ours": "SecondOrderAttention",
    "explicit": "explicit matrix",
    "timm": "timm NonLocalAttn, 1/8 of the channels",
}
SIZES = ((14, 1024), (28, 512), (56, 64))  # side and channels: conv4 and conv3 of ResNet-50, and a large map
BATCH_SIZE = 8


def make(method, channels):
    """Return the block."""
    if method == "timm":
        from timm.layers import NonLocalAttn

        return NonLocalAttn(channels)
    from pml_ext.trunks import SecondOrderAttention

    block = SecondOrderAttention(channels, attention_scale=channels**-0.5)
    if method == "ours":
        return block

    class Explicit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, features):
            value = block.value(features).flatten(2).transpose(1, 2)
            gathered = (block.attention_map(features) @ value).transpose(1, 2)
            return features + block.out(gathered.reshape(features.shape))

    return Explicit()


def resident(field):
    """Return VmRSS or VmHWM (its peak) of this process in MB; Linux with glibc only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def measure(method, side, channels, steps, threads, device):
    """Return the seconds of each step and the peak of memory above what was there before."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def step(block, features):
        features.grad = None
        block.zero_grad()
        block(features).sum().backward()

    block = make(method, channels).to(device)
    step(block, torch.randn(BATCH_SIZE, channels, 4, 4, device=device, requires_grad=True))
    features = torch.randn(BATCH_SIZE, channels, side, side, device=device, requires_grad=True)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # from here on is the peak
        before = resident("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step(block, features)
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": times[1:], "peak_mb": peak - before}


def run_alone(arguments):
    """Return what ``measure`` finds in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(sizes=SIZES, steps=10, rounds=3, threads=2, device="cpu", out=None):
    """Return the metadata and a row for each size and method; print them as a table."""
    found = {}
    jobs = [(size, method) for size in sizes for _ in range(rounds) for method in METHODS]
    for size, method in tqdm(jobs, desc="measurements"):
        one = run_alone([method, *size, steps, threads, device])
        row = found.setdefault((size, method), {"seconds": [], "peak_mb": []})
        row["seconds"] += one["seconds"]
        row["peak_mb"].append(one["peak_mb"])
    results = []
    print(f"| map x channels, batch {BATCH_SIZE} | | ms | quartiles | peak MB | peak / explicit |")
    print("| --- | --- | --: | --: | --: | --: |")
    for ((side, channels), method), row in found.items():
        low, median, high = (1e3 * x for x in statistics.quantiles(row["seconds"], n=4))
        peak = statistics.median(row["peak_mb"])
        share = peak / statistics.median(found[(side, channels), "explicit"]["peak_mb"])
        cells = [f"{side} x {side} x {channels}", METHODS[method], f"{median:.1f}", f"{low:.1f} to {high:.1f}"]
        print("| " + " | ".join([*cells, f"{peak:.0f}", f"{share:.2f}"]) + " |")
        values = {"ms": round(median, 2), "quartiles": [round(low, 2), round(high, 2)], "peak_mb": round(peak, 1)}
        results.append({"side": side, "channels": channels, "method": method} | values)
    metadata = {"torch": torch.__version__, "device": device, "machine": platform.machine(), "threads": threads}
    metadata |= {"batch_size": BATCH_SIZE, "steps": steps, "rounds": rounds, "dtype": "float32"}
    kept = {"metadata": metadata, "results": results}
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
