# # 6. Connections within a batch
#
# At the end you will have trained a network whose samples exchange messages within a batch, seen who listens to whom,
# and compared the result with a network without messages. In `IntraBatchLoss`, samples exchange messages by attention
# before they are classified. `IntraBatchRefiner` passes the messages. It is a part of the loss and is dropped at test
# time. The last section uses neighbors at test time after all, beside a simple control.

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
import warnings

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

from pml_ext.datasets import Glyphs
from pml_ext.losses import IntraBatchLoss
from pml_ext.neighbors import neighbor_groups, refine_with_neighbors
from pml_ext.visualization import batch_attention, plot_curves

with warnings.catch_warnings():  # torch_geometric uses torch.jit.script, which PyTorch has deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from pml_ext.trunks import IntraBatchRefiner

# -

# ## The data
#
# Characters in 16 typefaces. No test character is among the training characters.

train_set, test_set = Glyphs("train"), Glyphs("test")
train_images, test_images = (data.data[:, None].float() / 255 for data in (train_set, test_set))
for title, part in (("training", train_set), ("test", test_set)):
    print(f"{title:<12}{part.num_classes:>4} characters {len(part):>6} images")

# ## Network and loss

EMBEDDING_SIZE, CLASSES, SAMPLES, EPOCHS = 64, 10, 8, 8


def make_trunk():
    """Return three convolutions, each of which halves the side, pooling and a linear layer."""
    layers = []
    for channels, out in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, EMBEDDING_SIZE))


# The control has the same refiner and the same loss, but its graph has no edges: no sample gets a message.


class Alone(IntraBatchRefiner):
    """A refiner without messages."""

    def forward(self, embeddings):
        return super().forward(embeddings, edge_index=torch.empty(2, 0, dtype=torch.long))


# A sample learns from messages of its own class. Batches therefore have few classes with many images each: 10 x 8.


def batches(labels):
    """Return the indices of an epoch's batches."""
    size = CLASSES * SAMPLES
    sampler = MPerClassSampler(labels, m=SAMPLES, batch_size=size, length_before_new_iter=len(labels))
    return torch.tensor([*sampler]).split(size)


# ## Training
#
# The loss classifies both the refined and the raw embeddings. Classifiers and refiner are parameters of the loss, so
# the optimizer gets them too. With `collect_stats` the loss records both values.


