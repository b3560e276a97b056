"""What attention, learners, messages, margins and the two losses of a hybrid do in a trained network."""

import numpy as np
import torch
from scipy import stats
from torch import nn

from pml_ext.learners import learner_similarity
from pml_ext.losses import HybridLoss
from pml_ext.recipes import embed, retrieval_metrics
from pml_ext.trunks import SecondOrderAttention

MAP = "mean_average_precision_at_r"
MOST = 2048  # images of the training classes that margins are measured with


def attention(made, data, autocast=None):
    """What second-order attention adds to a map, how widely it looks, and what retrieval loses without it."""
    measured, blocks = {}, [m for m in made.trunk.modules() if isinstance(m, SecondOrderAttention)]
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
        measured[f"{level}: added, of the map's norm, percent"] = 100 * (added.norm() / features.norm())
        measured[f"{level}: cosine of what is added to two images"] = mean_cosine(added.mean((2, 3)))
        measured[f"{level}: entropy of the attention, percent of the largest"] = 100 * entropy
    with torch.inference_mode():
        measured["cosine between two images"] = mean_cosine(made.trunk.eval()(images))
    measured["MAP@R"] = map_at_r(made, data, autocast)
    if not blocks:
        return measured
    for block in blocks:
        for parameter in (*block.out.parameters(), *block.norm.parameters()):
            nn.init.zeros_(parameter)
    measured["MAP@R after the attention is taken away"] = map_at_r(made, data, autocast)
    return measured


def mean_cosine(vectors):
    """Return the mean over all pairs of different rows."""
    unit = nn.functional.normalize(vectors)
    return (unit.sum(0).square().sum() - unit.square().sum()) / (len(unit) * (len(unit) - 1))


def learners(made, data, autocast=None):
    """How alike learners are, and what one of them finds."""
    embeddings, labels = embed(made.trunk, data.test, autocast=autocast)
    number = made.settings.num_learners
    slices = embeddings.unflatten(1, (number, -1))
    *alone, together = [
        100 * float(retrieval_metrics(x, labels, metrics=(MAP,))[MAP]) for x in (*slices.unbind(1), embeddings)
    ]
    return {
        "cosine between two learners": learner_similarity(embeddings, number),
        "MAP@R of one learner": np.mean(alone),
        "MAP@R of all": together,
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
def margins(made, data, autocast=None):
    """Whether classes that are far apart in the second modality are so in the images too."""
    loss_func, modality = made.loss.eval(), nn.functional.normalize(data.class_embeddings.double())
    pairs = np.triu_indices(data.num_classes, 1)
    classes, each = torch.as_tensor(data.train.labels), max(MOST // data.num_classes, 1)
    few = [i for c in range(data.num_classes) for i in (classes == c).nonzero().flatten()[:each].tolist()]
    shown = torch.utils.data.Subset(plain(data.train, data), few)
    embeddings, labels = embed(made.trunk, shown, autocast=autocast)
    means = torch.stack([embeddings[labels == c].double().mean(0) for c in range(data.num_classes)])
    theirs, ours = (x @ x.T for x in (modality, nn.functional.normalize(means)))
    right = loss_func.get_logits(embeddings).argmax(1) == labels
    table = loss_func.get_margins(torch.arange(data.num_classes)).double()[pairs]
    return {
        "rank correlation of class similarities, modality and images": stats.spearmanr(theirs[pairs], ours[pairs])[0],
        "classifier right on training images, percent": 100 * right.float().mean(),
        "margins, mean": table.mean(),
        "margins, standard deviation": table.std(),
        "MAP@R": map_at_r(made, data, autocast),
    }


def pairs_and_proxies(made, data):
    """How long the gradients of the two losses of a hybrid are, and whether they point the same way."""
    embeddings, labels = training_batch(made, data)
    embeddings.requires_grad_()
    loss_func, gradients = made.loss.eval(), []
    weights = (loss_func.pair_weight, loss_func.proxy_weight)
    for weight, term in zip(weights, (loss_func.pair_loss, loss_func.proxy_loss), strict=True):
        gradients += torch.autograd.grad(weight * term(embeddings, labels), embeddings)
    pair, proxy = gradients
    return {
        "gradient of the pair loss / of the proxy loss": pair.norm() / proxy.norm(),
        "cosine between the two": nn.functional.cosine_similarity(pair.flatten(), proxy.flatten(), dim=0),
    }


def spread(embeddings):
    """How many dimensions of the embedding are in use (participation ratio), and how alike images are."""
    unit = nn.functional.normalize(embeddings.float())
    variances = torch.linalg.eigvalsh(torch.cov(unit.T)).clamp_min(0)
    return {
        "numbers of the embedding in use": variances.sum().square() / variances.square().sum(),
        "cosine between two images": mean_cosine(unit),
    }


def measured(made, data, embeddings, autocast=None):
    """Return what there is to measure in a recipe's network; ``embeddings``: of the test images.

    Attention is taken away at the end.
    """
    found = spread(embeddings)
    if isinstance(made.loss, HybridLoss):
        found |= pairs_and_proxies(made, data)
    if getattr(made.trunk, "num_learners", 1) > 1:
        found |= learners(made, data, autocast)
    if made.name == "intra_batch" and made.loss.refiner is not None:
        found |= messages(made, data)
    if made.name == "adaptive_margin" and data.class_embeddings is not None:
        found |= margins(made, data, autocast)
    if made.name == "mhgl":
        found |= attention(made, data, autocast)
    return found


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


def map_at_r(made, data, autocast):
    embeddings, labels = embed(made.trunk, data.test, autocast=autocast)
    return 100 * float(retrieval_metrics(embeddings, labels, metrics=(MAP,))[MAP])
