"""Why does a method help, or not? What attention, learners, messages and margins do in the networks of retrieval.py.

python -m benchmarks.retrieval_causes --data omniglot.npz --class-embeddings array:strokes --settings image_size=28 \
    --budget epochs:30 --seeds 0 1 2 --jobs 2      trains again, measures, writes a JSON file, prints the table
python -m benchmarks.retrieval_causes --data glyphs --tuned-on omniglot --budget epochs:1 --rows mhgl ...
python -m benchmarks.retrieval_causes --show      the tables alone
"""

import argparse
import json
import multiprocessing
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

from benchmarks.retrieval import ROWS, print_table, quiet, row_of, trained, tuned_settings, value_of, write
from pml_ext.learners import learner_similarity
from pml_ext.recipes import embed, retrieval_metrics
from pml_ext.trunks import SecondOrderAttention

MAP = "mean_average_precision_at_r"


def attention(made, data):
    """What second-order attention adds to a map, how widely it looks, and what retrieval loses without it."""
    found, blocks = {}, [m for m in made.trunk.modules() if isinstance(m, SecondOrderAttention)]
    images = torch.stack([data.test[i][0] for i in range(min(256, len(data.test)))])
    for number, block in enumerate(blocks):
        level = ("local", "global")[number] if len(blocks) == 2 else "global"
        seen = []
        hook = block.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        with torch.inference_mode():
            made.trunk.eval()(images)
            hook.remove()
            features, output = seen[0]
            weights = block.attention_map(features)
        entropy = torch.special.entr(weights).sum(2).mean() / np.log(weights.shape[2])
        added = output - features
        found[f"{level}: added, of the map's norm, percent"] = 100 * (added.norm() / features.norm())
        found[f"{level}: cosine of what is added to two images"] = mean_cosine(added.mean((2, 3)))
        found[f"{level}: entropy of the attention, percent of the largest"] = 100 * entropy
    with torch.inference_mode():
        found["cosine between two images"] = mean_cosine(made.trunk.eval()(images))
    found["MAP@R"] = map_at_r(made, data)
    if not blocks:
        return found
    for block in blocks:
        for parameter in (*block.out.parameters(), *block.norm.parameters()):
            nn.init.zeros_(parameter)
    found["MAP@R after the attention is taken away"] = map_at_r(made, data)
    return found


def mean_cosine(vectors):
    """Return the mean over all pairs of different rows."""
    unit = nn.functional.normalize(vectors)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (len(unit) * (len(unit) - 1))


def learners(made, data):
    """How alike learners are, and what one of them finds."""
    embeddings, labels = embed(made.trunk, data.test)
    number = made.settings.num_learners
    slices = embeddings.unflatten(1, (number, -1))
    alone = [float(retrieval_metrics(slices[:, i], labels, metrics=(MAP,))[MAP]) for i in range(number)]
    return {
        "cosine between two learners": learner_similarity(embeddings, number),
        "MAP@R of one learner": 100 * np.mean(alone),
        "MAP@R of all": map_at_r(made, data),
    }


def messages(made, data):
    """To whom samples of a training batch listen, and whether that changes what the refined classifier says."""
    loss_func, (embeddings, labels) = made.loss.eval(), training_batch(made, data)
    same = labels[:, None] == labels
    mates = same & ~torch.eye(len(labels), dtype=torch.bool)
    unit = nn.functional.normalize(embeddings)
    weights = loss_func.refiner.attention_weights(unit)[-1].mean(0)
    nobody = torch.empty(2, 0, dtype=torch.long)
    with torch.inference_mode():
        refined = {"with messages": loss_func.refiner(unit), "without": loss_func.refiner(unit, nobody)}
        norm, head = loss_func.norm, loss_func.refined_loss
        right = {name: (head.get_logits(norm(x)).argmax(1) == labels) for name, x in refined.items()}
        raw = loss_func.get_logits(embeddings).argmax(1) == labels
    own, others = gradient_shares(loss_func, embeddings, labels)
    return {
        "attention to the sample's class, percent": 100 * (weights * mates).sum(1).mean() / weights.sum(1).mean(),
        "that share of the batch, percent": 100 * mates.float().mean(),
        "left to the null message, percent": 100 * (1 - weights.sum(1).mean()),
        "raw classifier right on a training batch, percent": 100 * raw.float().mean(),
        "refined classifier right, percent": 100 * right["with messages"].float().mean(),
        "refined classifier right, messages cut, percent": 100 * right["without"].float().mean(),
        "gradient of a refined loss that goes to other samples, percent": 100 * others / (own + others),
    }