def train(refiner_class, seed=0):
    """Return the trained network, the loss, and the mean of its two parts in each epoch."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (PML's sampler draws from it)
    trunk = make_trunk()
    refiner = refiner_class(EMBEDDING_SIZE, num_layers=1, heads=2)
    loss_func = IntraBatchLoss(train_set.num_classes, EMBEDDING_SIZE, refiner, collect_stats=True)
    parameters = [p for module in (trunk, loss_func) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.RAdam(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [EPOCHS - 2])
    curves = {"refined": [], "raw": []}
    for _ in range(EPOCHS):
        values_of_batches = []
        for batch in batches(train_set.targets):
            loss = loss_func(trunk(train_images[batch]), train_set.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values_of_batches.append((loss_func.refined_loss_value, loss_func.raw_loss_value))
        schedule.step()
        for values, mean in zip(curves.values(), np.mean(values_of_batches, 0), strict=True):
            values.append(float(mean))
    print(f"{refiner_class.__name__}: " + ", ".join(f"{part} {v[0]:.2f} -> {v[-1]:.2f}" for part, v in curves.items()))
    return trunk.eval(), loss_func.eval(), curves


trunk, loss_func, curves = train(IntraBatchRefiner)
control, _, control_curves = train(Alone)


# +
def titled(figure, title):
    """Return the figure with a title."""
    figure.suptitle(title, fontsize=11)
    return figure


both = {f"{part} embeddings, with messages": values for part, values in curves.items()}
both |= {f"{part} embeddings, without": values for part, values in control_curves.items()}
titled(plot_curves(both, ylabel="cross-entropy with label smoothing"), "The two parts of the training loss")
# -

# ## Who listens to whom
#
# The picture shows the attention within one batch of unseen characters, sorted by class. White lines separate the
# classes. If messages came from the same class, the squares along the diagonal would be bright. The title has the
# shares of the sample itself, of others of its class, and of other classes.


# +
@torch.inference_mode()
def embed(trunk, images):
    """Return the embeddings, of length 1."""
    return nn.functional.normalize(torch.cat([trunk(batch) for batch in images.split(512)]))


raw = embed(trunk, test_images)
np.random.seed(0)  # noqa: NPY002
test_batches = batches(test_set.targets)
batch = test_batches[0]
weights = loss_func.refiner.attention_weights(raw[batch])[-1]  # of the last layer: (heads, samples, samples)
titled(batch_attention(weights, test_set.targets[batch]), "Attention inside of a batch, unseen characters")
# -

# How much attention goes to the same class, compared with chance? By chance, the same class gets its share of the other
# samples: 7 of 79.


# +
def own_class_share(refiner, embeddings, labels):
    """Return which part of the attention to other samples goes to those of the own class, the mean over all."""
    weights = refiner.attention_weights(embeddings)[-1].mean(0)
    weights = weights.fill_diagonal_(0)
    same = labels[:, None] == labels
    return ((weights * same).sum(1) / weights.sum(1)).mean().item()


chance = (SAMPLES - 1) / (CLASSES * SAMPLES - 1)
shares = {}
for name, embeddings, labels in (
    ("training characters", embed(trunk, train_images), train_set.targets),
    ("unseen characters", raw, test_set.targets),
):
    of_batches = [own_class_share(loss_func.refiner, embeddings[batch], labels[batch]) for batch in batches(labels)]
    shares[name] = float(np.mean(of_batches))
    print(f"{name}: {shares[name]:.3f} to the own class, {shares[name] / chance:.2f} times chance ({chance:.3f})")
# -

# A share near chance means flat attention: each sample listens to all others equally. A message that is the same for
# all says nothing about one. The embeddings themselves know more. For comparison, here is a softmax of their cosines,
# which was never trained as attention:

cosines = (raw[batch] @ raw[batch].T).fill_diagonal_(-torch.inf)
titled(batch_attention((cosines / 0.05).softmax(1), test_set.targets[batch]), "Softmax of the cosines / 0.05")

# ## At test time the refiner is gone
#
# You deploy the network alone.

sizes = {"network, kept": trunk, "loss, dropped": loss_func}
for name, module in sizes.items():
    print(f"{name}: {sum(p.numel() for p in module.parameters()):,} parameters")


# +
def evaluate(embeddings):
    """Return P@1 and MAP@R on the test characters, in percent; every image is a query against all others."""
    names = ("precision_at_1", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    metrics = calculator.get_accuracy(nn.functional.normalize(embeddings), test_set.targets)
    return [100 * metrics[name] for name in names]


results = {
    "raw pixels": evaluate(test_images.flatten(1)),
    "trained without messages": evaluate(embed(control, test_images)),
    "trained with messages": evaluate(raw),
}


def show():
    """Print the table so far."""
    print(f"{f'{test_set.num_classes} unseen characters, percent':<44}{'P@1':>8}{'MAP@R':>8}")
    for name, row in results.items():
        print(f"{name:<44}" + "".join(f"{value:>8.1f}" for value in row))


show()
# -

# The two trainings differ only in the messages. With flat attention they should find the same. In short trainings with
# one seed, differences of a few points prove nothing.

# ## Neighbors at test time
#
# The refiner can also refine a gallery: each item gets messages from its reciprocal neighbors, without labels. That is
# **another protocol**: the embedding of an item depends on what else is in the gallery, here all test images. Neighbors
# help by themselves, so the fair control is the plain mean of the same neighbors, without a refiner.

# +
K1, SIZE = 30, 8  # the authors' setting
results["+ refinement with 8 neighbors"] = evaluate(refine_with_neighbors(loss_func.refiner, raw, k1=K1, size=SIZE))
results["+ mean of the same 8 neighbors"] = evaluate(raw[neighbor_groups(raw, k1=K1, size=SIZE)].mean(1))
show()
# -

# The last three rows show whether neighbors help, and whether the refiner adds to their mean. If the mean is as good,
# the refiner is not worth its cost.


# +
def draw_results():
    """Draw the table."""
    figure = Figure(figsize=(7.2, 3), layout="constrained")
    axis = figure.add_subplot()
    places = np.arange(len(results))[::-1]
    for column, (metric, shift) in enumerate({"P@1": 0.2, "MAP@R": -0.2}.items()):
        axis.barh(places + shift, [row[column] for row in results.values()], height=0.38, label=metric)
    axis.set(yticks=places, yticklabels=[*results], xlabel="percent", title="Unseen characters", xlim=(0, 100))
    axis.legend(loc="lower right")
    return figure


draw_results()
# -

# ## What to try next
#
# - Longer training or a pretrained network, and then the share of the own class again. `docs/papers/intra_batch.md`
#   has three seeds of a longer training on these characters, and the authors' settings.
# - Any loss behind the refiner: `IntraBatchLoss(267, 64, loss=HybridLoss(267, 64))`, see notebook `01_swap_one_loss`.
# - Sparse graphs instead of the whole batch: `pml_ext.neighbors.knn_graph`, `docs/papers/intra_batch.md`.
# - Learners in one network: notebook `05_attention_ensemble`. Tuned comparisons of all methods: `docs/retrieval.md`.
