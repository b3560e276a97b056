"""Does the name of a character help to recognize it? Softmax with margins from Unicode names.

Run: python examples/adaptive_margin.py (no download; about three minutes on two CPU cores).

Four losses differ in nothing but the margin that a sample keeps from the proxies of other characters: none, the same
from all, more from characters with other names ("distance"), more from characters with similar names ("similarity").
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from tqdm import tqdm

from pml_ext import class_embeddings
from pml_ext.datasets import Glyphs
from pml_ext.losses import AdaptiveAdditiveMarginLoss

EMBEDDING_SIZE, BATCH_SIZE = 64, 128
METRICS = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R"}


def make_losses(num_classes, text):
    """Return the losses to compare; the constant margin is the mean of the adaptive ones."""

    def make(**kwargs):
        return AdaptiveAdditiveMarginLoss(num_classes, EMBEDDING_SIZE, **kwargs)

    distance = make(class_embeddings=text, direction="distance")
    margins = distance.get_margins(torch.arange(num_classes))
    mean = margins.sum().item() / (num_classes * (num_classes - 1))
    return {
        "no margin": make(),
        f"constant margin {mean:.2f}": make(base_margin=mean),
        "distance": distance,
        "similarity": make(class_embeddings=text, direction="similarity"),
    }


def make_trunk(width):
    """Return a convolutional network for 32 x 32 images."""
    layers = []
    for i, o in pairwise([1, width, 2 * width, 4 * width]):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, EMBEDDING_SIZE))


def train(trunk, loss_func, images, labels, epochs):
    """Train as usual with PML. The proxies are parameters of the loss: the optimizer gets them too."""
    sampler = MPerClassSampler(labels, m=4, batch_size=BATCH_SIZE, length_before_new_iter=len(labels))
    groups = [{"params": trunk.parameters(), "lr": 2e-3}, {"params": loss_func.parameters(), "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    for _ in range(epochs):
        trunk.train()
        for batch in torch.tensor(list(sampler)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss_func(trunk(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.inference_mode()
def evaluate(trunk, images, labels):
    """Return P@1 and MAP@R, every image being a query against all others."""
    trunk.eval()
    embeddings = nn.functional.normalize(torch.cat([trunk(batch) for batch in images.split(512)]))
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(embeddings, labels)


def draw(margins, names, results, path):
    """Draw the margins of some characters and MAP@R of each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(1.2, 1))
    image = axes[0].imshow(margins, cmap="viridis")
    axes[0].set_yticks(range(len(names)), names, fontsize=6)
    axes[0].set_xticks([])
    axes[0].set_title('margins, "distance"')
    figure.colorbar(image, ax=axes[0])
    for row, of_seeds in enumerate(results.values()):
        values = [100 * one["mean_average_precision_at_r"] for one in of_seeds]
        axes[1].plot(values, [row] * len(values), "o", alpha=0.7)
        axes[1].plot([np.mean(values)], [row], "k|", markersize=20)
    axes[1].set_yticks(range(len(results)), list(results))
    axes[1].invert_yaxis()
    axes[1].set_xlabel("MAP@R on unseen characters, percent; |: mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(epochs=8, seeds=3, text_model="tfidf", samples_per_class=16, width=24, out="."):
    """Return the metrics on unseen characters, a list over seeds for each loss."""
    train_set = Glyphs("train", samples_per_class=samples_per_class)
    test_set = Glyphs("test", samples_per_class=samples_per_class)
    train_images, test_images = (s.data[:, None].float() / 255 for s in (train_set, test_set))
    text = class_embeddings.from_text(train_set.class_names, model=text_model)

    results = {name: [] for name in make_losses(train_set.num_classes, text)}
    with tqdm(total=seeds * len(results), unit="training") as bar:
        for seed in range(seeds):
            for name in results:
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
                trunk = make_trunk(width)
                loss_func = make_losses(train_set.num_classes, text)[name]
                nn.init.normal_(loss_func.proxies, generator=torch.Generator().manual_seed(seed))  # the same for all
                train(trunk, loss_func, train_images, train_set.targets, epochs)
                results[name].append(evaluate(trunk, test_images, test_set.targets))
                bar.set_postfix_str(f"{name}: P@1 {results[name][-1]['precision_at_1']:.3f}")
                bar.update()

    print(f"\n{test_set.num_classes} unseen characters, {epochs} epochs, names by {text_model}")
    print(
        f"{'percent, mean (deviation) of ' + str(seeds) + ' seeds':<40}" + "".join(f"{m:>14}" for m in METRICS.values())
    )
    for name, of_seeds in results.items():
        values = [[100 * one[metric] for one in of_seeds] for metric in METRICS]
        print(f"{name:<40}" + "".join(f"{np.mean(v):>8.1f} ({np.std(v, ddof=min(1, seeds - 1)):.1f})" for v in values))

    shown = torch.linspace(0, train_set.num_classes - 1, 30).long()
    margins = make_losses(train_set.num_classes, text)["distance"].get_margins(shown)[:, shown].numpy()
    path = Path(out) / "adaptive_margin.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(margins, [train_set.class_names[i].lower() for i in shown.tolist()], results, path)
    print(f"picture: {path}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text-model", default="tfidf", help='"tfidf", or a model for class_embeddings.from_text')
    parser.add_argument("--out", default=".", help="folder for the picture")
    main(**vars(parser.parse_args()))
