# # 5. An attention ensemble
#
# At the end you will have trained four learners in one network, seen their masks, and measured what each finds alone
# and what all find together. In `AttentionEnsemble` each learner puts a mask of its own on the features and embeds
# what is left. A divergence loss keeps the learners different. We try three weights for it, one of them 0.

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
import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from pml_ext.datasets import Glyphs
from pml_ext.learners import learner_similarity, split_learners
from pml_ext.losses import DivergenceLoss, EnsembleLoss, MultiSimilarityLoss
from pml_ext.trunks import AttentionEnsemble, param_groups
from pml_ext.visualization import mask_grid, plot_curves

# -

# ## The data
#
# Characters in 16 typefaces. No test character is among the training characters.

train_set, test_set = (Glyphs(split, samples_per_class=12) for split in ("train", "test"))
train_images, test_images = (data.data[:, None].float() / 255 for data in (train_set, test_set))
for title, part in (("training", train_set), ("test", test_set)):
    print(f"{title:<12}{part.num_classes:>4} characters {len(part):>6} images")

# ## The network
#
# The network has three parts: a stem that all learners share, a small network that makes the masks, and a head that
# processes each learner's masked map. `AttentionEnsemble.from_backbone("resnet50")` takes these parts from a known
# network.

LEARNERS, EMBEDDING_SIZE, BATCH_SIZE, EPOCHS = 4, 64, 128, 6


