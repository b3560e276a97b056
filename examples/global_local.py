"""What do two levels, two kinds of pooling and second-order attention add? Four heads on one backbone.

Run: python examples/global_local.py (no download; about ten minutes on two CPU cores), or with images of yours:
python examples/global_local.py --train FOLDER --test FOLDER, one folder a class, the classes of both disjoint.

All heads get the same backbone, budget, loss (HybridLoss) and seeds; they are compared on characters that none of them
has seen.
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
from pml_ext.losses import HybridLoss
from pml_ext.trunks import GlobalLocalTrunk, param_groups
from pml_ext.visualization import attention_overlay, plot_curves

EMBEDDING_SIZE, BATCH_SIZE, IMAGE_SIZE = 64, 128, 32
METRICS = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R"}


class PlainTrunk(nn.Module):
    """The usual head: average of the last level, one linear map."""

    def __init__(self, trunk):
        super().__init__()
        self.backbone, self.pool = trunk.backbone, trunk.global_head[1]
        self.linear = nn.Linear(trunk.global_head[2].in_features, EMBEDDING_SIZE)

    def forward(self, images):
        return self.linear(self.pool(self.backbone(images)[1]))


def make_trunks(backbone, in_chans):
    """Return a function that makes each network."""

    def make(attention=None, pool_type="avg+max"):
        kwargs = {"in_chans": in_chans, "output_stride": 8}  # small images: keep maps of 4 x 4
        return GlobalLocalTrunk(backbone, EMBEDDING_SIZE, attention=attention, pool_type=pool_type, **kwargs)

    return {
        "one level, average": lambda: PlainTrunk(make(pool_type="avg")),
        "two levels, avg+max": make,
        "+ attention, printed": lambda: make("printed"),
        "+ attention, solar": lambda: make("solar"),
    }


def load(folder, split, samples_per_class):
    """Return images (N, C, H, W) in 0 to 1 and labels 0, 1, ..., of Glyphs or of a folder with a folder a class."""
    if folder is None:
        dataset = Glyphs(split, samples_per_class=samples_per_class, image_size=IMAGE_SIZE)
        return dataset.data[:, None].float() / 255, dataset.targets - dataset.targets.min()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    size = (IMAGE_SIZE, IMAGE_SIZE)
    transform = v2.Compose([v2.Resize(size), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    pairs = [*ImageFolder(folder, transform)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def train(trunk, loss_func, images, labels, epochs):
    """Train; return the mean loss of each epoch."""
    batch_size = min(BATCH_SIZE, 4 * len(labels.unique()))
    sampler = MPerClassSampler(labels, m=4, batch_size=batch_size, length_before_new_iter=max(len(labels), batch_size))
    optimizer = torch.optim.AdamW(param_groups(trunk, loss_func, lr=1e-3, proxy_lr=1e-2))
    curve = []
    for _ in range(epochs):
        trunk.train()
        losses = []
        for batch in torch.tensor(list(sampler)).split(batch_size):
            loss = loss_func(trunk(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curve.append(float(np.mean(losses)))
    return curve


@torch.inference_mode()
def evaluate(trunk, images, labels):
    """Return P@1 and MAP@R, every image being a query against all others."""
    trunk.eval()
    embeddings = nn.functional.normalize(torch.cat([trunk(batch) for batch in images.split(256)]))
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(embeddings, labels)


def draw_attention(trunk, images, path):
    """Draw images with the attention of both levels."""
    from matplotlib.figure import Figure

    maps = trunk.eval().attention_maps(images)
    figure = Figure(figsize=(1.4 * len(images), 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(attention_overlay(image, torch.zeros(1, 1), alpha=0))
        for row, attention in enumerate(maps, 1):
            axes[row, column].imshow(attention_overlay(image, attention[column], alpha=0.6))
    for row, title in enumerate(("image", "local level", "global level")):
        axes[row, 0].set_ylabel(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path)


def main(epochs=6, seeds=3, backbone="resnet10t", samples_per_class=8, train_folder=None, test_folder=None, out="."):
    """Return the metrics on unseen classes, a list over seeds for each network."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load(train_folder, "train", samples_per_class)
    test_images, test_labels = load(test_folder, "test", samples_per_class)
    makers = make_trunks(backbone, images.shape[1])
    results, curves = {name: [] for name in makers}, {}
    with tqdm(total=seeds * len(makers), unit="training") as bar:
        for seed in range(seeds):
            for name, make in makers.items():
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
                trunk, loss_func = make(), HybridLoss(int(labels.max()) + 1, EMBEDDING_SIZE)
                curves[name] = train(trunk, loss_func, images, labels, epochs)
                results[name].append(evaluate(trunk, test_images, test_labels))
                bar.set_postfix_str(f"{name}: P@1 {results[name][-1]['precision_at_1']:.3f}")
                bar.update()
                if name == "+ attention, printed":
                    shown = torch.linspace(0, len(test_images) - 1, 8).long()
                    draw_attention(trunk, test_images[shown], out / "global_local_attention.png")

    print(f"\n{len(test_labels.unique())} unseen classes, {backbone}, {epochs} epochs")
    print(f"{f'percent, mean (deviation) of {seeds} seeds':<40}" + "".join(f"{m:>14}" for m in METRICS.values()))
    for name, of_seeds in results.items():
        values = [[100 * one[metric] for one in of_seeds] for metric in METRICS]
        print(f"{name:<40}" + "".join(f"{np.mean(v):>8.1f} ({np.std(v, ddof=min(1, seeds - 1)):.1f})" for v in values))
    plot_curves(curves, ylabel=f"training loss, seed {seeds - 1}", path=out / "global_local_curves.png")
    print(f"pictures: {out / 'global_local_curves.png'}, {out / 'global_local_attention.png'}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--train", dest="train_folder", default=None, help="folder of training classes")
    parser.add_argument("--test", dest="test_folder", default=None, help="folder of other classes")
    parser.add_argument("--out", default=".", help="folder for the pictures")
    main(**vars(parser.parse_args()))