def gradient_shares(loss_func, embeddings, labels, samples=16):
    """Return the mean norms of gradients of one sample's refined loss: to its own embedding, and to all others."""
    embeddings = embeddings.clone().requires_grad_()
    norm, head = loss_func.norm, loss_func.refined_loss
    logits = head.get_logits(norm(loss_func.refine(embeddings)))
    own, others = [], []
    for i in range(min(samples, len(labels))):
        loss = nn.functional.cross_entropy(logits[i : i + 1], labels[i : i + 1])
        (grad,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
        own.append(grad[i].norm())
        grad[i] = 0
        others.append(grad.norm())
    return torch.stack(own).mean(), torch.stack(others).mean()


@torch.no_grad()
def margins(made, data):
    """Whether classes that are far apart in the second modality are so in the images too."""
    loss_func, modality = made.loss.eval(), nn.functional.normalize(data.class_embeddings.double())
    pairs = np.triu_indices(data.num_classes, 1)
    embeddings, labels = embed(made.trunk, plain(data.train, data))
    means = torch.stack([embeddings[labels == c].double().mean(0) for c in range(data.num_classes)])
    theirs, ours = (x @ x.T for x in (modality, nn.functional.normalize(means)))
    right = loss_func.get_logits(embeddings).argmax(1) == labels
    table = loss_func.get_margins(torch.arange(data.num_classes)).double()[pairs]
    return {
        "rank correlation of class similarities, modality and images": stats.spearmanr(theirs[pairs], ours[pairs])[0],
        "classifier right on training images, percent": 100 * right.float().mean(),
        "margins, mean": table.mean(),
        "margins, standard deviation": table.std(),
        "MAP@R": map_at_r(made, data),
    }


def plain(dataset, data):
    """Return a data set with the transform of the test."""
    dataset.transform = data.test.transform
    return dataset


def training_batch(made, data):
    """Return embeddings and labels of the first training batch, as they are at the end of training."""
    sampler = iter(made.sampler(data.train.labels))
    chosen = [next(sampler) for _ in range(made.settings.batch_size)]
    images, labels = zip(*(plain(data.train, data)[i] for i in chosen), strict=True)
    with torch.no_grad():
        embeddings = made.trunk.eval()(torch.stack(images))
    return embeddings, torch.as_tensor(labels)


def map_at_r(made, data):
    embeddings, labels = embed(made.trunk, data.test)
    return 100 * float(retrieval_metrics(embeddings, labels, metrics=(MAP,))[MAP])


MEASURES = {"mhgl": attention, "attention_ensemble": learners, "intra_batch": messages, "adaptive_margin": margins}
MEASURED = (
    "mhgl",
    "4 heads",
    "4 learners",
    "4 learners, divergence",
    "refiner",
    "refiner, starts with similarity",
    "no margin",
    "margin from distance",
)


def check(rows):
    """Stop where a row cannot be looked into, before anything is trained."""
    for row in rows:
        recipe, settings = row_of(row).recipe, row_of(row).settings
        if recipe not in MEASURES:
            raise SystemExit(f"--rows must be of the recipes {', '.join(MEASURES)}, got {row!r}")
        if recipe == "intra_batch" and settings.get("refined_weight") == 0:
            raise SystemExit(f"--rows must have a refiner to look into, got {row!r}")
        if "epochs" in settings:
            raise SystemExit(f"--rows must not set epochs, which --budget does, got {row!r}")


def beside(path, about):
    """Return what a file has of other rows; one of other runs stops everything."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    for name in ("seeds", "settings"):
        if found[name] != about[name]:
            raise SystemExit(f"{path} has {name} = {found[name]}, got {about[name]}: choose another --out")
    return found["rows"]


def measure(job):
    """Train once and measure."""
    made, data, _, _ = trained(job)
    found = MEASURES[row_of(job["row"]).recipe](made, data)
    found = {name: round(float(value), 4) for name, value in found.items()}
    return job["row"], job["seed"], found


def show(out):
    """Print a table for each data set."""
    for path in sorted(Path(out).glob("*.json")):
        found = json.loads(path.read_text())
        number = len(found["seeds"])
        print(f"\n{found['data']}: mean (standard deviation) over {number} seeds, epochs: {found['epochs']}\n")
        lines = []
        for row, seeds in found["rows"].items():
            for name in seeds[0]:
                values = [seed[name] for seed in seeds]
                digits = 1 if "percent" in name or "MAP" in name else 2
                spread = np.std(values, ddof=min(1, len(values) - 1))
                lines.append([row, name, f"{np.mean(values):.{digits}f} ({spread:.{digits}f})"])
        print_table(["row", "measured", "value"], lines)


def main(data, rows, seeds, budget, jobs, results, out, tuned_on, class_embeddings, settings, show_only):
    """Train, measure, write and print."""
    if not show_only:
        if data is None:
            raise SystemExit("--data must be given, got none")
        given = {key: value_of(value) for key, _, value in (pair.partition("=") for pair in settings)}
        epochs, name = int(budget.removeprefix("epochs:")), Path(data).stem
        shared = {"data": data, "class_embeddings": class_embeddings, "epochs": epochs, "validation": False}
        check(rows)
        chosen = {row: tuned_settings(Path(results), tuned_on or name, row) if row in ROWS else {} for row in rows}
        todo = [shared | {"row": row, "seed": seed, "settings": given | chosen[row]} for seed in seeds for row in rows]
        versions = {package: version(package) for package in ("torch", "pytorch-metric-learning", "pml-ext")}
        about = {"data": name, "seeds": list(seeds), "epochs": epochs, "settings": given, "versions": versions}
        path = Path(out) / f"{name}-{epochs}.json"
        others = beside(path, about)
        found = {row: [None] * len(seeds) for row in rows}
        with (
            multiprocessing.get_context("spawn").Pool(jobs, initializer=quiet, maxtasksperchild=1) as pool,
            tqdm(total=len(todo), unit="run") as bar,
        ):
            for row, seed, measured in pool.imap_unordered(measure, todo, chunksize=1):
                found[row][list(seeds).index(seed)] = measured
                bar.update()
        write(path, about | {"rows": others | found})
    show(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as for retrieval.py, which must have been tuned on it")
    parser.add_argument("--rows", nargs="+", default=MEASURED, help="of mhgl and the three other papers' recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="epochs:30")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--results", default="benchmarks/results/retrieval", help="of retrieval.py: what was tuned")
    parser.add_argument("--out", default="benchmarks/results/retrieval_causes")
    parser.add_argument("--tuned-on", help="as for retrieval.py")
    parser.add_argument("--class-embeddings", help='a file, "names" or "array:NAME"')
    parser.add_argument("--settings", nargs="+", default=(), help="of all rows: image_size=28 ...")
    parser.add_argument("--show", action="store_true", dest="show_only", help="train nothing")
    main(**vars(parser.parse_args()))