def conv(channels, out):
    """Return a convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def make_trunk():
    """Return four learners of 16 dimensions each."""
    return AttentionEnsemble(
        stem=nn.Sequential(conv(1, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2)),
        attention=conv(32, 32),
        head=nn.Sequential(conv(32, 48), nn.MaxPool2d(2), conv(48, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        num_learners=LEARNERS,
        embedding_size=EMBEDDING_SIZE,
        input_size=(1, 32, 32),
    )


# One embedding is one vector, in which the learners lie side by side.

torch.manual_seed(0)
trunk = make_trunk().eval()
with torch.inference_mode():
    fresh = trunk(test_images[:256])
    print(f"embeddings {tuple(fresh.shape)}, of learners {tuple(split_learners(fresh, LEARNERS).shape)}")
    print(f"masks {tuple(trunk.masks(test_images[:256]).shape)}: image, learner, channel, height, width")

# ## The loss
#
# `EnsembleLoss` trains each learner and adds `DivergenceLoss`. That is a hinge: it pushes two learners of one image
# apart while their cosine is above 0.5. The learners of an untrained network nearly coincide, so the hinge is near its
# largest value: 1 for each of the 6 pairs of learners.

print(f"DivergenceLoss of the untrained network: {DivergenceLoss(LEARNERS)(fresh).item():.2f}")
print(f"mean cosine between its learners: {learner_similarity(fresh, LEARNERS):.3f}")

# ## Training
#
# After each epoch we compare the learners on test characters. We choose nothing by that: it is a curve to look at.


@torch.inference_mode()
def embed(trunk, images=test_images):
    """Return the embeddings of images, the network being left in evaluation mode."""
    trunk.eval()
    return torch.cat([trunk(batch) for batch in images.split(512)])


def train(divergence_weight, seed=0):
    """Return the trained network and the cosine between learners before training and after each epoch."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
    trunk = make_trunk()
    loss_func = EnsembleLoss(MultiSimilarityLoss(), LEARNERS, divergence_weight=divergence_weight)
    sampler = MPerClassSampler(train_set.targets, m=4, batch_size=BATCH_SIZE, length_before_new_iter=len(train_set))
    optimizer = torch.optim.AdamW(param_groups(trunk, loss_func, lr=3e-3))
    cosines = [learner_similarity(embed(trunk, test_images[::4]), LEARNERS)]
    for _ in range(EPOCHS):
        trunk.train()
        for batch in torch.tensor([*sampler]).split(BATCH_SIZE):
            loss = loss_func(trunk(train_images[batch]), train_set.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cosines.append(learner_similarity(embed(trunk, test_images[::4]), LEARNERS))
    return trunk, cosines


networks, cosines = {}, {}
for weight in (1.0, 0.1, 0.0):
    name = f"divergence weight {weight}"
    networks[name], cosines[name] = train(weight)
    print(f"{name}: cosine between learners {cosines[name][0]:.2f} before, {cosines[name][-1]:.2f} after training")

# ## How alike are the learners?


# +
def titled(figure, title):
    """Return the figure with a title."""
    figure.suptitle(title, fontsize=11)
    return figure


curves = {name: values[1:] for name, values in cosines.items()}
titled(plot_curves(curves, ylabel="mean cosine between two learners"), "Similarity of the learners")
# -

# Pair by pair, after training.


# +
def draw_cosines():
    """Draw the mean cosine between each two learners, a panel for each network."""
    figure = Figure(figsize=(2.8 * len(networks) + 0.6, 2.9), layout="constrained")
    axes = figure.subplots(1, len(networks))
    for axis, (name, trunk) in zip(axes, networks.items(), strict=True):
        own = nn.functional.normalize(split_learners(embed(trunk), LEARNERS), dim=2)
        cosines = (own @ own.transpose(1, 2)).mean(0)
        picture = axis.imshow(cosines, cmap="viridis", vmin=0, vmax=1)
        for p, q in np.ndindex(LEARNERS, LEARNERS):
            axis.text(q, p, f"{cosines[p, q]:.2f}", ha="center", va="center", color="w" if cosines[p, q] < 0.6 else "k")
        axis.set(title=name, xticks=range(LEARNERS), yticks=range(LEARNERS), xlabel="learner", ylabel="learner")
    figure.colorbar(picture, ax=list(axes), label="mean cosine")
    return figure


draw_cosines()
# -

# ## The masks
#
# Each row shows an image, then the mask of each learner, averaged over channels. Bright parts pass. Colors run over the
# range of the row, which is written beside it: masks weigh features rather than select them.

shown = test_images[torch.linspace(0, len(test_images) - 1, 4).long()]


def draw_masks(name):
    """Draw the masks of one of the networks."""
    with torch.inference_mode():
        return titled(mask_grid(shown, networks[name].masks(shown)), f"Masks, {name}")


draw_masks("divergence weight 1.0")

draw_masks("divergence weight 0.0")

# ## What each learner finds, and all of them
#
# Every test image is a query against all others.


# +
def evaluate(embeddings):
    """Return P@1 and MAP@R on the test characters, in percent."""
    names = ("precision_at_1", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    found = calculator.get_accuracy(nn.functional.normalize(embeddings), test_set.targets)
    return [100 * found[name] for name in names]


results = {}
print(f"{f'{test_set.num_classes} unseen characters, percent':<36}{'P@1':>8}{'MAP@R':>8}")
for name, trunk in networks.items():
    embeddings = embed(trunk)
    parts = {f"learner {m}": own for m, own in enumerate(embeddings.chunk(LEARNERS, 1))} | {"all": embeddings}
    results[name] = {part: evaluate(own) for part, own in parts.items()}
    for part, row in results[name].items():
        print(f"{f'{name}, {part}':<36}" + "".join(f"{value:>8.1f}" for value in row))
    gain = np.subtract(results[name]["all"], np.mean([*results[name].values()][:LEARNERS], 0))
    print(f"{'':<36}" + "".join(f"{value:>+8.1f}" for value in gain) + "  all, less the mean of its learners")


# +
def draw_results():
    """Draw MAP@R of each learner and of all."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.add_subplot()
    for shift, (name, rows) in zip((-0.27, 0, 0.27), results.items(), strict=True):
        axis.bar(np.arange(len(rows)) + shift, [row[1] for row in rows.values()], width=0.25, label=name)
    axis.set(xticks=range(len(rows)), xticklabels=[*rows], ylabel="MAP@R, percent", title="Unseen characters")
    figure.legend(loc="outside lower center", ncols=len(results))
    return figure


draw_results()
# -

# One run shows that the loss works. With it the learners differ; without it they coincide. Where they differ, the
# whole vector gains over its learners, but each learner alone gets worse. Whether the sum is worth it depends on the
# number of learners, their width and the weight. Seeds alone make a difference of a few points between short
# trainings. The page `docs/papers/attention_ensemble.md` has three seeds of a larger network with four and eight
# learners; `docs/retrieval.md` has tuned weights.

# ## What to try next
#
# - Eight learners: `LEARNERS = 8`; the sum over pairs grows faster than the sum over learners, so lower the weight.
# - Other losses for the learners: `EnsembleLoss(HybridLoss(267, 16), num_learners=4)`; each gets its own proxies.
# - `DivergenceRegularizer` in any PML loss, and the paper's setting on a real backbone:
#   `docs/papers/attention_ensemble.md`.
# - Two levels instead of masks: notebook `04_global_and_local_heads`. Messages between images:
#   `06_intra_batch_connections`.
