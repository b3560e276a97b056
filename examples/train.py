"""Train a recipe on your data and test it on classes it has never seen.

Run: python examples/train.py --recipe mhgl --data glyphs --epochs 5 --out runs/glyphs
     python examples/train.py --recipe proxy_anchor --data photos/ --backbone resnet18 --set lr=1e-3 --out runs/photos
     python examples/train.py --recipe intra_batch --preset paper:cub --data cub --root data --download --out runs/cub

The network learns the training classes less some validation classes, which choose the epoch: a fifth of them where
there are four or more. The test classes are looked at once, at the end; queries search the gallery where the data has
one. All image files are checked before the first epoch, most of them without being decoded; with --skip-broken, those
that turn out to be broken later are replaced in training, left out of tests, and named. --out gets config.json,
metrics.jsonl (a line for each epoch, one of the test), last.pt, best.pt (the best epoch; without validation classes
there is none, and the last epoch is tested), curves.png, gallery.png, and report.html to be opened in a browser. After
an interruption the same command with --resume goes on behind the last whole epoch; with the same --workers and --device
it ends where an uninterrupted run does. It may have more --epochs than before, and with --skip-broken it leaves out
files that have broken since. Then: examples/embed.py and examples/search.py.
"""

import argparse
import ast
import copy
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import command_line  # first: it keeps a warning away
import numpy as np
import torch
from tqdm import tqdm

from pml_ext import recipes
from pml_ext.datasets import ClassSubset, open_data
from pml_ext.datasets.content import file_names
from pml_ext.datasets.image_files import ImageFiles, broken_images
from pml_ext.datasets.readable import Readable
from pml_ext.recipes.checkpoint import write_text
from pml_ext.recipes.device import usable_device
from pml_ext.recipes.run_config import autocast_of, describe_run, read_config, write_config
from pml_ext.recipes.run_folder import load_run
from pml_ext.recipes.run_lock import RunLock
from pml_ext.strict_json import strict_json
from pml_ext.visualization import plot_curves, retrieval_gallery, retrieval_report

METRICS = {"precision_at_1": "P@1", "r_precision": "R-precision", "mean_average_precision_at_r": "MAP@R", "NMI": "NMI"}


class Images(Sequence):
    """The images of some views, untransformed, read when they are drawn."""

    def __init__(self, *views):
        self.places = [(view.dataset, int(index)) for view in views for index in view.indices]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, place):
        dataset, index = self.places[place]
        return dataset[index][0]


