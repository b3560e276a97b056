# # 2. From training to search
#
# At the end you will have a trained network, an index of images, a search with one new image, and a report of what the
# network finds and misses. A recipe gives network, loss, sampler, optimizer and schedule in one line. PML's trainer
# validates and keeps checkpoints. Nothing is downloaded but the packages.

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
import json
import re
import tempfile
import warnings
from pathlib import Path

import faiss
import torch
from matplotlib.figure import Figure

with warnings.catch_warnings():  # torch_geometric uses torch.jit.script, which PyTorch has deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from pml_ext.datasets import Glyphs, open_data
    from pml_ext.recipes import Trainer, embed, load_run, recipe, retrieval_metrics
    from pml_ext.visualization import plot_curves, retrieval_gallery, retrieval_report

_ = torch.manual_seed(0)
# -

# ## Data
#
# `open_data` takes a name, a folder with a subfolder for each class, a CSV file, or a file of arrays. Training and test
# classes are disjoint. `hold_out` takes validation classes from the training classes. They choose the epoch; we look at
# the test classes once.

data = open_data("glyphs")
fit = data.hold_out(0.2)
for title, view in (("training", fit.train), ("validation", fit.test), ("test", data.test)):
    print(f"{title:<12}{view.num_classes:>4} classes {len(view):>6} images")

# ## A recipe
#
# We take a baseline of the field, Multi-Similarity, with the preset for small images. It learns fast. Another first
# word gives another method. Any setting can be changed by name; here we train fewer epochs, a narrower network and a
# higher learning rate.

made = recipe("multi_similarity", fit.num_classes, in_channels=data.in_channels, epochs=6, width=16, lr=4e-3)
size = sum(p.numel() for p in made.trunk.parameters())
print(f"{type(made.trunk).__name__} with {size:,} parameters, {type(made.loss).__name__}")

# `notes` says where each number comes from.

for name in ("base", "embedding_size", "batch_size", "optimizer", "lr", "epochs"):
    print(f"{name:<16}{made.notes[name]}")

# ## Training
#
# `Trainer` connects all parts to PML's trainer. A loss with proxies gets its optimizer too. With a folder, it keeps the
# last and the best epoch.

# +
fit.train.transform, fit.test.transform = made.transforms
data.test.transform = made.transforms.test
folder = Path(tempfile.mkdtemp())


def validate(trunk):
    """Return the metrics on the validation classes."""
    return retrieval_metrics(*embed(trunk, fit.test))


trainer = Trainer(made, fit.train, validate=validate, folder=folder, device="cpu")
for entry in trainer.train():
    print(f"epoch {entry['epoch']}: loss {entry['loss']:.3f}, validation P@1 {100 * entry['precision_at_1']:.1f}%")
# -

# The training loss, and the metrics on classes that the network does not train on.


# +
def titled(figure, title):
    """Return the figure with a title."""
    figure.suptitle(title, fontsize=11)
    return figure


curves = {
    "training loss / that of epoch 1": [e["loss"] / trainer.history[0]["loss"] for e in trainer.history],
    "P@1, validation classes": [e["precision_at_1"] for e in trainer.history],
    "MAP@R, validation classes": [e["mean_average_precision_at_r"] for e in trainer.history],
}
titled(plot_curves(curves, ylabel="ratio, or metric from 0 to 1"), "Training")
# -

# ## Save and load
#
# The folder has the settings and the weights of the network. `load_run` builds the network of the best epoch.

# +
print(sorted(path.name for path in folder.iterdir()))

run = load_run(folder, device="cpu")
trunk = run.recipe.trunk
print(f"epoch {run.epoch} of {made.epochs}, checksum of the weights {run.checksum}")
# -

# ## Test, once
#
# Every test image is a query against all others. Their classes were in neither training nor validation.

embeddings, labels = embed(trunk, data.test)
print({name: round(100 * value, 1) for name, value in retrieval_metrics(embeddings, labels).items()})

# A few epochs with one seed show that the steps work together, not what the method can do. `docs/retrieval.md` has
# tuned comparisons over several seeds.

# ## An index
#
# Embeddings have length 1, so their inner product is the cosine. A flat index compares a query with every image.

