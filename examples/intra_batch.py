"""What do messages inside the batch add? Cross-entropy alone, with a refiner, and with refinement at test time.

Run: python examples/intra_batch.py (no download; about seven minutes on two CPU cores).

All get the same network, budget, batches of few classes with many samples, RAdam and seeds; they are compared on
characters that none of them has seen. "Without messages" is the control: the same refiner and second classifier, but no
sample hears of another. "Mean of the same neighbors" is that of the last row: neighbors, but no refiner.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from tqdm import tqdm

from pml_ext.datasets import Glyphs
from pml_ext.losses import IntraBatchLoss
from pml_ext.neighbors import neighbor_groups, refine_with_neighbors
from pml_ext.trunks import IntraBatchRefiner
from pml_ext.visualization import batch_attention

EMBEDDING_SIZE, CLASSES, SAMPLES = 128, 10, 8  # of a batch
METRICS = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R", "NMI": "NMI"}


def make_trunk(width):
    """Return a small convolutional network, grayscale images to EMBEDDING_SIZE numbers."""
    layers, channels = [], 1
    for out in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, EMBEDDING_SIZE))


class Alone(IntraBatchRefiner):
    """A refiner without messages."""

    def forward(self, embeddings):
        return super().forward(embeddings, edge_index=torch.empty(2, 0, dtype=torch.long))


TRAININGS = {"cross-entropy": None, "+ refiner without messages": Alone, "+ refiner": IntraBatchRefiner}


def make_loss(num_classes, refiner):
    """Return the loss; layers and heads are the authors' setting for CUB."""
    if refiner is None:
        return IntraBatchLoss(num_classes, EMBEDDING_SIZE, refined_weight=0)
    return IntraBatchLoss(num_classes, EMBEDDING_SIZE, refiner(EMBEDDING_SIZE, num_layers=1, heads=2))


def batches(labels):
    """Return the indices of an epoch's batches."""
    size = CLASSES * SAMPLES
    sampler = MPerClassSampler(labels, m=SAMPLES, batch_size=size, length_before_new_iter=max(len(labels), size))
    return torch.tensor(list(sampler)).split(size)


def train(trunk, loss_func, images, labels, epochs):
    """Train with one learning rate for all, which falls to a tenth after three quarters of the epochs."""
    parameters = [p for module in (trunk, loss_func) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.RAdam(parameters, lr=1e-3, weight_decay=1e-5, decoupled_weight_decay=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, 3 * epochs // 4)])
    trunk.train()
    loss_func.train()
    for _ in range(epochs):
        for batch in batches(labels):
            optimizer.zero_grad()
            loss_func(trunk(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()


@torch.inference_mode()
def embed(trunk, images):
    """Return the embeddings, of length 1."""
    trunk.eval()
    return nn.functional.normalize(torch.cat([trunk(batch) for batch in images.split(256)]))


def evaluate(embeddings, labels):
    """Return the metrics, every image being a query against all others."""
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(nn.functional.normalize(embeddings), labels)


def main(epochs=15, seeds=3, width=32, samples_per_class=16, out="."):
    """Return the metrics on unseen classes, a list over seeds for each row."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data = {}
    for split in ("train", "test"):
        glyphs = Glyphs(split, samples_per_class=samples_per_class)
        data[split] = glyphs.data[:, None].float() / 255, glyphs.targets - glyphs.targets.min()
    images, labels = data["train"]
    test_images, test_labels = data["test"]
    at_test_time = ("+ mean of the same neighbors", "+ refinement at test time")
    results = {name: [] for name in (*TRAININGS, *at_test_time)}
    with tqdm(total=len(TRAININGS) * seeds, unit="training") as bar:
        for seed in range(seeds):
            for name, refiner in TRAININGS.items():
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
                trunk = make_trunk(width)
                loss_func = make_loss(int(labels.max()) + 1, refiner)
                train(trunk, loss_func, images, labels, epochs)
                embeddings = embed(trunk, test_images)
                results[name].append(evaluate(embeddings, test_labels))
                bar.set_postfix_str(f"{name}: P@1 {results[name][-1]['precision_at_1']:.3f}")
                bar.update()
                if refiner is IntraBatchRefiner:
                    trained, raw = loss_func.refiner, embeddings
            means = raw[neighbor_groups(raw, k1=30, size=8)].mean(1)  # of the same neighbors, without the refiner
            refined = refine_with_neighbors(trained, raw, k1=30, size=8)
            for name, changed in zip(at_test_time, (means, refined), strict=True):
                results[name].append(evaluate(changed, test_labels))
    batch = batches(test_labels)[0]
    weights = trained.attention_weights(raw[batch])[-1]
    batch_attention(weights, test_labels[batch], path=out / "intra_batch_attention.png")

    print(f"\n{len(test_labels.unique())} unseen classes, {epochs} epochs, batches of {CLASSES} x {SAMPLES}")
    print(f"{f'percent, mean (deviation) of {seeds} seeds':<40}" + "".join(f"{m:>14}" for m in METRICS.values()))
    for name, of_seeds in results.items():
        values = [[100 * one[metric] for one in of_seeds] for metric in METRICS]
        print(f"{name:<40}" + "".join(f"{np.mean(v):>8.1f} ({np.std(v, ddof=min(1, seeds - 1)):.1f})" for v in values))
    print(f"attention inside a batch of unseen classes: {out / 'intra_batch_attention.png'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--out", default=".", help="folder for the picture")
    main(**vars(parser.parse_args()))
