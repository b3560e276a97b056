"""Train on several processes with the gradients of one, and go on where a killed run stopped.

Run: torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --out runs/glyphs
and after an interruption the same with --resume. Without torchrun it is one process with the same batches: the figures
are the same but for the batch norms of the network, whose statistics are those of a rank's own part.
"""

import argparse
import gc
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pml_ext.datasets import Glyphs
from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import HybridLoss

EMBEDDING_SIZE, BATCH_SIZE = 64, 128  # of all ranks together
METRICS = {"precision_at_1": "P@1", "r_precision": "R-precision", "mean_average_precision_at_r": "MAP@R"}


def make_trunk(width):
    """Return a small convolutional network, grayscale images to EMBEDDING_SIZE numbers."""
    layers, channels = [], 1
    for out in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, EMBEDDING_SIZE))


def batches(labels, seed):
    """Return the batches of an epoch, the same on all ranks: 4 images of each class."""
    np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
    sampler = MPerClassSampler(labels, m=4, batch_size=BATCH_SIZE, length_before_new_iter=len(labels))
    return [batch for batch in torch.tensor(list(sampler)).split(BATCH_SIZE) if len(batch) == BATCH_SIZE]


def save(path, epoch, **parts):
    """Write a checkpoint; a run killed meanwhile leaves the last one as it was."""
    torch.save({"epoch": epoch} | {name: part.state_dict() for name, part in parts.items()}, f"{path}.new")
    os.replace(f"{path}.new", path)


@torch.inference_mode()
def evaluate(trunk, images, labels):
    """Return the metrics, every image being a query against all others."""
    trunk.eval()
    embeddings = nn.functional.normalize(torch.cat([trunk(batch) for batch in images.split(256)]))
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(embeddings, labels)


def main(epochs=8, seed=0, width=24, samples_per_class=16, resume=False, out="runs/glyphs"):
    """Return the metrics on unseen classes (None on all ranks but the first)."""
    started_here = "RANK" in os.environ and not dist.is_initialized()
    if started_here:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    checkpoint = Path(out) / "checkpoint.pt"
    if rank == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if resume and not checkpoint.exists():
        raise SystemExit(f"--resume needs {checkpoint}, which is not there")
    images, labels = data("train", samples_per_class)
    torch.manual_seed(seed)
    trunk, loss_func = make_trunk(width), HybridLoss(int(labels.max()) + 1, EMBEDDING_SIZE)
    optimizer = torch.optim.AdamW(
        [{"params": trunk.parameters(), "lr": 2e-3}, {"params": loss_func.parameters(), "lr": 2e-2}]
    )
    model = trunk if world == 1 else DistributedDataParallel(trunk)
    whole_loss = DistributedLossWrapper(loss_func)
    first = 0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        first = state["epoch"]
        for name, part in (("trunk", trunk), ("loss", loss_func), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
    for epoch in range(first, epochs):
        model.train()
        progress = tqdm(batches(labels, 1000 * seed + epoch), desc=f"epoch {epoch + 1}", disable=rank != 0)
        for batch in progress:
            own = batch.tensor_split(world)[rank]
            optimizer.zero_grad()
            loss = whole_loss(model(images[own]), labels[own])
            loss.backward()
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if rank == 0:
            save(checkpoint, epoch + 1, trunk=trunk, loss=loss_func, optimizer=optimizer)
    metrics = None
    if rank == 0:
        test_images, test_labels = data("test", samples_per_class)
        metrics = evaluate(trunk, test_images, test_labels)
        print(f"{len(test_labels.unique())} unseen classes, {epochs} epochs, seed {seed}, {world} processes, percent")
        print("  ".join(f"{title} {100 * metrics[name]:.1f}" for name, title in METRICS.items()))
    if started_here:
        del model  # it holds the group, whose threads must end before Python does
        gc.collect()
        dist.destroy_process_group()
    return metrics


def data(split, samples_per_class):
    """Return images (N, 1, 28, 28) in 0 to 1, and labels 0, 1, ..."""
    glyphs = Glyphs(split, samples_per_class=samples_per_class)
    return glyphs.data[:, None].float() / 255, glyphs.targets - glyphs.targets.min()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", default="runs/glyphs", help="folder for the checkpoint")
    main(**vars(parser.parse_args()))
