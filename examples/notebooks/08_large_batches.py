# # 8. Large batches in little memory
#
# A loss of pairs wants large batches, and the activations of a network do not let them fit. `cached_backward` runs the
# network chunk by chunk, while the loss sees all embeddings. This notebook checks that the gradients are those of the
# whole batch, then measures the memory of a step. Nothing is downloaded but the packages.

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
import ctypes
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from pml_ext.gradient_cache import cached_backward
from pml_ext.losses import MultiSimilarityLoss

torch.set_num_threads(1)
# -

# ## The same gradients
#
# A network with dropout and layer norms, in float64, so that rounding does not hide a mistake. The plain step embeds
# the same chunks, so that dropout draws the same masks, but keeps all their activations.

# +
torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 32)).double()
images, labels = torch.randn(96, 64, dtype=torch.float64), torch.arange(96) // 4
loss_func = MultiSimilarityLoss()


def gradients(step):
    """Return the gradients of all parameters after a step with a seed."""
    trunk.zero_grad()
    torch.manual_seed(1)
    step()
    return torch.cat([p.grad.flatten() for p in trunk.parameters()])


def difference(a, b):
    """Return the largest difference, relative to the largest number."""
    return f"{((a - b).abs().max() / a.abs().max()).item():.0e}"


# -

# Beside it, what is usually done where memory is short: gradients of small batches, accumulated. These are gradients of
# another loss, which has pairs inside of a chunk only.


# +
def plain():
    loss_func(torch.cat([trunk(chunk) for chunk in images.split(32)]), labels).backward()


def accumulated():
    for chunk, own in zip(images.split(32), labels.split(32), strict=True):
        (loss_func(trunk(chunk), own) / 3).backward()


expected = gradients(plain)
in_chunks = gradients(lambda: cached_backward(trunk, loss_func, images, labels, chunk_size=32))
print("in chunks:  ", difference(expected, in_chunks))
print("accumulated:", difference(expected, gradients(accumulated)))
# -

# ## Memory
#
# The peak of the process during a step, beyond what it held before. Linux tells it; elsewhere the plot stays empty.


# +
def resident(field):
    """Return VmRSS (memory of the process) or VmHWM (its peak) in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def extra_memory(step):
    """Return the peak of memory during a step, less what was there, in MB."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    except (AttributeError, OSError):  # no Linux, or one that hides it
        return float("nan")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


# -

# A small convolutional network, whose activations take far more memory than its embeddings.

# +
network = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    nn.Linear(512, 64),
)  # fmt: skip
SIZES = (64, 128, 256, 512, 1024)
megabytes = {"plain": [], "chunks of 64": []}


def measure(batch, classes):
    """Keep the memory of a plain step and of one in chunks."""
    megabytes["plain"].append(extra_memory(lambda: loss_func(network(batch), classes).backward()))
    megabytes["chunks of 64"].append(extra_memory(lambda: cached_backward(network, loss_func, batch, classes, 64)))


for size in SIZES:
    measure(torch.randn(size, 1, 28, 28), torch.arange(size) // 4)
# -

# What is left in chunks: the activations of a chunk, and the similarities of all pairs.


# +
def draw_memory():
    """Plot megabytes against the size of the batch."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.add_subplot()
    for (name, values), style in zip(megabytes.items(), ("k:o", "C0-o"), strict=True):
        axis.loglog(SIZES, values, style, base=2, label=name)
    axis.set(xlabel="batch", ylabel="peak MB of a step")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


draw_memory()
# -

# ## What to try next
#
# - `trunk.train()` with batch norms: their statistics are those of a chunk. `docs/large_batches.md` tells what that
#   means, what a step costs, and whether a larger batch is worth it.
# - `recipe(..., batch_size=1024, chunk_size=32)`: the setting of all recipes. Notebook `07_from_training_to_search`
#   trains one.
