# # 3. Fine-tune a pretrained network on a folder
#
# At the end you will have a network that has seen ImageNet, fine-tuned on a folder of images, and its numbers beside
# those of the same network before fine-tuning. The weights come with a package: nothing is downloaded but the packages.
# To use your own photographs, change one line.

# On Colab this installs the package; elsewhere it finds it.

# +
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("pml_ext") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "pml-ext[examples,pretrained]"], check=True)

# +
import os

os.environ["TQDM_DISABLE"] = "1"  # PML's trainers draw a progress bar, which would fill this page
# -

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 80}

# +
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

with warnings.catch_warnings():  # torch_geometric uses torch.jit.script, which PyTorch has deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from pml_ext.datasets import Glyphs, open_data
    from pml_ext.recipes import Trainer, embed, load_run, recipe, retrieval_metrics
    from pml_ext.trunks import BackboneFeatures
    from pml_ext.visualization import plot_curves, retrieval_gallery

# -

# ## A folder of images
#
# The folder has one subfolder for each class. Here we paint it: 80 characters as colored signs in front of two
# photographs that come with scikit-learn. For your own images, set `photos` to your folder and skip the next two cells.

# +
work = Path(tempfile.mkdtemp())
photos = work / "photos"
CLASSES, IMAGES, SIDE = 80, 16, 96
backgrounds = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def paint(character, rng):
    """Return a character in a random color in front of a random part of a photograph."""
    photograph = backgrounds[rng.integers(len(backgrounds))]
    left, top = rng.integers(photograph.width - SIDE), rng.integers(photograph.height - SIDE)
    background = photograph.crop((left, top, left + SIDE, top + SIDE))
    color = tuple(rng.integers(256, size=3).tolist())
    return Image.composite(Image.new("RGB", background.size, color), background, character)


# +
glyphs = Glyphs("train", samples_per_class=IMAGES, image_size=SIDE)
rng = np.random.default_rng(0)
for label in np.linspace(0, glyphs.num_classes - 1, CLASSES).astype(int):
    folder = photos / glyphs.class_names[label].lower().replace(" ", "_")
    folder.mkdir(parents=True)
    for i in range(IMAGES):
        paint(glyphs[label * IMAGES + i][0], rng).save(folder / f"{i:02}.jpg", quality=90)

print(*sorted(path.relative_to(work).as_posix() for path in photos.rglob("*.jpg"))[:4], "...", sep="\n")
# -

# ## Open it
#
# `open_data` draws half of the classes for the test. `hold_out` takes a quarter of the others for validation: they
# choose the epoch. The network never trains on a class that it is tested on.

data = open_data(photos)
fit = data.hold_out(0.25)
for title, view in (("training", fit.train), ("validation", fit.test), ("test", data.test)):
    print(f"{title:<12}{view.num_classes:>4} classes {len(view):>6} images")

# ## A recipe that begins with ImageNet
#
# "recommended" is what `pml-ext train` begins with, too. The preset "finetune" takes EfficientNet-Lite0 with the
# weights of the extra `pretrained`. Each setting can be replaced. Small images and few epochs keep
# this notebook short; 128 pixels and 15 epochs are the defaults.

made = recipe("recommended", fit.num_classes, preset="finetune", image_size=64, epochs=8)
for name in ("backbone", "weights", "image_size", "embedding_size", "lr", "head_lr", "proxy_lr", "warmup_epochs"):
    print(f"{name:<16}{made.notes[name]}")

# The optimizer has a group for each part. The backbone learns slowly, new layers faster, and proxies fastest.

for group in made.param_groups:
    print(f"{group['name']:<24}{sum(p.numel() for p in group['params']):>10,} parameters, lr {group['lr']}")

# ## The baseline: no training
#
# What do ImageNet's features find on their own? This is the number to beat. Validation uses the same function.

# +
fit.train.transform, fit.test.transform = made.transforms
data.test.transform = made.transforms.test


def metrics_of(trunk, view):
    """Return the retrieval metrics of a network on some classes."""
    return retrieval_metrics(*embed(trunk, view))


frozen = metrics_of(BackboneFeatures(made.trunk), data.test)
# -

# ## Fine-tune
#
# The trainer keeps the last and the best epoch in a folder.

# +
torch.manual_seed(0)
np.random.seed(0)  # noqa: NPY002 (PML draws from it)
run_folder = work / "run"
trainer = Trainer(made, fit.train, validate=lambda trunk: metrics_of(trunk, fit.test), folder=run_folder, device="cpu")
for entry in trainer.train():
    print(f"epoch {entry['epoch']}: loss {entry['loss']:.2f}, validation P@1 {100 * entry['precision_at_1']:.1f}%")

# +
curves = {
    "training loss / that of epoch 1": [entry["loss"] / trainer.history[0]["loss"] for entry in trainer.history],
    "P@1, validation classes": [entry["precision_at_1"] for entry in trainer.history],
    "MAP@R, validation classes": [entry["mean_average_precision_at_r"] for entry in trainer.history],
}
plot_curves(curves, ylabel="ratio, or metric from 0 to 1")
# -

# ## Before and after
#
# `load_run` builds the network of the best epoch from the folder. We look at the test classes once.

# +
run = load_run(run_folder, device="cpu")
tuned = metrics_of(run.recipe.trunk, data.test)
print(f"{f'{data.test.num_classes} unseen classes, percent':<36}{'P@1':>8}{'MAP@R':>8}")
for title, found in (("ImageNet features", frozen), (f"fine-tuned, epoch {run.epoch}", tuned)):
    print(f"{title:<36}{100 * found['precision_at_1']:>8.1f}{100 * found['mean_average_precision_at_r']:>8.1f}")
# -

# One short training with one seed shows that fine-tuning works here. It does not show which recipe is best: compare
# recipes with several seeds, on validation classes.

# ## What it finds
#
# Each row shows a query and its nearest neighbors. Green frames are right; dashed red ones with a cross are wrong.

# +
embeddings, labels = embed(run.recipe.trunk, data.test)
data.test.transform = None  # from here on we look at the images
images = [data.test[i][0] for i in range(len(data.test))]
retrieval_gallery(embeddings, labels, images, num_queries=5, num_neighbors=8)
# -

# ## What to try next
#
# - Your own folder in place of `photos`, or a CSV file (`docs/datasets.md`). On the command line:
#   `pml-ext train photos/` (`docs/commands.md`).
# - `frozen_stages=0` to train all layers, LoRA, other backbones and your own weights: `docs/pretrained.md`.
# - Another method: that of a paper, `recipe("mhgl", ...)`, or one loss, `recipe("proxy_anchor", ...)`
#   (`docs/recipes.md`). What MHGL adds: notebook `04_global_and_local_heads`.
# - An index, a search with one image, and a report for this run: notebook `02_from_training_to_search`.
