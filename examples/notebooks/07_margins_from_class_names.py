# # 7. Margins from class names
#
# At the end you will know what margins from class names look like, and whether they help here. In
# `AdaptiveAdditiveMarginLoss`, a softmax over proxies, each pair of classes has a margin of its own, from a second
# modality: here the Unicode names of characters. Two controls show what the names are worth: one constant margin, and
# names given to the wrong classes. Nothing is downloaded but the packages.

# On Colab this installs the package; elsewhere it finds it.

# +
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("pml_ext") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "pml-ext[examples]"], check=True)
# -

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 80}

# +
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from pml_ext import class_embeddings
from pml_ext.datasets import Glyphs
from pml_ext.losses import AdaptiveAdditiveMarginLoss

# -

# ## Classes with names
#
# Each class of `Glyphs` is a character, and each character has a Unicode name. Test characters are not among the
# training characters; small images keep this notebook short.

train_set, test_set = (Glyphs(split, samples_per_class=8, image_size=24) for split in ("train", "test"))
names = train_set.class_names

shown = ("LATIN CAPITAL LETTER G", "LATIN SMALL LETTER N WITH TILDE", "GREEK SMALL LETTER SIGMA", "POUND SIGN")
for name in shown:
    print(f"{train_set.classes[names.index(name)]}  {name}")

# `from_text` turns names into vectors of length 1. `model="tfidf"` counts character n-grams and needs no download. A
# sentence encoder would know meanings too.

text = class_embeddings.from_text(names, model="tfidf")
print(f"{text.shape[0]} classes, {text.shape[1]} dimensions each")

# Nearest classes by name: the cosine of two rows.

similarity = (text @ text.T).fill_diagonal_(-1)
for name in shown:
    values, nearest = similarity[names.index(name)].topk(3)
    print(name)
    for value, i in zip(values.tolist(), nearest.tolist(), strict=True):
        print(f"    {value:.2f}  {train_set.classes[i]}  {names[i]}")

# Names group characters by script, case and accent. They say little about shapes. The last part of this notebook
# measures how much that matters.

# ## The margin matrix
#
# The loss computes margins when it needs them, and never stores the whole matrix. `get_margins` returns rows of it.

EMBEDDING_SIZE = 64
everyone = torch.arange(len(names))
loss_func = AdaptiveAdditiveMarginLoss(len(names), EMBEDDING_SIZE, class_embeddings=text)
margins = loss_func.get_margins(everyone)
mean_margin = margins.sum().item() / (len(names) * (len(names) - 1))
print(f"margins between 0 and {margins.max():.2f}, mean between different classes {mean_margin:.3f}")

# The first two words of a name are script and case; they group the characters.


def group_of(name):
    """Return script and case, or "other"."""
    first = " ".join(name.split()[:2])
    return first if first.split()[0] in ("LATIN", "GREEK", "CYRILLIC") and first.split()[1] != "LETTER" else "OTHER"


# Sorted by group, the structure shows: dark blocks are characters with similar names, which get small margins.


