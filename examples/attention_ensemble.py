"""What do masks and divergence add? One head against 4 and 8 learners of the same total size, with and without.

Run: python examples/attention_ensemble.py (no download; about eight minutes on two CPU cores).

All get the same backbone, number of images, loss (Multi-Similarity, for each learner) and seeds; they are compared on
characters that none of them has seen: the whole vector, and the learners one by one. M = 1 is a single learner with its
mask. Learners cost time: benchmarks/ensemble.py tells how much.
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
from pml_ext.learners import learner_similarity
from pml_ext.losses import EnsembleLoss, MultiSimilarityLoss
from pml_ext.trunks import AttentionEnsemble, param_groups
from pml_ext.visualization import mask_grid

EMBEDDING_SIZE, BATCH_SIZE, IMAGE_SIZE = 128, 128, 32
METRICS = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R"}


class SingleHead(nn.Module):
    """The same backbone with one linear map and no mask."""

    def __init__(self, ensemble):
        super().__init__()
        self.backbone = nn.Sequential(ensemble.stem, ensemble.head)
        self.linear = nn.Linear(ensemble.linear.in_features, EMBEDDING_SIZE)

    def forward(self, images):
        return self.linear(self.backbone(images))


def make_ensemble(backbone, num_learners):
    """Return the ensemble, cut behind layer2: masks of 4 x 4 positions and 128 channels."""
    size = (1, IMAGE_SIZE, IMAGE_SIZE)
    return AttentionEnsemble.from_backbone(
        backbone, "layer2", num_learners=num_learners, embedding_size=EMBEDDING_SIZE, input_size=size
    )


def rows(backbone, learners):
    """Return the name, the number of learners and a maker of trunk and loss for each row of the table."""
    table = {"single head": (1, lambda: (SingleHead(make_ensemble(backbone, 1)), MultiSimilarityLoss()))}
    for m in (1, *learners):
        for weight in (0.0, 1.0)[: min(m, 2)]:  # a single learner has no divergence

            def make(m=m, weight=weight):
                return make_ensemble(backbone, m), EnsembleLoss(MultiSimilarityLoss(), m, divergence_weight=weight)

            name = f"M = {m}" if m == 1 else f"M = {m}, {'with' if weight else 'no'} divergence"
            table[name] = (m, make)
    return table


def train(trunk, loss_func, images, labels, epochs):
    """Train on 4 images of each of BATCH_SIZE / 4 classes at a time."""
    batch_size = min(BATCH_SIZE, 4 * len(labels.unique()))
    sampler = MPerClassSampler(labels, m=4, batch_size=batch_size, length_before_new_iter=max(len(labels), batch_size))
    optimizer = torch.optim.AdamW(param_groups(trunk, lr=1e-3))
    trunk.train()
    for _ in range(epochs):
        for batch in torch.tensor(list(sampler)).split(batch_size):
            optimizer.zero_grad()
            loss_func(trunk(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.inference_mode()
def evaluate(trunk, images, labels, num_learners):
    """Return the metrics of the whole vector, their mean over learners, and the cosine between learners."""
    trunk.eval()
    embeddings = torch.cat([trunk(batch) for batch in images.split(256)])
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    metrics = calculator.get_accuracy(nn.functional.normalize(embeddings), labels)
    single = [
        calculator.get_accuracy(nn.functional.normalize(own), labels) for own in embeddings.chunk(num_learners, 1)
    ]
    metrics |= {f"single {name}": float(np.mean([one[name] for one in single])) for name in METRICS}
    return metrics | {"cosine": learner_similarity(embeddings, num_learners)}


def main(epochs=6, seeds=3, backbone="resnet10t", learners=(4, 8), samples_per_class=8, out="."):
    """Return the metrics on unseen classes, a list over seeds for each row."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    data = {}
    for split in ("train", "test"):
        glyphs = Glyphs(split, samples_per_class=samples_per_class, image_size=IMAGE_SIZE)
        data[split] = glyphs.data[:, None].float() / 255, glyphs.targets - glyphs.targets.min()
    table = rows(backbone, learners)
    results = {name: [] for name in table}
    with tqdm(total=seeds * len(table), unit="training") as bar:
        for seed in range(seeds):
            for name, (num_learners, make) in table.items():
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
                trunk, loss_func = make()
                train(trunk, loss_func, *data["train"], epochs)
                results[name].append(evaluate(trunk, *data["test"], num_learners))
                bar.set_postfix_str(f"{name}: P@1 {results[name][-1]['precision_at_1']:.3f}")
                bar.update()
    images = data["test"][0]
    shown = images[torch.linspace(0, len(images) - 1, 6).long()]
    mask_grid(shown, trunk.masks(shown), path=out / "attention_ensemble_masks.png")

    print(f"\n{len(data['test'][1].unique())} unseen classes, {backbone}, {epochs} epochs, {EMBEDDING_SIZE} numbers")
    titles = [*METRICS.values(), *(f"one: {m}" for m in METRICS.values()), "cosine"]
    print(f"{f'percent, mean (deviation) of {seeds} seeds':<40}" + "".join(f"{t:>14}" for t in titles))
    for name, of_seeds in results.items():
        columns = [*METRICS, *(f"single {metric}" for metric in METRICS)]
        cells = [_cell([100 * one[column] for one in of_seeds]) for column in columns]
        cosine = _cell([one["cosine"] for one in of_seeds], digits=2) if table[name][0] > 1 else ""
        print(f"{name:<40}" + "".join(f"{cell:>14}" for cell in [*cells, cosine]))
    print(f"masks of the last ensemble: {out / 'attention_ensemble_masks.png'}")
    return results


def _cell(values, digits=1):
    return f"{np.mean(values):.{digits}f} ({np.std(values, ddof=min(1, len(values) - 1)):.{digits}f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--learners", type=int, nargs="+", default=(4, 8))
    parser.add_argument("--out", default=".", help="folder for the picture")
    main(**vars(parser.parse_args()))
