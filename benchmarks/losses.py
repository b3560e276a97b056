"""Forward + backward time of HybridLoss and its parts beside PML's losses; run: python benchmarks/losses.py.

The rows of one batch size share embeddings, labels and proxies, and are timed in turn, so that the ratio is fair even
where the machine's speed changes. ``--out benchmarks/results/losses-cpu.json`` keeps the figures.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import pytorch_metric_learning
import torch
from pytorch_metric_learning import losses
from torch.utils.benchmark import Timer
from tqdm import tqdm

from pml_ext.losses import HybridLoss, MultiSimilarityLoss, ProxyAnchorLoss

NUM_CLASSES = 100


def make_pairs(embedding_size):
    """Return name -> (PML's loss, ours), of equal value."""
    pml_ms, pml_pa = losses.MultiSimilarityLoss(), losses.ProxyAnchorLoss(NUM_CLASSES, embedding_size)
    ours_pa = ProxyAnchorLoss(NUM_CLASSES, embedding_size)
    hybrid = HybridLoss(NUM_CLASSES, embedding_size, pair_loss=MultiSimilarityLoss(), proxy_weight=0.1)
    for loss_func in (ours_pa, hybrid.proxy_loss):
        loss_func.load_state_dict(pml_pa.state_dict())
    return {
        "MultiSimilarityLoss": (pml_ms, MultiSimilarityLoss()),
        "ProxyAnchorLoss": (pml_pa, ours_pa),
        "HybridLoss (PML: MultipleLosses)": (losses.MultipleLosses([pml_ms, pml_pa], weights=[1.0, 0.1]), hybrid),
    }


def peak_memory(loss_func, emb, labels):
    """Return the peak of CUDA memory during forward and backward, in MB above what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_func(emb, labels).backward()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def main(batch_sizes=(64, 256, 1024), embedding_size=512, repeats=15, threads=2, device="cpu", out=None):
    """Return the metadata and a row for each loss and batch size; print and write them as JSON."""
    torch.manual_seed(0)
    results = []
    for batch_size in tqdm(batch_sizes, desc="batch sizes"):
        emb = torch.randn(batch_size, embedding_size, device=device, requires_grad=True)
        labels = torch.arange(batch_size, device=device) // 4 % NUM_CLASSES
        for name, pair in make_pairs(embedding_size).items():
            pair = [loss_func.to(device) for loss_func in pair]
            torch.testing.assert_close(pair[0](emb, labels), pair[1](emb, labels))
            timers = [
                Timer("f(emb, labels).backward()", globals={"f": f, "emb": emb, "labels": labels}, num_threads=threads)
                for f in pair
            ]
            number = max(1, int(0.1 / timers[0].timeit(3).mean))  # about 0.1 s a repeat
            times = [[timer.timeit(number).mean * 1e3 for timer in timers] for _ in range(repeats)]
            columns = dict(zip(("pml_ms", "ms"), zip(*times, strict=True), strict=True))
            columns["ratio"] = [ours / theirs for theirs, ours in times]
            row = {"loss": name, "batch_size": batch_size}
            for key, values in columns.items():
                low, median, high = statistics.quantiles(values, n=4)
                row |= {key: round(median, 3), f"{key}_quartiles": [round(low, 3), round(high, 3)]}
            if emb.is_cuda:
                row |= {"pml_peak_mb": peak_memory(pair[0], emb, labels), "peak_mb": peak_memory(pair[1], emb, labels)}
            results.append(row)
    metadata = {"torch": torch.__version__, "pytorch-metric-learning": pytorch_metric_learning.__version__}
    metadata |= {"device": device, "machine": platform.machine(), "threads": threads, "repeats": repeats}
    metadata |= {"embedding_size": embedding_size, "num_classes": NUM_CLASSES, "dtype": "float32"}
    found = {"metadata": metadata, "results": results}
    print(json.dumps(found, indent=1))
    if out is not None:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=None, help="JSON file")
    main(**vars(parser.parse_args()))
