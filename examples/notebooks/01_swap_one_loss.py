# # 1. Swap one loss
#
# A training loop as pytorch-metric-learning (PML) users write it: a sampler, a miner, a loss. Then one line changes:
# `pml_ext.losses.HybridLoss` stands where PML's loss stood. Both networks search for characters that neither has seen
# in training. The data, 534 characters in 16 typefaces, are drawn here: nothing is downloaded but the packages.

# On Colab this installs the package; elsewhere it finds it.

# +
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("pml_ext") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "pml-ext[examples]"], check=True)

# +
import os

os.environ["TQDM_DISABLE"] = "1"  # PML's trainers draw a progress bar, which would fill this page
# -

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 80}

# +
import warnings
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning import losses, miners, samplers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from pml_ext.datasets import Glyphs
from pml_ext.losses import HybridLoss
from pml_ext.visualization import plot_curves, retrieval_gallery

# -

# ## The data
#
# Training and test characters are disjoint, and so are their base letters: a, A and Á lie on one side.

train_set, test_set = Glyphs("train"), Glyphs("test")
train_images, test_images = (data.data[:, None].float() / 255 for data in (train_set, test_set))
print(train_set, test_set, sep="\n")


# +
def draw_samples(rows=2, columns=9):
    """Draw images of a few characters of both halves, a row a character."""
    figure = Figure(figsize=(0.8 * columns, 0.95 * 2 * rows), layout="constrained")
    for part, dataset, name in zip(figure.subfigures(2, 1), (train_set, test_set), ("Training", "Test"), strict=True):
        axes = part.subplots(rows, columns)
        part.suptitle(f"{name} characters", fontsize=10)
        for row, first in zip(axes, torch.linspace(0, dataset.num_classes - 1, rows).long() * 16, strict=True):
            for axis, image in zip(row, dataset.data[first : first + columns], strict=True):
                axis.imshow(image, cmap="gray")
                axis.set(xticks=[], yticks=[])
    return figure


draw_samples()
# -

# ## The parts that stay
#
# A small convolutional network.

EMBEDDING_SIZE, BATCH_SIZE, EPOCHS = 64, 128, 6


def make_trunk(sizes=(1, 16, 32, 32, 64)):
    """Return four blocks, each halving the side of the image, then a linear layer."""
    blocks = []
    for i, o in pairwise(sizes):
        blocks += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], EMBEDDING_SIZE))


# PML's sampler: each batch has 4 images of each of 32 characters.


def make_sampler():
    """Return the indices of one epoch, batch after batch."""
    length = len(train_images)
    return samplers.MPerClassSampler(train_set.targets, m=4, batch_size=BATCH_SIZE, length_before_new_iter=length)


# The optimizer gets the parameters of the network **and of the loss**. PML's MultiSimilarityLoss has none, so its
# group is empty; losses with proxies have some, and proxies like a higher learning rate.


def make_optimizer(trunk, loss_func):
    """Return AdamW for both."""
    groups = [{"params": [*trunk.parameters()], "lr": 2e-3}, {"params": [*loss_func.parameters()], "lr": 2e-2}]
    return torch.optim.AdamW(groups, weight_decay=1e-4)


# The loop. It does not know which loss it has.