def main(
    recipe,
    data,
    out,
    epochs=None,
    seed=0,
    backbone=None,
    preset="small",
    embedding_size=None,
    image_size=None,
    chunk_size=None,
    settings=(),
    test_classes=0.5,
    validation_classes=None,
    class_embeddings=None,
    root=None,
    download=False,
    skip_broken=False,
    autocast=None,
    workers=0,
    device=None,
    resume=False,
):
    """Return the last line of metrics.jsonl: epoch and metrics of the test classes."""
    out, device = Path(out), usable_device(device)
    old = what_is_there(out, resume)
    autocast = autocast_of({"autocast": autocast})

    opened = open_data(data, test_classes, class_embeddings, root, download, seed)
    before = {} if old is None else old.get("data", {})
    opened = without(opened, before.get("left_out", []))
    prints = fingerprints(opened)
    kept = without_broken(opened, skip_broken)
    left_out = sorted(names_of(opened) - names_of(kept))
    opened = kept
    if validation_classes is None:
        validation_classes = 0.2 if opened.num_classes >= 4 else 0
        if not validation_classes:
            few = f"{opened.num_classes} training classes are too few"
            print(f"{few} to cut validation classes from: the last epoch is kept")
    fitted = hold_out(opened, validation_classes, seed)
    if skip_broken:
        fitted = replace(fitted, train=replacing_broken(fitted.train))
    given = {"epochs": epochs, "backbone": backbone, "embedding_size": embedding_size, "image_size": image_size}
    given["chunk_size"] = chunk_size
    given = merge({name: value for name, value in given.items() if value is not None}, dict(settings))
    given.setdefault("in_channels", opened.in_channels)
    if old is not None:  # a run of a former version goes on with PML's sampler
        given.setdefault("sampler", old["settings"]["sampler"])
    if preset == "small" and given.get("image_size") is None:
        given["image_size"] = side_of((replacing_broken(opened.train) if skip_broken else opened.train)[0][0])
    for seeded in (torch.manual_seed, np.random.seed, random.seed):  # before the network is made
        seeded(seed)
    made = recipes.recipe(recipe, fitted.num_classes, preset=preset, class_embeddings=fitted.class_embeddings, **given)
    fitted.train.transform = made.transforms.train
    tested = [view for view in (opened.test, opened.gallery) if view is not None]
    for title, views in (("validation", [fitted.test]), ("test", tested)):
        labels = torch.cat([view.labels for view in views])
        if labels.bincount().max() < 2:
            raise ValueError(f"--data must have a {title} class with two images, got {len(labels)} images of one each")
    for view in (fitted.test, *tested):
        view.transform = made.transforms.test

    def embed(trunk, view, progress=False):
        """Return a view of what could be read, the embeddings and the labels."""
        size = made.settings.image_size
        readable = Readable(view, torch.zeros(opened.in_channels, size, size)) if skip_broken else view
        embeddings, labels = recipes.embed(trunk, readable, autocast=autocast, num_workers=workers, progress=progress)
        kept = labels >= 0
        return only(view, kept), embeddings[kept], labels[kept]

    def validate(trunk):
        return recipes.retrieval_metrics(*embed(trunk, fitted.test)[1:])

    def tell(trainer):
        entry = trainer.history[-1]
        names = [name for name in ("precision_at_1", "mean_average_precision_at_r") if name in entry]
        values = ", ".join(f"{METRICS[name]} {100 * entry[name]:.1f}" for name in names)
        line = f"epoch {entry['epoch']}/{made.epochs}: loss {entry['loss']:.3g}"
        tqdm.write(f"{line}, validation {values}" if values else line)

    trainer = recipes.Trainer(
        made,
        fitted.train,
        validate=validate if validation_classes else None,
        end_of_epoch_hook=tell,
        folder=out,
        autocast=autocast,
        device=device,
        dataloader_num_workers=workers,
    )
    sizes = {"train": fitted.train, "validation": fitted.test if validation_classes else (), "test": opened.test}
    config = describe_run(
        made,
        autocast,
        seed=seed,
        data={
            "source": str(data),
            "root": None if root is None else str(root),
            "test_classes": test_classes,
            "validation_classes": validation_classes,
            "class_embeddings": None if class_embeddings is None else str(class_embeddings),
            "images": {name: len(view) for name, view in sizes.items()},
            "fingerprints": fingerprints(opened),
            "left_out": sorted({*before.get("left_out", []), *left_out}),
        },
    )
    if old is not None:
        check_same(old, config)
        check_images(before.get("fingerprints", prints), prints)
    with RunLock(out):
        if what_is_there(out, resume) != old:
            raise ValueError(f"--out must not be changed by others meanwhile, got {out}")
        if old is not None and (out / "last.pt").exists():  # else it was killed within the first epoch
            trainer.resume(other_data=bool(left_out))
        write_config(out, config if old is None else old | config)
        return train_and_test(trainer, opened, fitted, validation_classes, out, device, embed)


