# # 8. Many classes and large batches
#
# At the end you will have seen that two exact methods of pml_ext give the same gradients as the direct computation, and
# how little memory they need. The first part grows the number of classes to a million: proxy losses walk over the
# proxies in chunks. The second part grows the batch: `cached_backward` runs the network chunk by chunk. Nothing is
# downloaded but the packages.

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
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pytorch_metric_learning import losses
from torch import nn

from pml_ext.gradient_cache import cached_backward
from pml_ext.losses import AdaptiveAdditiveMarginLoss, MultiSimilarityLoss, ProxyAnchorLoss

torch.set_num_threads(1)  # said explicitly: times depend on it
# -

# ## Many classes: the same numbers
#
# A proxy loss compares each sample of a batch with one proxy for each class. Computed directly, it keeps several
# matrices of batch times classes. Ours keep none. `load_state_dict` copies the proxies of PML's `ProxyAnchorLoss` into
# ours. Small chunks make sure that there is something to put together. In float64, rounding hides no mistake.

# +
torch.manual_seed(0)
few_classes, width = 2000, 32
embeddings = torch.randn(64, width, dtype=torch.float64, requires_grad=True)
labels = torch.randint(few_classes, (16,)).repeat_interleave(4)

dense = losses.ProxyAnchorLoss(few_classes, width).double()
streamed = ProxyAnchorLoss(few_classes, width, chunk_size=300).double()
streamed.load_state_dict(dense.state_dict())


def value_and_gradients(loss_func):
    """Return the loss, and its gradients for embeddings and proxies."""
    value = loss_func(embeddings, labels)
    return value.detach(), *torch.autograd.grad(value, [embeddings, loss_func.proxies])


def compare(title, expected, actual):
    """Print the largest differences, relative to the largest number."""
    print(f"{title}: {expected[0]:.10f} and {actual[0]:.10f}")
    for name, a, b in zip(("value", "gradient of embeddings", "gradient of proxies"), expected, actual, strict=True):
        print(f"    {name:<24}{((a - b).abs().max() / a.abs().max()).item():.0e}")


compare("Proxy-Anchor, PML and ours", value_and_gradients(dense), value_and_gradients(streamed))

# -

# PML has no loss with a margin for each pair of classes. There we compare with the formula on the whole matrix.

# +
descriptions = torch.randn(few_classes, 16, dtype=torch.float64)
margin_loss = AdaptiveAdditiveMarginLoss(few_classes, width, class_embeddings=descriptions, chunk_size=300).double()


def formula(proxies):
    """Return the cross-entropy of all cosines with margins, and its gradients."""
    cosines = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(proxies).T
    logits = margin_loss.scale * (cosines + margin_loss.get_margins(labels))
    value = torch.nn.functional.cross_entropy(logits, labels)
    return value.detach(), *torch.autograd.grad(value, [embeddings, proxies])


compare("Adaptive margins, formula and ours", formula(margin_loss.proxies), value_and_gradients(margin_loss))
# -

# The differences are rounding errors. Nothing is sampled or left out.

# ## Time and memory
#
# A step is forward and backward in float32. The losses of a size take turns. We report the median of seven steps after
# a first one. Memory is the peak of the process during a step, minus what it held before and minus the gradient of the
# proxies, which any exact loss needs. Linux reports it; elsewhere that plot stays empty.

BATCH_SIZE, WIDTH, CLASS_WIDTH, STEPS = 64, 32, 16, 7

# Two losses of each library. PML has none with a margin for each pair of classes; its CosFace has one margin for all.


# +
def candidates(num_classes, with_pml):
    """Return what makes each loss."""

    def margins_from_descriptions():
        return AdaptiveAdditiveMarginLoss(num_classes, WIDTH, torch.randn(num_classes, CLASS_WIDTH))

    ours = {
        "ProxyAnchorLoss": lambda: ProxyAnchorLoss(num_classes, WIDTH),
        "AdaptiveAdditiveMarginLoss": margins_from_descriptions,
    }
    if not with_pml:
        return ours
    return ours | {
        "PML ProxyAnchorLoss": lambda: losses.ProxyAnchorLoss(num_classes, WIDTH),
        "PML CosFaceLoss": lambda: losses.CosFaceLoss(num_classes, WIDTH),
    }


