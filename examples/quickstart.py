"""Train a small network with HybridLoss on characters and search for characters it has never seen.

Run: python examples/quickstart.py (no download; about a minute on two CPU cores).
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from tqdm import tqdm

from pml_ext.datasets import Glyphs
from pml_ext.losses import HybridLoss
from pml_ext.visualization import plot_curves, retrieval_gallery

EMBEDDING_SIZE = 64
METRICS = {"precision_at_1": "P@1", "r_precision": "R-precision", "mean_average_precision_at_r": "MAP@R"}


def make_losses(num_classes):
    """Return the losses to compare. To swap PML's loss for ours is to change one line."""
    return {
        "PML MultiSimilarityLoss": losses.MultiSimilarityLoss(),
        "PML ProxyAnchorLoss": losses.ProxyAnchorLoss(num_classes, EMBEDDING_SIZE),
        "pml_ext HybridLoss": HybridLoss(num_classes, EMBEDDING_SIZE),
    }


def make_trunk(in_channels=1, width=24, embedding_size=EMBEDDING_SIZE):
    """Return a convolutional network for small images: four blocks, each halving the side, then a linear layer."""
    sizes = [in_channels, width, 2 * width, 2 * width, 4 * width]
    blocks = []
    for i, o in pairwise(sizes):
        blocks += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], embedding_size))


def train(trunk, loss_func, images, labels, epochs, after_epoch, batch_size=128):
    """Train as usual with PML: a sampler, the loss, and an optimizer for both the trunk's and the loss's parameters."""
    sampler = MPerClassSampler(labels, m=4, batch_size=batch_size, length_before_new_iter=len(labels))
    groups = [{"params": trunk.parameters(), "lr": 2e-3}, {"params": loss_func.parameters(), "lr": 2e-2}]
    optimizer = torch.optim.AdamW([group | {"params": list(group["params"])} for group in groups], weight_decay=1e-4)
    steps = epochs * (len(sampler) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps)
    for _ in range(epochs):
        trunk.train()
        total = 0.0
        for batch in torch.tensor(list(sampler)).split(batch_size):
            loss = loss_func(trunk(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        after_epoch(total / len(sampler))


@torch.inference_mode()
def embed(trunk, images):
    """Return the embeddings of all images."""
    trunk.eval()
    return torch.cat([trunk(batch) for batch in images.split(512)])


def evaluate(embeddings, labels):
    """Return P@1, R-precision and MAP@R, every image being a query against all others."""
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(nn.functional.normalize(embeddings), labels)


def main(epochs=8, seed=0, samples_per_class=16, width=24, out="."):
    """Return the table: name of the method to its metrics on unseen classes."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train_set = Glyphs("train", samples_per_class=samples_per_class)
    test_set = Glyphs("test", samples_per_class=samples_per_class)
    train_images, test_images = (s.data[:, None].float() / 255 for s in (train_set, test_set))
    print(f"train: {train_set}\ntest, all unseen: {test_set}")

    table = {"raw pixels": evaluate(test_images.flatten(1), test_set.targets)}
    curves, embeddings = {}, {}
    with tqdm(total=epochs * len(make_losses(train_set.num_classes)), unit="epoch") as bar:
        for name in make_losses(train_set.num_classes):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
            trunk = make_trunk(width=width)
            loss_func = make_losses(train_set.num_classes)[name]
            curves[name] = []

            def after_epoch(loss, name=name):
                curves[name].append(loss)
                bar.set_postfix_str(f"{name}: loss {loss:.3f}")
                bar.update()

            train(trunk, loss_func, train_images, train_set.targets, epochs, after_epoch)
            embeddings[name] = embed(trunk, test_images)
            table[name] = evaluate(embeddings[name], test_set.targets)

    print(f"\n{test_set.num_classes} unseen characters, {epochs} epochs, seed {seed}")
    print(f"{'percent':<24}" + "".join(f"{head:>13}" for head in METRICS.values()))
    for name, row in table.items():
        print(f"{name:<24}" + "".join(f"{100 * row[metric]:>13.1f}" for metric in METRICS))

    shown = embeddings["pml_ext HybridLoss"]
    retrieval_gallery(shown, test_set.targets, test_set.data, path=out / "quickstart_gallery.png")
    curves = {name: [value / values[0] for value in values] for name, values in curves.items()}  # of different units
    plot_curves(curves, ylabel="training loss / that of the first epoch", path=out / "quickstart_curves.png")
    print(f"pictures: {out / 'quickstart_gallery.png'}, {out / 'quickstart_curves.png'}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=".", help="folder for the pictures")
    main(**vars(parser.parse_args()))