def train_and_test(trainer, opened, fitted, validation_classes, out, device, embed):
    """Train, and return the metrics of the test classes."""
    made, tested = trainer.recipe, [view for view in (opened.test, opened.gallery) if view is not None]
    validated = fitted.test.num_classes if validation_classes else 0
    print(f"{fitted.num_classes} classes to train, {validated} to validate, {opened.test.num_classes} to test")
    trainer.train()
    replaced = replaced_files(fitted.train)
    if replaced:
        counted = f"{len(replaced)} of {len(fitted.train)} images to train with cannot be read"
        print(f"warning: {counted}, others took their places: {command_line.some_of(replaced)}", file=sys.stderr)

    run = load_run(out, device)  # what is tested is what others load
    whole = tested
    tested, *embedded = zip(*[embed(run.recipe.trunk, view, progress=True) for view in tested], strict=True)
    embedded = list(zip(*embedded, strict=True))
    unread = [path for all_, part in zip(whole, tested, strict=True) for path in paths_without(all_, part)]
    if unread:
        counted = f"{len(unread)} of {sum(map(len, whole))} images that cannot be read"
        print(f"warning: tested without {counted}: {command_line.some_of(unread)}", file=sys.stderr)
    metrics = recipes.retrieval_metrics(*embedded[0], *embedded[1:], metrics=tuple(METRICS))
    result = {"split": "test", "epoch": run.epoch, **metrics}
    write_text(out / "metrics.jsonl", "".join(strict_json(entry) + "\n" for entry in [*trainer.history, result]))
    draw(out, trainer.history, tested, embedded)
    if len(tested) == 1:
        in_gallery = {}
    else:
        embeddings, labels = embedded[1]
        in_gallery = {"gallery": embeddings, "gallery_labels": labels, "gallery_images": Images(tested[1])}
    names = tested[-1].class_names  # a gallery has all classes of the queries, with the same numbers, and others
    retrieval_report(*embedded[0], Images(tested[0]), names, out / "report.html", title=str(out), **in_gallery)
    why = "best on validation classes" if validation_classes else "the last"
    print(f"test, with the network of epoch {run.epoch} of {made.epochs} ({why}), percent:")
    print("  ".join(f"{title} {100 * result[name]:.1f}" for name, title in METRICS.items()))
    print(f"network, metrics and pictures: {out}")
    return result


def hold_out(data, validation_classes, seed):
    """Return data whose test classes are the validation classes; the data itself where there are to be none."""
    if not validation_classes:
        return data
    try:
        return data.hold_out(validation_classes, seed)
    except ValueError as error:
        count, others = data.num_classes, data.test.num_classes
        counted = f"{count} training classes (of {count + others}; the others are test classes)"
        if count < 4:
            raise ValueError(
                f"{counted} are too few for --validation-classes {validation_classes}: "
                "give 0 or, for data without a split, fewer --test-classes"
            ) from error
        raise ValueError(f"{error}: there are {counted}") from error


def what_is_there(out, resume):
    """Return the configuration of the run to go on with; None for a new one, which finds no other."""
    if resume:
        return read_config(out)
    if any((out / name).exists() for name in ("config.json", "last.pt")):
        raise ValueError(f"--out must hold no run yet (or add --resume), got {out}")
    return None


def views_of(data):
    return {name: view for name in ("train", "test", "gallery") if (view := getattr(data, name)) is not None}


def fingerprints(data):
    """Return what tells whether the images are others; not by their sizes, since some may have broken."""
    return {name: view.fingerprint(sizes=False) for name, view in views_of(data).items()}


def names_of(data):
    """Return the names of all image files, behind those of the parts of the data."""
    return {f"{name}/{image}" for name, view in views_of(data).items() for image in file_names(view) or ()}


def without(data, left_out):
    """Return data without the image files that the run has left out."""
    views, left_out = {}, set(left_out)
    for name, view in views_of(data).items():
        names = file_names(view)
        if left_out and names is not None:
            views[name] = only(view, torch.tensor([f"{name}/{image}" not in left_out for image in names]))
    return replace(data, **views)


def without_broken(data, skip_broken):
    """Return data without the image files that cannot be read; an error that names them unless they may be skipped."""
    views = {name: view for name, view in views_of(data).items() if isinstance(view.dataset, ImageFiles)}
    paths = [view.dataset.paths[i] for view in views.values() for i in view.indices.tolist()]
    broken = broken_images(paths, progress=True) if paths else {}
    if not broken:
        return data
    counted, names = f"{len(broken)} of {len(paths)} images", command_line.some_of([paths[i] for i in broken])
    if not skip_broken:
        first = next(iter(broken.values()))
        raise ValueError(f"cannot read {counted} (--skip-broken: leave them out): {names}; the first: {first}")
    print(f"warning: skipped {counted} that cannot be read: {names}", file=sys.stderr)
    start, kept = 0, {}
    for name, view in views.items():
        kept[name] = torch.tensor([start + i not in broken for i in range(len(view))])
        view.dataset.broken[view.indices[~kept[name]]] = True  # or one might take the place of another
        start += len(view)
    return part_of(data, kept)


