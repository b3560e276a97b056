"""``pml-ext train``: train a recipe on data, and test it on classes that it has never seen."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pml_ext.commands.command_line import number_of, some_of, warn
from pml_ext.commands.first_checks import merge, start_of
from pml_ext.commands.opened_data import (
    Embedder,
    Images,
    absolute,
    counted,
    has_split,
    hold_out,
    metrics_of,
    number_of_queries,
    readable_part,
    sample_of,
    source_of,
    warn_of_copies,
    warn_of_known,
)
from pml_ext.commands.run_report import write_run_report
from pml_ext.commands.tables import METRICS, in_percent, percent_table
from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.content import file_names
from pml_ext.datasets.image_reader import BrokenImageError, ImageReader
from pml_ext.datasets.leaving_out import image_names, replaced_files, replacing_broken, views_of, without
from pml_ext.datasets.retrieval_data import RetrievalData
from pml_ext.datasets.sources import open_data
from pml_ext.recipes.building import recipe as make_recipe
from pml_ext.recipes.checkpoint import write_text
from pml_ext.recipes.device import usable_device
from pml_ext.recipes.methods import DEFAULT_RECIPE
from pml_ext.recipes.run_config import LEFT_OUT, autocast_of, describe_run, read_config, write_config
from pml_ext.recipes.run_folder import load_run
from pml_ext.recipes.run_lock import RunLock
from pml_ext.recipes.trainer import Trainer
from pml_ext.recipes.training_recipe import Recipe
from pml_ext.strict_json import strict_json
from pml_ext.trunks.backbone_features import BackboneFeatures
from pml_ext.visualization.curves import plot_curves
from pml_ext.visualization.gallery import retrieval_gallery

FEW_STEPS = 500
FEW_CLASSES = 4
"""Below that many steps, and with up to that many validation classes, there is a warning."""


def main(
    data: str | Path,
    out: str | Path,
    recipe: str = DEFAULT_RECIPE,
    preset: str = "small",
    epochs: int | None = None,
    seed: int = 0,
    seeds: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train, with one seed or with several; the other arguments are those of ``train``.

    Returns:
        Of one seed what ``train`` does; of several ``seeds``, with that of each, ``mean`` and ``std`` of the metrics.
    """
    options |= {"recipe": recipe, "preset": preset, "epochs": epochs}
    if seeds is None:
        return train(data, out, seed=seed, **options)
    results, resume = [], options.pop("resume", False)
    for one in range(seed, seed + seeds):
        folder = Path(out) / f"seed-{one}"
        print(f"seed {one}: {folder}")
        results.append(train(data, folder, seed=one, resume=resume and (folder / "config.json").exists(), **options))
    values = {name: [result[name] for result in results] for name in METRICS if name in results[0]}
    mean = {name: statistics.mean(x) for name, x in values.items()}
    std = {name: statistics.stdev(x) for name, x in values.items()}
    if mean:
        row = {name: (mean[name], std[name]) for name in mean}
        title = f"mean (standard deviation) of {seeds} seeds"
        print(percent_table("test classes, percent", {title: row}))
    return {"seeds": results, "mean": mean, "std": std}


class Prepared(NamedTuple):
    """What a training takes.

    Attributes:
        fitted: Images of training classes.
        validated: Images of validation classes, in one view; none where there are no such classes.
        tested: Queries, and the gallery if there is one; none where all classes are trained.
        validation_classes: Their share or number; 0: there are none.
        made: The recipe.
    """

    fitted: ClassSubset
    validated: list[ClassSubset]
    tested: list[ClassSubset]
    validation_classes: float
    made: Recipe


