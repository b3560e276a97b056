"""The whole batch's loss under HuggingFace Accelerate (pip install accelerate).

Run: torchrun --standalone --nproc-per-node 2 examples/distributed_accelerate.py
or, on GPUs, accelerate launch examples/distributed_accelerate.py

The model goes through ``accelerator.prepare``; the loss is wrapped and needs nothing else. Compare with
examples/train_distributed.py, which has checkpoints and prints retrieval figures.
"""

import argparse
import gc

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_ext.datasets import Glyphs
from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import HybridLoss

BATCH_SIZE = 64  # of each process


def main(epochs=2, samples_per_class=8):
    """Return the mean loss of each epoch."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)  # one sampler on all processes: Accelerate deals out its batches in turn
    glyphs = Glyphs("train", samples_per_class=samples_per_class)
    images, labels = glyphs.data[:, None].float() / 255, glyphs.targets - glyphs.targets.min()
    sampler = MPerClassSampler(labels, m=4, batch_size=BATCH_SIZE, length_before_new_iter=len(labels))
    loader = DataLoader(TensorDataset(images, labels), BATCH_SIZE, sampler=sampler, drop_last=True)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 128), nn.ReLU(), nn.Linear(128, 64))
    loss_func = DistributedLossWrapper(HybridLoss(int(labels.max()) + 1, 64).to(accelerator.device))
    optimizer = torch.optim.AdamW(
        [{"params": trunk.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    model, optimizer, loader = accelerator.prepare(trunk, optimizer, loader)
    means = []
    for epoch in range(epochs):
        losses = []
        for batch, batch_labels in loader:
            loss = loss_func(model(batch), batch_labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        accelerator.print(f"epoch {epoch + 1}, {accelerator.num_processes} processes: loss {means[-1]:.3f}")
    accelerator.wait_for_everyone()  # or the process that keeps the others together might end before them
    accelerator.end_training()
    del model, accelerator  # they hold the group, whose threads must end before Python does
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    main(**vars(parser.parse_args()))
