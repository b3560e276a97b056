"""Forward + backward time of HybridLoss and its parts beside PML's losses; run: python benchmarks/losses.py.

The rows of one batch size share embeddings, labels and proxies, and are timed in turn, so that the ratio is fair even
where the machine's speed changes. ``--out benchmarks/results/losses-cpu.json`` keeps the figures.
"""

from functools import partial

import torch
from harness import make_parser, median_and_quartiles, metadata, peak_since, save, start_peak, time_in_turn
from pytorch_metric_learning import losses
from tqdm import tqdm

from pml_ext.losses import HybridLoss, MultiSimilarityLoss, ProxyAnchorLoss
from pml_ext.strict_json import strict_json

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


def step(loss_func, emb, labels):
    loss_func(emb, labels).backward()


def peak_memory(loss_func, emb, labels):
    """Return the peak of CUDA memory during forward and backward, in MB above what was there before."""
    start = start_peak("cuda")
    step(loss_func, emb, labels)
    return round(peak_since(start, "cuda"), 1)


def main(batch_sizes=(64, 256, 1024), embedding_size=512, repeats=15, threads=2, device="cpu", out=None):
    """Return the metadata and a row for each loss and batch size; print and write them as JSON."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = []
    for batch_size in tqdm(batch_sizes, desc="batch sizes"):
        emb = torch.randn(batch_size, embedding_size, device=device, requires_grad=True)
        labels = torch.arange(batch_size, device=device) // 4 % NUM_CLASSES
        for name, pair in make_pairs(embedding_size).items():
            pml, ours = (loss_func.to(device) for loss_func in pair)
            torch.testing.assert_close(pml(emb, labels), ours(emb, labels))
            candidates = {"pml_ms": partial(step, pml, emb, labels), "ms": partial(step, ours, emb, labels)}
            number = max(1, int(0.1 / min(time_in_turn(candidates, 3, device)["pml_ms"])))  # about 0.1 s a repeat
            columns = {
                key: [1e3 * value for value in values]
                for key, values in time_in_turn(candidates, repeats, device, number).items()
            }
            columns["ratio"] = [a / b for a, b in zip(columns["ms"], columns["pml_ms"], strict=True)]
            row = {"loss": name, "batch_size": batch_size}
            for key, values in columns.items():
                row[key], row[f"{key}_quartiles"] = median_and_quartiles(values, 3)
            if emb.is_cuda:
                row |= {"pml_peak_mb": peak_memory(pml, emb, labels), "peak_mb": peak_memory(ours, emb, labels)}
            results.append(row)
    sizes = {"repeats": repeats, "embedding_size": embedding_size, "num_classes": NUM_CLASSES, "dtype": "float32"}
    kept = save(out, {"metadata": metadata(device, threads, **sizes), "results": results})
    print(strict_json(kept, indent=1))
    return kept


if __name__ == "__main__":
    parser = make_parser(__doc__, "--device", "--out")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 256, 1024])
    main(**vars(parser.parse_args()))
