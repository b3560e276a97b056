"""The whole batch's loss under Lightning Fabric (pip install lightning-fabric).

Run: python examples/distributed_fabric.py --devices 2

The model goes through ``fabric.setup``; the loss is wrapped and needs nothing else. Compare with
examples/train_distributed.py, which has checkpoints and prints retrieval figures.
"""

import argparse
import gc

import numpy as np
import torch
from lightning_fabric import Fabric
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn

from pml_ext.datasets import Glyphs
from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import HybridLoss

BATCH_SIZE = 128  # of all processes together


def main(epochs=2, devices=1, accelerator="cpu", samples_per_class=8):
    """Return the mean loss of each epoch."""
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    glyphs = Glyphs("train", samples_per_class=samples_per_class)
    images, labels = glyphs.data[:, None].float() / 255, glyphs.targets - glyphs.targets.min()
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 128), nn.ReLU(), nn.Linear(128, 64))
    loss_func = DistributedLossWrapper(HybridLoss(int(labels.max()) + 1, 64).to(fabric.device))
    optimizer = torch.optim.AdamW(
        [{"params": trunk.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    model, optimizer = fabric.setup(trunk, optimizer)
    means = []
    for epoch in range(epochs):
        np.random.seed(epoch)  # noqa: NPY002 (PML's sampler draws from it: the same batches on all processes)
        sampler = MPerClassSampler(labels, m=4, batch_size=BATCH_SIZE, length_before_new_iter=len(labels))
        losses = []
        for batch in torch.tensor(list(sampler)).split(BATCH_SIZE):
            own = batch.tensor_split(fabric.world_size)[fabric.global_rank]  # this process's part
            loss = loss_func(model(images[own].to(fabric.device)), labels[own])
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        fabric.print(f"epoch {epoch + 1}, {fabric.world_size} processes: loss {means[-1]:.3f}")
    fabric.barrier()  # or the process that keeps the others together might end before them
    del model, fabric  # they hold the group, whose threads must end before Python does
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu", help='"cpu" or "cuda"')
    main(**vars(parser.parse_args()))