def part_of(data, kept):
    """Return some images of data, without the classes that have none of them: in a gallery or among the queries."""
    views = {name: getattr(data, name) for name in kept}
    left = {name: {view.classes[i] for i in view.labels[kept[name]].tolist()} for name, view in views.items()}
    if "gallery" in views:
        left["test"] &= left["gallery"]
    classes = {name: [c for c in view.classes if c in left[name]] for name, view in views.items()}
    if "gallery" in views:  # queries' classes first: labels mean the same in both
        classes["gallery"].sort(key=lambda c: c not in left["test"])
    lost = [(view, c) for name, view in views.items() for c in view.classes if c not in left[name]]
    if lost:
        names = [str(c if view.class_names is None else view.class_names[view.classes.index(c)]) for view, c in lost]
        names = list(dict.fromkeys(names))
        counted = f"{len(names)} classes" if len(names) > 1 else "a class"
        print(
            f"warning: left out {counted} without images that can be read: {command_line.some_of(names)}",
            file=sys.stderr,
        )
    if len(classes["train"]) < 2 or not classes["test"]:
        counts = f"{len(classes['train'])} and {len(classes['test'])}"
        raise ValueError(f"--data must have >= 2 training and >= 1 test classes that can be read, got {counts}")
    parts = {}
    for name, view in views.items():
        part = ClassSubset(view.dataset, classes[name])
        part.transform = view.transform
        parts[name] = only(part, torch.isin(part.indices, view.indices[kept[name]]))
    rows = data.class_embeddings
    if rows is not None:
        rows = rows[[data.train.classes.index(c) for c in classes["train"]]]
    return replace(data, class_embeddings=rows, **parts)


def only(view, kept):
    """Return some images of a view, with the labels that they have."""
    part = copy.copy(view)
    part.indices, part.labels = view.indices[kept], view.labels[kept]
    return part


def paths_without(view, part):
    """Return the paths of the images of a view that a part of it lacks."""
    lacking = view.indices[~torch.isin(view.indices, part.indices)].tolist()
    return [view.dataset.paths[i] for i in lacking]


def replacing_broken(dataset):
    """Return a view in which another image of the class takes the place of one that cannot be read."""
    dataset = copy.copy(dataset)
    if isinstance(dataset, ImageFiles):
        dataset.skip_broken = True
    elif isinstance(dataset, ClassSubset):
        dataset.dataset = replacing_broken(dataset.dataset)
    return dataset


def replaced_files(view):
    """Return the paths of a view's images that another one had to replace."""
    dataset, indices = view, torch.arange(len(view))
    while isinstance(dataset, ClassSubset):
        dataset, indices = dataset.dataset, dataset.indices[indices]
    return [dataset.paths[i] for i in indices.tolist() if dataset.broken[i]] if isinstance(dataset, ImageFiles) else []


def merge(options, settings):
    """Return both; the recipe knows which names are right."""
    both = sorted(set(options) & set(settings))
    if both:
        raise ValueError(f"--set must not repeat --{both[0].replace('_', '-')}, got {both[0]}={settings[both[0]]}")
    return options | settings


def side_of(image):
    """Return a side for the network's images: the longer one of an image, a multiple of 4 in 8 to 64."""
    longer = max(image.shape[-2:] if isinstance(image, torch.Tensor) else image.size)
    return min(max(4 * round(longer / 4), 8), 64)