# -

# Linux reports how much memory a process holds, and its peak.


# +
def resident(field):
    """Return VmRSS (memory of the process) or VmHWM (its peak) in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def extra_memory(step, gradient=0.0):
    """Return the peak of memory during a step, less what was there and the gradient, in MB."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    except (AttributeError, OSError):  # no Linux, or one that hides it
        return float("nan")
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before - gradient


# -

# Times: the losses take turns.


# +
def forget(loss_func, embeddings):
    """Free all gradients."""
    embeddings.grad = None
    loss_func.zero_grad()


def step_times(made, embeddings, labels):
    """Return the median of seconds that a step takes, by loss."""
    seconds = {name: [] for name in made}
    for _ in range(STEPS + 1):
        for name, loss_func in made.items():
            start = time.perf_counter()
            loss_func(embeddings, labels).backward()
            seconds[name].append(time.perf_counter() - start)
            forget(loss_func, embeddings)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


# -

# Both, for one number of classes.


# +
def measure(num_classes, with_pml=True):
    """Return seconds of a step and extra megabytes, by loss."""
    torch.manual_seed(0)
    made = {name: make() for name, make in candidates(num_classes, with_pml).items()}
    embeddings = torch.randn(BATCH_SIZE, WIDTH, requires_grad=True)
    labels = torch.randint(num_classes, (BATCH_SIZE // 4,)).repeat_interleave(4)
    seconds = step_times(made, embeddings, labels)
    gradient = num_classes * WIDTH * 4 / 2**20
    found = {}
    for name, loss_func in made.items():
        megabytes = extra_memory(lambda f=loss_func: f(embeddings, labels).backward(), gradient)
        forget(loss_func, embeddings)
        found[name] = seconds[name], megabytes
    return found


# -

# From a thousand classes to a million. PML's losses stop at 100,000, to keep this notebook small.

# +
SIZES, MILLION = (1_000, 10_000, 100_000), 1_000_000
measured = {size: measure(size) for size in SIZES}
measured[MILLION] = measure(MILLION, with_pml=False)

print(f"{'classes':>9}  {'loss':<28}{'ms':>8}{'extra MB':>10}")
for size, found in measured.items():
    for name, (seconds, megabytes) in found.items():
        print(f"{size:>9,}  {name:<28}{1000 * seconds:>8.1f}{megabytes:>10.1f}")
# -

# The dotted line is the size of one matrix of batch times classes.


# +
def draw():
    """Draw time and memory against the number of classes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    styles = {
        "PML ProxyAnchorLoss": "C1--o",
        "ProxyAnchorLoss": "C1-o",
        "PML CosFaceLoss": "C0--s",
        "AdaptiveAdditiveMarginLoss": "C0-s",
    }
    for name, style in styles.items():
        sizes = [size for size in measured if name in measured[size]]
        time_axes.loglog(sizes, [1000 * measured[size][name][0] for size in sizes], style, label=name)
        memory_axes.loglog(sizes, [max(measured[size][name][1], 0.1) for size in sizes], style, label=name)
    matrix = [BATCH_SIZE * size * 4 / 2**20 for size in measured]
    memory_axes.loglog([*measured], matrix, "k:", label="one matrix of batch x classes")
    time_axes.set(xlabel="classes", ylabel="ms, forward + backward", title="Time of a step")
    memory_axes.set(xlabel="classes", ylabel="MB beyond proxies and gradient", title="Peak of extra memory")
    for axes in (time_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"Batch {BATCH_SIZE}, width {WIDTH}, {torch.get_num_threads()} thread")
    return figure


draw()
# -

# Time grows with the number of classes for all of them: an exact loss must look at every proxy. The factor differs,
# and so does the memory: PML's grows like the matrix, ours much more slowly. CosFace has one margin for all pairs of
# classes; the adaptive loss beside it computes one for each pair, which takes one more matrix product. At a million
# classes:

# +
parts = {
    "proxies": MILLION * WIDTH,
    "gradient of the proxies": MILLION * WIDTH,
    "class descriptions": MILLION * CLASS_WIDTH,
    "one matrix of batch x classes, never made": BATCH_SIZE * MILLION,
    "margins of all pairs of classes, never made": MILLION**2,
}
for title, count in parts.items():
    print(f"{title:<46}{count * 4 / 2**20:>12,.0f} MB")
for name, (_, megabytes) in measured[MILLION].items():
    print(f"{f'extra while {name} steps':<46}{megabytes:>12,.0f} MB")
# -

# This shows exactness, and how the curves grow. It does not show the exact factor on another machine, with more
# threads or on a GPU. Small amounts of memory include what the system allocates in steps of its own.
# `benchmarks/proxy_scaling.py` measures each row in a process of its own; `docs/streaming.md` has the figures,
# including PML's at a million classes.

# ## Large batches: the same gradients
#
# A pair loss wants large batches, but the activations of the network limit them. `cached_backward` gives the loss all
# embeddings and the network one chunk at a time. The network here has dropout and layer norms. The plain step embeds
# the same chunks, so that dropout draws the same masks, but keeps all their activations.

# +
torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 32)).double()
images, classes = torch.randn(96, 64, dtype=torch.float64), torch.arange(96) // 4
pair_loss = MultiSimilarityLoss()


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

# For comparison, the usual way out: accumulated gradients of small batches. They are the gradients of another loss,
# which sees only the pairs inside of a chunk.


# +
def plain():
    pair_loss(torch.cat([trunk(chunk) for chunk in images.split(32)]), classes).backward()


def accumulated():
    for chunk, own in zip(images.split(32), classes.split(32), strict=True):
        (pair_loss(trunk(chunk), own) / 3).backward()


expected = gradients(plain)
in_chunks = gradients(lambda: cached_backward(trunk, pair_loss, images, classes, chunk_size=32))
print("in chunks:  ", difference(expected, in_chunks))
print("accumulated:", difference(expected, gradients(accumulated)))
# -

# ## Large batches: memory
#
# The activations of this small convolutional network take far more memory than its embeddings.

# +
network = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
    nn.Linear(512, 64),
)  # fmt: skip
BATCHES = (64, 128, 256, 512, 1024)
megabytes = {"plain": [], "chunks of 64": []}


def measure_batch(batch, classes):
    """Keep the memory of a plain step and of one in chunks."""
    megabytes["plain"].append(extra_memory(lambda: pair_loss(network(batch), classes).backward()))
    megabytes["chunks of 64"].append(extra_memory(lambda: cached_backward(network, pair_loss, batch, classes, 64)))


for size in BATCHES:
    measure_batch(torch.randn(size, 1, 28, 28), torch.arange(size) // 4)
# -

# With chunks, a step keeps the activations of one chunk and the similarities of all pairs.


# +
def draw_memory():
    """Plot megabytes against the size of the batch."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.add_subplot()
    for (name, values), style in zip(megabytes.items(), ("k:o", "C0-o"), strict=True):
        axis.loglog(BATCHES, values, style, base=2, label=name)
    axis.set(xlabel="batch", ylabel="peak MB of a step")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


draw_memory()
# -

# ## What to try next
#
# - Above some size the losses stream by themselves; you need not switch anything on. `chunk_size` is there to
#   experiment (`docs/streaming.md`).
# - `process_group` splits proxies, gradient and optimizer state over processes (`docs/distributed.md`).
# - An optimizer with two numbers for each parameter, such as Adam, adds two more times the proxies: try SGD.
# - `recipe(..., batch_size=1024, chunk_size=32)` trains any recipe with large batches. `docs/large_batches.md`
#   explains batch norms, what a step costs, and whether a larger batch is worth it.
# - What margins from descriptions are: notebook `07_margins_from_class_names`. Proxies beside pairs in one loss:
#   `01_swap_one_loss`.
