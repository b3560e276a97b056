"""What splitting the classes over ranks saves and costs; run: python benchmarks/distributed.py.

One training step (forward, backward, AdamW) of losses with proxies: in one process; on two gloo ranks that both have
all proxies; on two that have half of them each. Memory is the peak of a rank above what it had before the loss was
made, bytes are those of the tensors that a rank hands to torch.distributed in a step. ``--out FILE`` keeps the figures.
"""

import gc
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import harness
import torch
import torch.distributed as dist
from harness import make_parser, markdown_table, metadata, peak_since, save, start_peak, time_in_turn
from tqdm import tqdm

from pml_ext.strict_json import strict_json

BATCH_SIZE, EMBEDDING_SIZE = 128, 128  # of all ranks together
WAYS = {"one process": 1, "two ranks, all classes on each": 2, "two ranks, classes split": 2}
LOSSES = ("ProxyAnchorLoss", "AdaptiveAdditiveMarginLoss")
GPUS = (8, 64, 512)


def count_bytes(counter):
    """Count the bytes of the tensors that are handed to collectives."""

    def counted(call, *tensors, **kwargs):
        counter[call.__name__] = counter.get(call.__name__, 0) + tensors[-1].nbytes
        return call(*tensors, **kwargs)

    def reduced(call, tensor, *args, **kwargs):
        counter[call.__name__] = counter.get(call.__name__, 0) + tensor.nbytes
        return call(tensor, *args, **kwargs)

    dist.all_gather_into_tensor = partial(counted, dist.all_gather_into_tensor)
    dist.all_reduce = partial(reduced, dist.all_reduce)


def worker(rank, way, name, num_classes, steps, folder):
    """Write what this rank measures."""
    import pml_ext.losses
    from pml_ext.distributed import DistributedLossWrapper, sharding  # noqa: F401 (its imports are not the loss's memory)

    world = WAYS[way]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    own = torch.arange(BATCH_SIZE).tensor_split(world)[rank]
    emb = torch.randn(BATCH_SIZE, EMBEDDING_SIZE)[own].requires_grad_()
    labels = torch.randint(num_classes, (BATCH_SIZE // 4,)).repeat_interleave(4)[own]
    start = start_peak()
    group = dist.group.WORLD if "split" in way else None
    loss_func = getattr(pml_ext.losses, name)(num_classes, EMBEDDING_SIZE, process_group=group)
    wrapped = DistributedLossWrapper(loss_func) if world > 1 else loss_func
    optimizer = torch.optim.AdamW(loss_func.parameters(), lr=1e-3, foreach=False)

    def step():
        optimizer.zero_grad()
        wrapped(emb, labels).backward()
        optimizer.step()

    seconds = time_in_turn({way: step}, steps, before=dist.barrier if world > 1 else None)[way]
    counter = {}
    count_bytes(counter)
    step()
    measured = {"seconds": seconds, "peak_mb": peak_since(start), "bytes": sum(counter.values())}
    (Path(folder) / f"{rank}.json").write_text(strict_json(measured))
    if world > 1:
        del group, wrapped, loss_func, optimizer, step  # what holds the connections must be gone before they are closed
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def measure(way, name, num_classes, steps):
    """Return what the first rank measures, and the largest peak of all."""
    with tempfile.TemporaryDirectory() as folder:
        world = WAYS[way]
        torch.multiprocessing.start_processes(
            worker, (way, name, num_classes, steps, folder), world, start_method=harness.START_METHOD
        )
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    return ranks[0] | {"peak_mb": max(one["peak_mb"] for one in ranks)}


def expected_bytes(name):
    """Return what a rank should hand over in a step with split classes, by arithmetic."""
    rows = BATCH_SIZE // 2
    gathered = rows * EMBEDDING_SIZE * 4 + rows * 8 + 11 * 8  # own embeddings, labels, the sizes
    gradient = BATCH_SIZE * EMBEDDING_SIZE * 4
    values = [2 * 4] if name == "ProxyAnchorLoss" else 3 * [BATCH_SIZE * 4]  # two sums; own logit, largest and sum
    confirmed = (len(values) + 1) * 2 * 8  # that no rank has failed, ahead of each exchange and at the end
    return gathered + gradient + sum(values) + confirmed


def main(sizes=(100_000, 1_000_000), losses=LOSSES, steps=3, out=None):
    """Return the metadata and a row for each loss, size and way; print them as tables."""
    results, lines = [], []
    jobs = [(size, name, way) for size in sizes for name in losses for way in WAYS]
    for size, name, way in tqdm(jobs, desc="measurements", file=sys.stderr):
        measured = measure(way, name, size, steps)
        milliseconds, peak, sent = 1e3 * statistics.median(measured["seconds"]), measured["peak_mb"], measured["bytes"]
        if WAYS[way] == 1:
            alone = peak
        row = {"num_classes": size, "loss": name, "way": way, "ms": round(milliseconds, 1)}
        results.append(row | {"peak_mb": round(peak), "share": round(peak / alone, 2), "bytes": sent})
        cells = [f"{size:,}", name, way, f"{milliseconds:.0f}", f"{peak:.0f}", f"{peak / alone:.2f}", f"{sent:,}"]
        lines.append([*cells, f"{expected_bytes(name):,}" if "split" in way else ""])
    titles = ["classes", "loss", "way", "ms", "peak MB of a rank", "/ one process", "bytes sent", "by arithmetic"]
    print(markdown_table(titles, lines, numbers=5))

    print("\nBy arithmetic, not measured: 10,000,000 classes, width 512, float32, AdamW, 64 rows a GPU\n")
    lines = []
    for gpus in (1, *GPUS):
        table = 4 * 1e7 * 512 * 4 / gpus / 1e9
        lines.append([str(gpus), f"{table:.2f}", f"{gpus * 64 * 512 * 4 / 1e6:.1f}"])
    titles = ["GPUs", "proxies, gradient and optimizer state of a GPU, GB", "embeddings gathered in a step, MB"]
    print(markdown_table(titles, lines, numbers=3))
    about = {"backend": "gloo", "threads per rank": 1, "batch_size": BATCH_SIZE, "embedding_size": EMBEDDING_SIZE}
    about = metadata(threads=1, **about, steps=steps, dtype="float32")
    return save(out, {"metadata": about, "results": results})


if __name__ == "__main__":
    main(**vars(make_parser(__doc__, "--out").parse_args()))