def train(
    data: str | Path,
    out: str | Path,
    recipe: str,
    preset: str,
    epochs: int | None = None,
    seed: int = 0,
    backbone: str | None = None,
    weights: str | None = None,
    embedding_size: int | None = None,
    image_size: int | None = None,
    chunk_size: int | None = None,
    settings: Any = (),
    test_classes: float = 0.5,
    split_seed: int | None = 0,
    validation_classes: float | None = None,
    class_embeddings: str | None = None,
    root: str | None = None,
    download: bool = False,
    skip_broken: bool = False,
    background: str = "white",
    turn: bool = True,
    white: int | str = 65535,
    autocast: str | None = None,
    workers: int = 0,
    device: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, test, and write all of it to a folder; the arguments are those of the command.

    Returns:
        The last line of ``metrics.jsonl``, epoch and metrics of the test classes, with ``out`` and ``baseline``.
    """
    out, chosen_device = Path(out), usable_device(device)
    old = what_is_there(out, resume)
    of_autocast = autocast_of({"autocast": autocast})
    if old is not None and white == "largest":  # which was found when the run began
        white = old.get("reader", {}).get("white", white)
    reader = ImageReader(background, turn, white)
    if old is not None and "split_seed" not in old.get("data", {}):  # a former version tested on the last classes
        split_seed = None
    opened = open_data(data, test_classes, class_embeddings, root, download, seed, reader, split_seed)
    if test_classes == 0 and opened.test is not None:
        raise ValueError(f"--test-classes 0 must be used with data without a split (train and test), got {data}")
    if old is None and (test_classes, split_seed) != (0.5, 0) and has_split(data, root, reader):
        warn("--test-classes and --split-seed change nothing, since DATA has a split")
    before = {} if old is None else old.get("data", {})
    opened = without(opened, before.get("left_out", []))
    prints = fingerprints(opened)

    given: dict[str, Any] = {"epochs": epochs, "backbone": backbone, "weights": weights}
    given |= {"embedding_size": embedding_size, "image_size": image_size, "chunk_size": chunk_size}
    given = merge({name: value for name, value in given.items() if value is not None}, dict(settings))
    given.setdefault("in_channels", opened.in_channels)
    if old is not None:  # a run of a former version goes on with PML's sampler
        given.setdefault("sampler", old["settings"]["sampler"])
        if not (out / "last.pt").exists():  # killed within the first epoch, which begins again
            given |= {name: value for name, value in start_of(old).items() if value is not None}
        elif old["settings"]["backbone"] != "googlenet":  # others need no weights but those of the checkpoint
            given |= {"weights": None, "pretrained": False}
        if old["settings"]["backbone"] != "googlenet":
            given |= {name: old["settings"][name] for name in ("pixel_mean", "pixel_std", "frozen_stages")}

    def prepare(opened: RetrievalData, checked: bool) -> Prepared:
        count = validation_classes
        if count is None:
            count = 0 if opened.test is None or opened.num_classes < 4 else 0.2
        fitted = hold_out(opened, count, seed)
        if skip_broken:
            fitted = replace(fitted, train=replacing_broken(fitted.train))
        tested = [view for view in (opened.test, opened.gallery) if view is not None]
        validated = [fitted.test] if count and fitted.test is not None else []
        for title, views in (("validation", validated), ("test", tested)):
            labels = torch.cat([view.labels for view in views]) if views else torch.zeros(2, dtype=torch.long)
            if labels.bincount().max() < 2:
                drawn = number_of(len(labels), f"{title} class", f"{title} classes")
                raise ValueError(f"DATA must have a {title} class with two images, got {drawn} of one image each")
        if preset == "small" and given.get("image_size") is None:
            given["image_size"] = side_of(first_image(opened.train, skip_broken and checked))
        for seeded in (torch.manual_seed, np.random.seed, random.seed):  # before the network is made
            seeded(seed)
        rows = fitted.class_embeddings
        made = make_recipe(recipe, fitted.num_classes, preset=preset, class_embeddings=rows, **given)
        fitted.train.transform = made.transforms.train
        for view in [*validated, *tested]:
            view.transform = made.transforms.test
        return Prepared(fitted.train, validated, tested, count, made)

    try:  # a wrong setting is told before all images are checked
        prepared: Prepared | None = prepare(opened, checked=False)
    except BrokenImageError:  # the first one, which the check names with all others
        prepared = None
    kept = readable_part(opened, skip_broken)
    left_out = sorted(image_names(opened) - image_names(kept))
    warn_of_copies(reversed(views_of(kept).values()))  # gallery and test first: those count
    if prepared is None or kept is not opened:
        prepared = prepare(kept, checked=True)
    fitted, validated, tested, _, made = prepared
    if class_embeddings is not None and not any(name.endswith("class_embeddings") for name in made.loss.state_dict()):
        warn(f"the recipe {recipe} makes no use of --class-embeddings")
    if old is None and weights is not None and (Path(weights) / "config.json").is_file():
        first = read_config(weights).get("data", {})
        others = {name: mark for name, mark in prints.items() if first.get("fingerprints", {}).get(name) != mark}
        if first.get("sample"):
            warn_of_known(first["sample"], tested, f"the network of {weights}")
        elif first.get("source") == source_of(data) and set(others) - {"train"}:  # of arrays, or a former version
            warn(f"the network of {weights} may have been trained on some of the test classes, which were others then")
    embed = Embedder(skip_broken, of_autocast, workers)

    def validate(trunk: nn.Module) -> dict[str, float]:
        return metrics_of([embed(trunk, view)[1:] for view in validated])

    trainer = Trainer(
        made,
        fitted,
        validate=validate if validated else None,
        end_of_epoch_hook=tell,
        folder=out,
        autocast=of_autocast,
        device=chosen_device,
        dataloader_num_workers=workers,
    )
    images = {"train": len(fitted), "validation": sum(map(len, validated)), "test": sum(map(len, tested[:1]))}
    config = describe_run(
        made,
        of_autocast,
        seed=seed,
        start=start_of({"settings": made.settings} if old is None else old),
        data={
            "source": source_of(data),
            "root": absolute(root),
            "test_classes": test_classes,
            "split_seed": split_seed,
            "validation_classes": prepared.validation_classes,
            "class_embeddings": absolute(class_embeddings),
            "images": images,
            "fingerprints": fingerprints(kept),
            "contents": fingerprints(kept, sizes=True),
            "sample": sample_of(fitted),
            "left_out": sorted({*before.get("left_out", []), *left_out}),
        },
    )
    if old is not None:
        config["baseline"] = old.get("baseline", {"title": "frozen features", **old.get("frozen", {})})
        check_same(old, config)
        check_images(before.get("fingerprints", prints), prints, "other files or labels")
        if not left_out:
            now = config["data"]["contents"]
            check_images(before.get("contents", now), now, "files of other sizes")
    with RunLock(out):
        if what_is_there(out, resume) != old:
            raise ValueError(f"--out must not be changed by others meanwhile, got {out}")
        if old is not None and (out / "last.pt").exists():  # else it was killed within the first epoch
            trainer.resume(other_data=bool(left_out))
        describe(prepared)
        if trainer.epochs_done == made.epochs:
            print(f"all {number_of(made.epochs, 'epoch')} are done: nothing is trained (more: --epochs)")
        if old is None:
            config["baseline"] = measure_baseline(prepared, weights, embed)
        write_config(out, config if old is None else old | config)
        trainer.train()
        replaced = replaced_files(fitted)
        if replaced:
            counted = f"{len(replaced)} of {len(fitted)} images to train with cannot be read"
            warn(f"{counted}, others took their places: {some_of(replaced)}")
        return conclude(trainer, prepared, out, chosen_device, embed, config["baseline"])


def tell(trainer: Trainer) -> None:
    """Print the loss and the metrics of an epoch."""
    entry = trainer.history[-1]
    names = [name for name in ("precision_at_1", "mean_average_precision_at_r") if name in entry]
    values = ", ".join(f"{METRICS[name]} {100 * entry[name]:.1f}" for name in names)
    line = f"epoch {entry['epoch']}/{trainer.recipe.epochs}: loss {entry['loss']:.3g}"
    tqdm.write(f"{line}, validation {values}" if values else line)


def describe(prepared: Prepared) -> None:
    """Print what is trained on what, and warn where that is little."""
    fitted, validated, tested, _, made = prepared
    s, numbers = made.settings, sum(p.numel() for p in made.trunk.parameters())
    print(f"{made.name}: {s.backbone}, {s.image_size} x {s.image_size} pixels, {numbers / 1e6:.1f} million parameters")
    parts = [("train", [fitted]), ("validate", validated), ("test", tested)]
    counts = [
        f"{number_of(sum(map(len, views)), 'image')} of "
        f"{number_of(max(view.num_classes for view in views), 'class', 'classes')} to {what}"
        for what, views in parts
        if views
    ]
    print(", ".join(counts))
    for what, views in parts[1:]:
        others = len(views[0]) - number_of_queries(views) if views else 0
        if others:
            print(f"no queries: {number_of(others, 'image')} to {what} without another of their class to be found")
    each = max(len(fitted) // made.batch_size(fitted.labels), 1)
    steps = made.epochs * each
    batch = number_of(made.batch_size(fitted.labels), "image")
    print(f"{number_of(steps, 'step')} in {number_of(made.epochs, 'epoch')}, in batches of {batch}")
    if steps < FEW_STEPS:
        warn(f"{number_of(steps, 'step')} may be too few: --epochs {-(-FEW_STEPS // each)} makes {FEW_STEPS}")
    if not tested:
        print("there is no test: all classes are trained on")
    if not validated:
        why = "" if not tested else f": {fitted.num_classes} training classes are too few" * (fitted.num_classes < 4)
        print(f"the last epoch is kept, since there are no validation classes{why}")
    elif validated[0].num_classes <= FEW_CLASSES:
        warn(
            f"with only {validated[0].num_classes} validation classes, the choice of the best epoch is unreliable: "
            "more classes, or a larger --validation-classes, help"
        )
    if find_spec("matplotlib") is None:
        print("curves and gallery are not drawn: pip install 'pml-ext[visualization]'")


def measure_baseline(prepared: Prepared, weights: str | None, embed: Embedder) -> dict[str, Any]:
    """Return, and print, what is found before any training: the level to beat."""
    _, validated, tested, _, made = prepared
    network, title = made.trunk, "untrained network"
    if weights is not None and Path(weights).is_dir():
        title = f"the network of {weights}"
    elif made.settings.pretrained or made.settings.weights is not None:
        network, title = BackboneFeatures(made.trunk), "frozen features"
    found: dict[str, Any] = {"title": title}
    for name, views in (("validation", validated), ("test", tested)):
        if views:
            with torch.random.fork_rng(devices=[]):  # or loading would change the training behind it
                found[name] = metrics_of([embed(network, view, progress=True)[1:] for view in views])
            print(f"before training ({title}), {name} classes: {in_percent(found[name])}")
    return found


def conclude(
    trainer: Trainer, prepared: Prepared, out: Path, device: torch.device, embed: Embedder, baseline: dict[str, Any]
) -> dict[str, Any]:
    """Write pictures and report, print the metrics of the test classes beside the baseline, and return them."""
    made, run = trainer.recipe, load_run(out, device)  # what is tested is what others load
    result: dict[str, Any] = {"epoch": run.epoch}
    draw_curves(out, trainer.history)
    if prepared.tested:
        tested, embedded = embed.tested(run.recipe.trunk, prepared.tested)
        result |= {"split": "test", **metrics_of(embedded, tuple(METRICS))}
        write_text(out / "metrics.jsonl", "".join(strict_json(entry) + "\n" for entry in [*trainer.history, result]))
        draw_gallery(out, tested, embedded)
        source = f"{run.config['data']['source']}: {counted(tested)}, test classes"
        write_run_report(out / "report.html", run, str(out), source, tested, embedded)
        best = trainer.best is not None and trainer.best["epoch"] == run.epoch
        why = "best on validation classes" if best else "the last"
        rows = {baseline["title"]: baseline["test"]} if "test" in baseline else {}
        rows[f"epoch {run.epoch} of {made.epochs} ({why})"] = result
        print(percent_table("test classes, percent", rows))
    if trainer.best is not None and "validation" in baseline:
        before, best = (100 * x[trainer.metric] for x in (baseline["validation"], trainer.best))
        if best < before:
            warn(
                f"on validation classes, training has made retrieval worse: MAP@R {best:.1f}, before {before:.1f}; "
                "more --epochs or a larger --image-size may help"
            )
    report = f", {out / 'report.html'} to open in a browser" if prepared.tested else ""
    print(f"network, metrics and pictures: {out}{report}")
    return result | {"out": str(out), "baseline": baseline}


def what_is_there(out: Path, resume: bool) -> dict[str, Any] | None:
    """Return the configuration of the run to go on with; None for a new one, which finds no other."""
    if resume:
        return read_config(out)
    if any((out / name).exists() for name in ("config.json", "last.pt")):
        raise ValueError(f"{out} holds a run already: give another --out, or --resume to go on with it")
    return None


def fingerprints(data: RetrievalData, sizes: bool = False) -> dict[str, str]:
    """Return what tells whether the images are others; by the sizes of files only where none has broken since."""
    return {name: view.fingerprint(sizes) for name, view in views_of(data).items()}


def first_image(view: ClassSubset, skip_broken: bool) -> Any:
    """Return the first image of a view, or of its class if it cannot be read and that may be skipped."""
    return (replacing_broken(view) if skip_broken else view)[0][0]


def side_of(image: Any) -> int:
    """Return a side for the network's images: the longer one of an image, a multiple of 4 in 8 to 64."""
    longer = max(image.shape[-2:] if isinstance(image, torch.Tensor) else image.size)
    return min(max(4 * round(longer / 4), 8), 64)


def check_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Check that a run goes on with what it began with; versions of packages and the number of epochs may differ."""
    checked = "fingerprints" in old.get("data", {})
    mine: tuple[str, ...] = (
        "settings.epochs",
        "settings.weights",
        "settings.pretrained",
        "start",
        "frozen",
        "baseline",
        "data.fingerprints",
        "data.contents",
        "data.left_out",
        "data.sample",
        "data.images.test",
        "data.root",
    )
    mine += ("reader", "training_images", "resumed", "format")  # the trainer's
    mine += LEFT_OUT if "format" not in old else ()
    mine += ("data.images", "data.source") if checked else ()  # broken ones may be left out, and all may be moved
    before, now = (
        {name: x for name, x in flat(config) if not f"{name}.".startswith((*(f"{x}." for x in mine), "versions."))}
        for config in (old, new)
    )
    name = "data.class_embeddings"
    before[name] = absolute(before.get(name))
    for name in now | before:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume must go on with the {name} of config.json, {before.get(name)}, got {now.get(name)}"
            )


def check_images(old: dict[str, str], new: dict[str, str], got: str) -> None:
    """Check that a run goes on with the images that it began with."""
    for name in new:
        if old.get(name) != new[name]:
            raise ValueError(
                f"DATA must have the images that the run began with, got {got} for {name} (files "
                "that have broken since: leave them there, and add --skip-broken)"
            )


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the names and values of nested dictionaries."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs


def draw_curves(out: Path, history: list[dict[str, Any]]) -> None:
    """Draw the loss and the metrics of all epochs, where matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return
    first = history[0]["loss"] or 1.0
    curves = {"training loss / that of epoch 1": [entry["loss"] / first for entry in history]}
    for name, title in METRICS.items():
        if name in history[0]:
            curves[f"{title}, validation classes"] = [entry[name] for entry in history]
    plot_curves(curves, path=out / "curves.png")


def draw_gallery(out: Path, tested: Sequence[ClassSubset], embedded: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Draw some queries with their neighbors, where matplotlib is installed."""
    embeddings, labels = (torch.cat(parts) for parts in zip(*embedded, strict=True))
    if len(labels) < 2 or find_spec("matplotlib") is None:
        return
    queries, searched = None, None
    if len(embedded) > 1:  # a gallery: queries do not find each other
        count = len(embedded[0][1])
        queries = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:8].tolist()
        searched = range(count, len(labels))
    names = [name for view in tested for name in file_names(view) or ()] or None
    images: Any = Images(*tested)
    retrieval_gallery(embeddings, labels, images, queries, path=out / "gallery.png", searched=searched, names=names)
