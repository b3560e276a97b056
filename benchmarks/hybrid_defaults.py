"""Choose HybridLoss's defaults on validation classes; run from the repository's root.

python -m benchmarks.hybrid_defaults --data glyphs omniglot.npz cifar100.npz

A quarter of the training classes, drawn anew for each seed, is held out and searched after training on the rest; test
classes are not touched. An .npz holds ``images`` (uint8, N x H x W [x 3]), ``labels`` and ``split``. All rows of one
data set share trunk, budget and seeds. Learning rates are quickstart's, tuned for none of the rows; no augmentation.
"""

import json
import statistics
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning import losses
from tqdm import tqdm

from benchmarks.harness import make_parser, metadata, save
from examples.quickstart import METRICS, embed, evaluate, make_trunk, train
from pml_ext.datasets import Glyphs
from pml_ext.losses import HybridLoss, MultiSimilarityLoss

WIDTH, EMBEDDING_SIZE = 32, 64
DEFAULT = "MS(0.5) + 0.03 PA"


def make_losses(num_classes):
    """Return a function that makes the loss, for each row of the table."""
    rows = {f"MS({base})": lambda base=base: losses.MultiSimilarityLoss(base=base) for base in (0.5, 1.0)}
    rows["PA"] = lambda: losses.ProxyAnchorLoss(num_classes, EMBEDDING_SIZE)
    for base in (0.5, 1.0):
        for weight in (0.03, 0.1, 0.3, 1.0):
            rows[f"MS({base}) + {weight} PA"] = lambda base=base, weight=weight: HybridLoss(
                num_classes, EMBEDDING_SIZE, pair_loss=MultiSimilarityLoss(base=base), proxy_weight=weight
            )
    rows["paper, minus"] = lambda: HybridLoss.paper(num_classes, EMBEDDING_SIZE)
    rows["paper, printed"] = lambda: HybridLoss.paper(num_classes, EMBEDDING_SIZE, negative_sign="printed")
    return rows


def load(source):
    """Return training images (N, C, H, W) in 0 to 1 and their labels."""
    if source == "glyphs":
        dataset = Glyphs("train")
        return dataset.data[:, None].float() / 255, dataset.targets
    data = np.load(source)
    of_train = data["split"] == "train"
    images = torch.from_numpy(data["images"][of_train]).float() / 255
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(data["labels"][of_train])


def run(make, images, labels, held_out, epochs, seed):
    """Train one loss on the classes that are not held out; return the metrics on those that are."""
    of_validation = torch.isin(labels, held_out)
    _, train_labels = labels[~of_validation].unique(return_inverse=True)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
    trunk = make_trunk(images.shape[1], WIDTH, EMBEDDING_SIZE)
    train(trunk, make(), images[~of_validation], train_labels, epochs, lambda _: None)
    return evaluate(embed(trunk, images[of_validation]), labels[of_validation])


def report(results):
    """Print a table for each data set, and each row's difference from the default, paired by data set and seed."""
    for name, rows in results.items():
        print(f"\n{name}, percent, mean (standard deviation)")
        for row, metrics in rows.items():
            print(f"{row:<20}" + "".join(f"{METRICS[m]:>14} {_mean(v)}" for m, v in metrics.items()))
    print(f"\ndifference from {DEFAULT}, mean (standard error) over data sets and seeds")
    for row in next(iter(results.values())):
        cells = []
        for metric in METRICS:
            pairs = [zip(rows[row][metric], rows[DEFAULT][metric], strict=True) for rows in results.values()]
            differences = [a - b for pair in pairs for a, b in pair]
            cells.append(f"{METRICS[metric]:>14} {_mean(differences, error=True)}")
        print(f"{row:<20}" + "".join(cells))


def _mean(values, error=False):
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):6.1f} ({spread / len(values) ** 0.5 if error else spread:.1f})"


def main(data=("glyphs",), epochs=(8,), seeds=3, out=None):
    """Return data set -> row -> metric -> list over seeds, in percent; print and write it."""
    torch.set_num_threads(2)
    epochs = list(epochs) * len(data) if len(epochs) == 1 else epochs
    results = {}
    for source, budget in zip(data, epochs, strict=True):
        images, labels = load(source)
        classes = labels.unique()
        num_held_out = len(classes) // 4
        name = Path(source).stem
        rows = make_losses(len(classes) - num_held_out)
        results[name] = {row: {metric: [] for metric in METRICS} for row in rows}
        with tqdm(total=seeds * len(rows), desc=name, unit="run") as bar:
            for seed in range(seeds):
                order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
                for row, make in rows.items():
                    metrics = run(make, images, labels, classes[order[:num_held_out]], budget, seed)
                    for metric in METRICS:
                        results[name][row][metric].append(round(100 * metrics[metric], 2))
                    bar.update()
    report(results)
    about = metadata(data=[Path(s).stem for s in data], epochs=list(epochs), seeds=seeds, width=WIDTH)
    save(out, {"metadata": about, "results": results})
    return results


if __name__ == "__main__":
    parser = make_parser(__doc__, "--out")
    parser.add_argument("--data", nargs="+", default=["glyphs"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[8], help="one number, or one for each data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", default=None, help="print the tables of a JSON file instead of training")
    arguments = vars(parser.parse_args())
    if shown := arguments.pop("show"):
        report(json.loads(Path(shown).read_text())["results"])
    else:
        main(**arguments)