def check_same(old, new):
    """Check that a run goes on with what it began with; versions of packages and the number of epochs may differ."""
    checked = "fingerprints" in old.get("data", {})
    old, new = (dict(flat(config)) for config in (old, new))
    mine = ("settings.epochs", "data.fingerprints", "data.left_out", "data.images.test", "training_images", "resumed")
    mine += ("data.images",) if checked else ()  # broken ones may be left out
    old, new = (
        {name: x for name, x in config.items() if not f"{name}.".startswith((*(f"{x}." for x in mine), "versions."))}
        for config in (old, new)
    )
    for name in new | old:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"--resume must go on with the {name} of config.json, {old.get(name)}, got {new.get(name)}"
            )


def check_images(old, new):
    """Check that a run goes on with the images that it began with."""
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"--data must have the images that the run began with, got other files or labels for {name} (files "
                "that have broken since: leave them there, and add --skip-broken)"
            )


def flat(values, prefix=""):
    """Yield the names and values of nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def draw(out, history, tested, embedded):
    """Draw the curves, and some queries with their neighbours."""
    first = history[0]["loss"] or 1.0
    curves = {"training loss / that of epoch 1": [entry["loss"] / first for entry in history]}
    for name, title in METRICS.items():
        if name in history[0]:
            curves[f"{title}, validation classes"] = [entry[name] for entry in history]
    plot_curves(curves, path=out / "curves.png")
    embeddings, labels = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    if len(labels) < 2:
        return
    queries, searched = None, None
    if len(embedded) > 1:  # a gallery: queries do not find each other
        count = len(embedded[0][1])
        queries = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:8].tolist()
        searched = range(count, len(labels))
    images = Images(*tested)
    retrieval_gallery(embeddings, labels, images, queries, path=out / "gallery.png", searched=searched)


def number(text):
    """Return an integer (how many) or a float (a share)."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def setting(text):
    """Return name and value of "name=value"."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be name=value, got {text!r}")
    for word, meaning in (("true", True), ("false", False), ("none", None)):
        if value.lower() == word:
            return name, meaning
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


if __name__ == "__main__":
    wording = {
        "source must": "--data must",
        "name must": "--recipe must",
        "a setting must": "--set must",
        "a run's folder must": "--out must",
        "epochs must": "--epochs must",
        "val_classes must": "--validation-classes must",
        "class_embeddings must be given for adaptive margins (or margin_scale=0)": (
            "--class-embeddings FILE must be given for adaptive margins (or --set margin_scale=0)"
        ),
    }
    command = command_line.Command(wording, description=__doc__)
    command.add_argument("--recipe", required=True, help=", ".join(recipes.RECIPES))
    command.add_argument(
        "--data", required=True, help="glyphs, cub, cars196, sop, inaturalist2018, in_shop, a folder, .npz or .csv file"
    )
    command.add_argument("--out", required=True, help="folder of the run")
    command.add_argument("--epochs", type=int, help="default: the preset's")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--backbone", help="convnet or a timm model; default: the preset's")
    command.add_argument("--preset", default="small", help=", ".join(recipes.PRESETS))
    command.add_argument("--embedding-size", type=int, help="default: the preset's")
    command.add_argument("--image-size", type=int, help="default: the preset's; small: of the first image, at most 64")
    command.add_argument("--chunk-size", type=int, help="images that the network gets at a time; default: a batch")
    command.add_argument(
        "--set", dest="settings", type=setting, nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="settings of the recipe",
    )  # fmt: skip
    command.add_argument("--test-classes", type=number, default=0.5, help="share or number, for data without a split")
    command.add_argument(
        "--validation-classes", type=number, help="share or number of training classes; default: 0.2, 0 if they are few"
    )
    command.add_argument("--class-embeddings", help=".npy or .npz file with a row for each class")
    command.add_argument("--root", help="folder of a data set with a name")
    command.add_argument("--download", action="store_true", help="download it if it is not there")
    command.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--autocast", choices=["bfloat16"], help="the network computes in this type")
    command.add_argument("--workers", type=int, default=0, help="processes that load images")
    command.add_argument("--device", help="default: cuda if there is one")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.run(main)