# +
def draw_margins():
    """Draw all margins, and those of some classes with their names."""
    figure = Figure(figsize=(13.5, 6.4), layout="constrained")
    axes = figure.subplots(1, 2)
    order = sorted(range(len(names)), key=lambda i: (group_of(names[i]), names[i]))
    groups = [group_of(names[i]) for i in order]
    starts = [i for i in range(len(order)) if i == 0 or groups[i] != groups[i - 1]] + [len(order)]
    large = [(a, b) for a, b in pairwise(starts) if b - a >= 8]
    middles, words = [(a + b) / 2 for a, b in large], [f"{groups[a]} ({b - a})" for a, b in large]
    image = axes[0].imshow(margins[order][:, order], cmap="viridis", vmin=0, interpolation="nearest")
    axes[0].set_xticks(middles, words, fontsize=8, rotation=90)
    axes[0].set_yticks(middles, words, fontsize=8)
    axes[0].set(title="all training classes", xlabel="other class", ylabel="class of the sample")
    few = [order[i] for a, b in large for i in range(a, b, -(-(b - a) // 3))]
    axes[1].imshow(margins[few][:, few], cmap="viridis", vmin=0, vmax=margins.max())
    axes[1].set_yticks(
        range(len(few)), [f"{names[i].lower().replace('letter ', '')}  {train_set.classes[i]}" for i in few], fontsize=8
    )
    axes[1].set_xticks(range(len(few)), [train_set.classes[i] for i in few], fontsize=9)
    axes[1].set(title="a few of them", xlabel="other class", ylabel="class of the sample")
    figure.colorbar(image, ax=axes, label="margin (cosine)", shrink=0.8)
    figure.suptitle('Margins, direction="distance"')
    return figure


draw_margins()
# -

# ## What `direction` means
#
# With "distance" a sample keeps farther from proxies of classes with **other** names; with "similarity" farther from
# proxies of classes with **similar** names. Both are linear in the cosine of the names.

opposite = AdaptiveAdditiveMarginLoss(len(names), EMBEDDING_SIZE, class_embeddings=text, direction="similarity")
other_margins = opposite.get_margins(everyone)


# +
def draw_directions(character="G"):
    """Draw the margins of one class against the similarity of names."""
    own = train_set.class_to_idx[character]
    rest = everyone[everyone != own]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for found, label, mark in ((margins, '"distance"', "o"), (other_margins, '"similarity"', "^")):
        axes.plot(similarity[own, rest], found[own, rest], mark, markersize=4, alpha=0.6, label=f"direction={label}")
    axes.set(xlabel=f"cosine of the name with {names[own]}", ylabel="margin (cosine)")
    axes.set_title(f"Margins of samples of {character} towards the other classes", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


draw_directions()
# -

# ## Are they worth anything?
#
# We compare four losses over three seeds. The constant margin is the mean of the adaptive ones. The fair control gives
# each class the name of another, drawn at random: its margins have the same values in the wrong places. If names help,
# the right names must beat the wrong ones.

SEEDS, EPOCHS, BATCH_SIZE = 3, 8, 128
METRICS = {"precision_at_1": "P@1", "mean_average_precision_at_r": "MAP@R"}

# The losses differ only in their margins.


# +
def make_loss(name, seed):
    """Return a loss; its proxies begin at the same place for all of a seed."""
    shuffled = text[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    settings = {
        "no margin": {},
        "constant margin": {"base_margin": mean_margin},
        "margins from names": {"class_embeddings": text},
        "margins from shuffled names": {"class_embeddings": shuffled},
    }[name]
    loss_func = AdaptiveAdditiveMarginLoss(len(names), EMBEDDING_SIZE, **settings)
    nn.init.normal_(loss_func.proxies, generator=torch.Generator().manual_seed(seed))
    return loss_func


# -

# The network is the same for all.


def make_trunk():
    """Return a small convolutional network."""
    layers = []
    for i, o in pairwise((1, 16, 32, 64)):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, EMBEDDING_SIZE))


# Training is a plain loop over class-balanced batches.


# +
def train(name, seed):
    """Return a trained network."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
    trunk, loss_func = make_trunk(), make_loss(name, seed)
    sampler = MPerClassSampler(train_set.targets, m=4, batch_size=BATCH_SIZE, length_before_new_iter=len(train_set))
    groups = [{"params": trunk.parameters(), "lr": 3e-3}, {"params": loss_func.parameters(), "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    images = train_set.data[:, None].float() / 255
    for _ in range(EPOCHS):
        for batch in torch.tensor([*sampler]).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss_func(trunk(images[batch]), train_set.targets[batch]).backward()
            optimizer.step()
    return trunk.eval()


# -

# The test compares characters that were not in training.


# +
def score(trunk):
    """Return the metrics."""
    with torch.inference_mode():
        embeddings = nn.functional.normalize(trunk(test_set.data[:, None].float() / 255))
    calculator = AccuracyCalculator(include=tuple(METRICS), k="max_bin_count", device=torch.device("cpu"))
    return calculator.get_accuracy(embeddings, test_set.targets)


# -

# All rows have the same seeds.

# +
ROWS = ("no margin", "constant margin", "margins from names", "margins from shuffled names")
results = {name: [] for name in ROWS}
for seed in range(SEEDS):
    for name in ROWS:
        results[name].append(score(train(name, seed)))

print(
    f"{f'{test_set.num_classes} unseen characters, {SEEDS} seeds':<32}" + "".join(f"{m:>16}" for m in METRICS.values())
)
for name, found in results.items():
    values = [[100 * one[metric] for one in found] for metric in METRICS]
    print(f"{name:<32}" + "".join(f"{np.mean(v):>9.1f} ± {np.std(v, ddof=1):<4.1f}" for v in values).rstrip())
# -

# The table has mean and standard deviation over seeds. Runs of one seed share their start and their batches, so
# differences seed by seed say more than means. Names carry information if the right ones beat the shuffled ones with
# every seed. They are worth the trouble if they also beat one constant margin, which needs no names. Each line ends
# with the count.

for less in ("constant margin", "margins from shuffled names"):
    for metric, title in METRICS.items():
        pairs = zip(results["margins from names"], results[less], strict=True)
        differences = [100 * (one[metric] - other[metric]) for one, other in pairs]
        ahead = f"ahead with {sum(d > 0 for d in differences)} of {SEEDS}"
        print(f"{title:<6} from names less {less:<28}" + "".join(f"{d:>+7.1f}" for d in differences) + f"   {ahead}")

# The same as a picture.


# +
def draw_results():
    """Draw both metrics of every run; runs of a seed are joined."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), METRICS.items(), strict=True):
        for seed in range(SEEDS):
            values = [100 * results[name][seed][metric] for name in ROWS]
            axes.plot(values, range(len(ROWS)), "o-", alpha=0.7, label=f"seed {seed}")
        axes.set_yticks(range(len(ROWS)), ROWS)
        axes.set(xlabel=f"{title}, percent", title=f"{title} on unseen characters")
        axes.grid(alpha=0.3)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure


draw_results()
# -

# Three seeds of a short training show only large effects. Differences that change sign between seeds prove nothing.
# `docs/benchmarks.md` has longer runs with names, `docs/retrieval.md` runs with pen strokes as the second modality,
# both with these two controls. Descriptions of how alike two classes look may help more than names.

# ## What to try next
#
# - `direction="similarity"`, `margin_scale` and `base_margin`; a sentence encoder instead of n-grams; or
#   `class_embeddings.from_samples` for features of samples (`docs/papers/adaptive_margin.md`).
#   `examples/adaptive_margin.py` compares more losses and takes other models.
# - The margins of a million classes, without their matrix: notebook `08_many_classes_and_large_batches`.
# - The same loss as a recipe, `recipe("adaptive_margin", ...)`: `docs/recipes.md`; how recipes work: notebook
#   `02_from_training_to_search`.
