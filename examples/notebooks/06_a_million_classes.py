# # 6. A million classes
#
# A proxy loss compares every sample of a batch with one proxy for each class. Written down directly it keeps several
# matrices of batch times classes. The losses of pml_ext walk over the proxies in chunks instead: the same value and
# the same gradients, with little memory beyond the proxies and their gradient. This notebook checks that they are the
# same, then measures time and memory while the number of classes grows to a million. Nothing is downloaded but the
# packages.

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

from pml_ext.losses import AdaptiveAdditiveMarginLoss, ProxyAnchorLoss

torch.set_num_threads(1)  # said explicitly: times depend on it
# -

# ## The same numbers
#
# The proxies of PML's `ProxyAnchorLoss` are copied into ours by `load_state_dict`. Small chunks, so that there is
# something to put together; float64, so that rounding does not hide a mistake.

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

# PML has no loss with a margin for each pair of classes. There the comparison is with the formula, written down with
# the whole matrix.

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

# The differences are rounding. Nothing is sampled or left out.

# ## Time and memory
#
# Forward and backward in float32. The losses of a size take turns, and the median of seven steps after a first one
# counts. Memory is the peak of the process during a step, beyond what it held before and beyond the gradient of the
# proxies, which any exact loss needs. Linux tells it; elsewhere that plot stays empty.

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

# Linux tells how much memory a process holds, and how much it held at most.


# +
def resident(field):
    """Return VmRSS (memory of the process) or VmHWM (its peak) in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def extra_memory(step, gradient):
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

# From a thousand classes to a million; those of PML stop at 100,000, to keep this notebook small.

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

# Time grows with the number of classes for all of them: exact losses must look at every proxy. What differs is the
# factor, and the memory: PML's grows like the matrix, ours much more slowly. CosFace has one margin for all pairs of
# classes; the adaptive loss beside it also computes a margin for each pair, one more matrix product. At a million
# classes, in numbers:

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

# What this can show: exactness, and how the curves grow. What it cannot: the exact factor on another machine, with
# more threads or on a GPU. Small numbers of memory include what the system allocates in steps of its own, and few
# repeats on a busy machine give rough times. `benchmarks/proxy_scaling.py` measures each row in processes of its own;
# `docs/streaming.md` has the figures, those of PML at a million classes included.

# ## What to try next
#
# - Nothing needs to be switched on: above some size the losses stream by themselves. `chunk_size` is there to
#   experiment (`docs/streaming.md`).
# - `process_group` splits proxies, gradient and optimizer state over processes (`docs/distributed.md`).
# - An optimizer that keeps two numbers for each parameter, such as Adam, adds two more times the proxies: try SGD.
# - What margins from descriptions are: notebook `05_margins_from_class_names`. Proxies beside pairs in one loss:
#   `01_swap_one_loss`.
