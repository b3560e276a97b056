"""What an ensemble costs; run: python benchmarks/ensemble.py.

Forward and backward of AttentionEnsemble, which folds the learners into the batch, beside a loop over the learners and
beside the backbone alone; the parameters beside those of M networks; EnsembleLoss beside one loss of the same total
width. The candidates take turns. ``--out FILE`` keeps the figures.
"""

from functools import partial

import torch
from harness import make_parser, markdown_table, median_and_quartiles, median_ratio, metadata, save, time_in_turn
from tqdm import tqdm

from pml_ext.losses import EnsembleLoss, HybridLoss, MultiSimilarityLoss
from pml_ext.trunks import AttentionEnsemble

EMBEDDING_SIZE, NUM_CLASSES = 512, 100
LEARNERS = (2, 4, 8)


def in_a_loop(trunk, images):
    """Return the embeddings, one learner after the other: the same in eval mode."""
    features = trunk.stem(images)
    masks = trunk._masks(features)
    slices = [trunk.linear(trunk.head(features * masks[:, m])) for m in range(trunk.num_learners)]
    return torch.cat([torch.nn.functional.normalize(own) for own in slices], 1)


def backbone_alone(trunk, images):
    """Return one learner's embedding, without a mask."""
    return trunk.linear(trunk.head(trunk.stem(images)))


WAYS = {"folded": lambda trunk, images: trunk(images), "loop": in_a_loop, "backbone alone": backbone_alone}


def step(module, forward):
    """Run forward and backward."""
    module.zero_grad()
    forward().sum().backward()


def time_trunks(backbone, image_size, batch_size, repeats, device, learners):
    """Return a row for each number of learners and way to compute them."""
    rows = []
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    for m in tqdm(learners, desc="trunks"):
        trunk = AttentionEnsemble.from_backbone(
            backbone, num_learners=m, embedding_size=EMBEDDING_SIZE, input_size=(3, image_size, image_size)
        ).to(device)

        candidates = {name: partial(step, trunk, partial(way, trunk, images)) for name, way in WAYS.items()}
        seconds = time_in_turn(candidates, repeats, device)
        rows += [row(m, name, values, seconds["loop"]) for name, values in seconds.items()]
    return rows


def time_losses(batch_size, repeats, device, learners):
    """Return a row for each loss and number of learners; 1 is the loss itself on the whole width."""
    makers = {
        "MultiSimilarityLoss": lambda size: MultiSimilarityLoss(),
        "HybridLoss": lambda size: HybridLoss(NUM_CLASSES, size),
    }
    emb = torch.randn(batch_size, EMBEDDING_SIZE, device=device, requires_grad=True)
    labels = torch.arange(batch_size, device=device) // 4 % NUM_CLASSES
    rows = []
    for name, make in makers.items():
        loss_funcs = {1: make(EMBEDDING_SIZE)}
        for m in learners:
            loss_funcs[m] = EnsembleLoss([make(EMBEDDING_SIZE // m) for _ in range(m)], m)
        candidates = {m: partial(step, f.to(device), partial(f, emb, labels)) for m, f in loss_funcs.items()}
        seconds = time_in_turn(candidates, repeats, device)
        rows += [row(m, name, values, seconds[1]) for m, values in seconds.items()]
    return rows


def row(learners, name, seconds, beside):
    """Return medians and quartiles in ms, and the ratio to another candidate, call by call."""
    median, quartiles = median_and_quartiles(seconds, 2, 1e3)
    ratio = round(median_ratio(seconds, beside), 3)
    return {"learners": learners, "name": name, "ms": median, "quartiles": quartiles, "ratio": ratio}


def count_parameters(backbone, num_learners):
    """Return the parameters, in millions, of the ensemble and of what it stands for."""

    def millions(*modules):
        return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 2)

    counts = {}
    for name, share in (("shared attention trunk", True), ("an attention trunk each", False)):
        trunk = AttentionEnsemble.from_backbone(
            backbone, num_learners=num_learners, embedding_size=EMBEDDING_SIZE, share_attention_trunk=share
        )
        counts[name] = millions(trunk)
    counts["one stem, a head each"] = round(millions(trunk.stem) + num_learners * millions(trunk.head, trunk.linear), 2)
    counts["separate networks"] = round(num_learners * millions(trunk.stem, trunk.head, trunk.linear), 2)
    return counts


def main(
    backbone="resnet18",
    image_size=64,
    batch_size=32,
    loss_batch_size=128,
    repeats=20,
    learners=LEARNERS,
    counted=("googlenet", "resnet50"),
    threads=2,
    device="cpu",
    out=None,
):
    """Return the metadata and all rows; print them as tables."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    trunks = time_trunks(backbone, image_size, batch_size, repeats, device, learners)
    losses = time_losses(loss_batch_size, 3 * repeats, device, learners)
    parameters = {name: count_parameters(name, max(learners)) for name in counted}
    titles = [f"{backbone}, {batch_size} images of {image_size} x {image_size}", "", "ms", "quartiles", "/ loop"]
    lines = [[f"M = {row['learners']}", row["name"], *cells(row)] for row in trunks]
    print(markdown_table(titles, lines, numbers=3))
    titles = [f"loss, batch {loss_batch_size} x {EMBEDDING_SIZE}", "", "ms", "quartiles", "/ plain"]
    ways = ["plain" if row["learners"] == 1 else f"EnsembleLoss, M = {row['learners']}" for row in losses]
    lines = [[row["name"], way, *cells(row)] for row, way in zip(losses, ways, strict=True)]
    print("\n" + markdown_table(titles, lines, numbers=3))
    lines = [
        [name, *(f"{counts[name]:.1f}" for counts in parameters.values())]
        for name in next(iter(parameters.values()), {})
    ]
    titles = [f"parameters in millions, M = {max(learners)}", *parameters]
    print("\n" + markdown_table(titles, lines, numbers=len(parameters)))
    sizes = {"backbone": backbone, "image_size": image_size, "batch_size": batch_size, "repeats": repeats}
    sizes |= {"loss_batch_size": loss_batch_size, "embedding_size": EMBEDDING_SIZE, "dtype": "float32"}
    about = metadata(device, threads, **sizes)
    return save(out, {"metadata": about, "trunks": trunks, "losses": losses, "parameters": parameters})


def cells(row):
    return [f"{row['ms']:.1f}", "{:.1f} to {:.1f}".format(*row["quartiles"]), f"{row['ratio']:.2f}"]


if __name__ == "__main__":
    parser = make_parser(__doc__, "--device", "--out")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    main(**vars(parser.parse_args()))