def train(loss_func, seed=0):
    """Return the trained network and the mean loss of each epoch."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
    trunk, miner, sampler = make_trunk(), miners.MultiSimilarityMiner(), make_sampler()
    optimizer = make_optimizer(trunk, loss_func)
    curve = []
    for epoch in range(EPOCHS):
        found = []
        for batch in torch.tensor([*sampler]).split(BATCH_SIZE):
            embeddings, labels = trunk(train_images[batch]), train_set.targets[batch]
            loss = loss_func(embeddings, labels, miner(embeddings, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        curve.append(float(np.mean(found)))
        print(f"epoch {epoch + 1}: mean loss {curve[-1]:.3f}")
    return trunk, curve


# Evaluation on the unseen characters: every image is a query against all others. P@1 is the share of queries whose
# nearest neighbour is the same character. MAP@R looks at the whole front of the list.


def evaluate(embeddings):
    """Return P@1 and MAP@R on the test characters."""
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", device=torch.device("cpu")
    )
    return calculator.get_accuracy(nn.functional.normalize(embeddings), test_set.targets)


@torch.inference_mode()
def embed(trunk):
    """Return the embeddings of all test images."""
    trunk.eval()
    return torch.cat([trunk(batch) for batch in test_images.split(512)])


# ## PML's loss

loss_func = losses.MultiSimilarityLoss()
pml_trunk, pml_curve = train(loss_func)

# ## The line that changes
#
# `HybridLoss` adds proxies, one learnt vector for each class, to Multi-Similarity. It therefore wants the number of
# classes and the width of the embeddings. Miner, sampler and loop are the same. The miner serves its pair part.

loss_func = HybridLoss(num_classes=train_set.num_classes, embedding_size=EMBEDDING_SIZE)
hybrid_trunk, hybrid_curve = train(loss_func)

# The two losses have different units. Divided by their first epoch they can be drawn together; which curve is lower
# says nothing about which network is better.


# +
def titled(figure, title):
    """Return the figure with a title."""
    figure.suptitle(title, fontsize=11)
    return figure


curves = {"PML MultiSimilarityLoss": pml_curve, "pml_ext HybridLoss": hybrid_curve}
curves = {name: [value / values[0] for value in values] for name, values in curves.items()}
titled(plot_curves(curves, ylabel="loss / that of the first epoch"), "Training loss")
# -

# ## On unseen characters

embeddings = {
    "raw pixels": test_images.flatten(1),
    "PML MultiSimilarityLoss": embed(pml_trunk),
    "pml_ext HybridLoss": embed(hybrid_trunk),
}
print(f"{f'{test_set.num_classes} unseen characters, percent':<36}{'P@1':>8}{'MAP@R':>8}")
for name, found in embeddings.items():
    metrics = evaluate(found)
    print(f"{name:<36}{100 * metrics['precision_at_1']:>8.1f}{100 * metrics['mean_average_precision_at_r']:>8.1f}")

# One short training with one seed shows that the swap works and that both are far from raw pixels. It does not show
# which loss is better: a few points between two such runs can be the seed. The page `docs/retrieval.md` has tuned
# comparisons over several seeds.

# ## What is found
#
# Each row: a query, then its nearest neighbours and their cosines. Green frames are right; dashed red ones with a
# cross are wrong.

shown = retrieval_gallery(
    embeddings["pml_ext HybridLoss"], test_set.targets, test_set.data, num_queries=5, num_neighbors=8
)
titled(shown, "HybridLoss, unseen characters")

# ## What if the optimizer forgets the proxies?
#
# The most usual mistake with losses that have parameters. Nothing fails: the proxies stay random, and PML's losses say
# nothing. Losses of pml_ext warn once after 10 batches.

# +
forgotten = HybridLoss(num_classes=8, embedding_size=4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(102):  # no optimizer at all
        forgotten(torch.randn(16, 4, requires_grad=True), torch.arange(16) // 2).backward()

for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
# -

# ## With PML's trainers
#
# They take several optimizers by name, one for each model. That of the loss must be called `metric_loss_optimizer`.
# PML wants trunk and embedder as two models: here the last layer is the embedder.


def detach_total(trainer):
    """Detach the loss that PML puts on its progress bar next; with a graph, PyTorch warns."""
    trainer.losses["total_loss"] = trainer.losses["total_loss"].detach()


# +
torch.manual_seed(0)
np.random.seed(0)  # noqa: NPY002
network, loss_func = make_trunk(), HybridLoss(train_set.num_classes, EMBEDDING_SIZE)
trunk, embedder = network[:-1], network[-1]
before = loss_func.proxy_loss.proxies.detach().clone()
trainer = trainers.MetricLossOnly(
    models={"trunk": trunk, "embedder": embedder},
    optimizers={
        "trunk_optimizer": torch.optim.AdamW(trunk.parameters(), lr=2e-3),
        "embedder_optimizer": torch.optim.AdamW(embedder.parameters(), lr=2e-3),
        "metric_loss_optimizer": torch.optim.AdamW(loss_func.parameters(), lr=2e-2),
    },
    batch_size=BATCH_SIZE,
    loss_funcs={"metric_loss": loss_func},
    mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
    dataset=torch.utils.data.TensorDataset(train_images, train_set.targets),
    sampler=make_sampler(),
    dataloader_num_workers=0,
    data_device=torch.device("cpu"),
    end_of_iteration_hook=detach_total,
)
trainer.train(num_epochs=2)
# -

# The proxies have moved, so the optimizer knows them.

moved = (loss_func.proxy_loss.proxies.detach() - before).norm(dim=1).mean().item()
print(f"mean length of the proxies before: {before.norm(dim=1).mean().item():.2f}; they have moved by {moved:.2f}")
metrics = evaluate(embed(network))
print(f"unseen characters after 2 epochs of PML's trainer: P@1 {100 * metrics['precision_at_1']:.1f}%")

# ## What to try next
#
# - Another line: `pml_ext.losses.ProxyAnchorLoss`, `MultiSimilarityLoss` or `AdaptiveAdditiveMarginLoss`
#   (`docs/losses.md`).
# - More weight for the proxies: `HybridLoss(..., proxy_weight=0.3)`; the paper's numbers: `HybridLoss.paper(...)`.
# - The same swap on your own images: `docs/swap_a_loss.md`; whole trainings: `docs/recipes.md`, and notebook
#   `07_from_training_to_search`.
# - A network that fits this loss: notebook `02_global_and_local_heads`. Several learners with this loss:
#   `03_attention_ensemble`.