index = faiss.IndexFlatIP(embeddings.shape[1])
index.add(embeddings.numpy())
print(f"{index.ntotal} images in the index, {embeddings.shape[1]} dimensions each")

# ## Search with one image
#
# The query is a new image: a test character with a size, angle and position that no image in the index has. The results
# show the same letter; the same accent is harder.

# +
new = Glyphs("test", samples_per_class=2, seed=1)
query_image = new[2 * new.classes.index("Š") + 1][0]
with torch.inference_mode():
    query = torch.nn.functional.normalize(trunk(made.transforms.test(query_image)[None]))
similarities, rows = index.search(query.numpy(), 8)
class_names = data.test.class_names
for similarity, row in zip(similarities[0], rows[0], strict=True):
    print(f"{similarity:.3f}  {class_names[labels[row]]}")


# +
def draw_search():
    """Draw the query and what the index returned."""
    figure = Figure(figsize=(10, 1.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(rows[0]))
    characters = Glyphs("test").classes
    images = [query_image, *(raw[row] for row in rows[0])]
    titles = [
        "query",
        *(f"{characters[labels[row]]}  {s:.2f}" for row, s in zip(rows[0], similarities[0], strict=True)),
    ]
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image, cmap="gray")
        axis.set_title(title, fontsize=12)
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Character and cosine of the nearest images", fontsize=11)
    return figure


data.test.transform = None  # from here on the images are looked at, not embedded
raw = [data.test[i][0] for i in range(len(data.test))]
draw_search()
# -

# ## A gallery
#
# Random queries among the test images. Green frames are right; dashed red ones with a cross are wrong.

gallery = retrieval_gallery(embeddings, labels, raw, num_queries=5, num_neighbors=8)
titled(gallery, "Unseen characters: query, then its nearest neighbors")

# ## A report
#
# The report is one HTML file for the browser. It has the metrics of each class, worst and random queries, confused
# classes, a map and histograms. `num_points` keeps the map small.

report = retrieval_report(embeddings, labels, raw, class_names, folder / "report.html", num_points=300)
text = report.read_text(encoding="utf-8")
print(f"{report.name}: {len(text) / 1e6:.1f} MB; sections: {', '.join(re.findall(r'<h2[^>]*>(.*?)</h2>', text))}")

# The classes with the lowest MAP@R, read back from the file:

# +
held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
worst = held["classes"][:6]
print(f"{'class':<48}{'images':>7}{'P@1':>7}{'R-prec':>8}{'MAP@R':>7}")
for name, images, *metrics in worst:
    print(f"{name:<48}{images:>7}" + "".join(f"{100 * x:>7.1f}" for x in metrics))


# +
def draw_worst():
    """Draw an image of each of the worst classes, and the first wrong neighbor of that image."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(2, len(worst))
    for column, (name, _, _, _, map_at_r) in zip(axes.T, worst, strict=True):
        own = class_names.index(name)
        first = int((labels == own).nonzero()[0])
        _, ranked = index.search(embeddings[first : first + 1].numpy(), len(labels))
        wrong = next(i for i in ranked[0] if labels[i] != own)
        for axis, i, title in ((column[0], first, f"MAP@R {100 * map_at_r:.1f}%"), (column[1], wrong, "nearest other")):
            axis.imshow(raw[i], cmap="gray")
            axis.set_title(title, fontsize=9)
            axis.set_xlabel(class_names[labels[i]].lower().replace("letter ", "letter\n", 1), fontsize=7)
            axis.set(xticks=[], yticks=[])
    figure.suptitle("The worst classes, and the nearest image of another class", fontsize=11)
    return figure


draw_worst()
# -

# ## What to try next
#
# - More epochs, and your own images: `open_data("photos/")` (`docs/datasets.md`). On the command line: `pml-ext train`,
#   `pml-ext embed` and `pml-ext search` (`docs/commands.md`). For photographs, start from a pretrained network:
#   notebook `03_fine_tune_on_a_folder`.
# - Open `report.html` in a browser: `docs/visualization.md` explains what is in it.
# - Other recipes: `recipe("recommended", ...)`, with which `pml-ext train` begins, and those of the papers,
#   `recipe("mhgl", ...)`, `recipe("attention_ensemble", ...)`; what these do: notebooks `04_global_and_local_heads`,
#   `05_attention_ensemble` and `06_intra_batch_connections`.
