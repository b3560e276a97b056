"""A paper's training in one line."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn

from pml_ext.modes import in_mode
from pml_ext.recipes.adaptive_margin import ADAPTIVE_MARGIN
from pml_ext.recipes.attention_ensemble import ATTENTION_ENSEMBLE
from pml_ext.recipes.baselines import BASELINES
from pml_ext.recipes.combined import COMBINED
from pml_ext.recipes.intra_batch import INTRA_BATCH
from pml_ext.recipes.mhgl import MHGL
from pml_ext.recipes.parts import Method
from pml_ext.recipes.settings import Settings, settle
from pml_ext.recipes.trainer import Trainer
from pml_ext.recipes.transforms import Transforms, make_transforms
from pml_ext.trunks import freeze_batch_norm, param_groups
from pml_ext.types import Indices
from pml_ext.validation import check_count

RECIPES: dict[str, Method] = {
    "mhgl": MHGL,
    "intra_batch": INTRA_BATCH,
    "attention_ensemble": ATTENTION_ENSEMBLE,
    "adaptive_margin": ADAPTIVE_MARGIN,
    "combined": COMBINED,
    **BASELINES,
}
"""The recipes by name, with their settings."""
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "RAdam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
}


class Recipe:
    """All that a training takes: made by ``recipe``.

    Attributes:
        name: Of the recipe.
        num_classes: Training classes.
        trunk: The network, images to embeddings.
        loss: The loss, with its proxies or classifiers, if it has any.
        miner: A miner, or None.
        settings: All settings, as attributes.
        transforms: ``train`` and ``test``: PIL images or uint8 tensors to what the trunk takes.
        epochs: How many the preset trains.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        settings: Settings,
        trunk: nn.Module,
        loss: BaseMetricLossFunction,
        miner: Callable[..., Indices] | None,
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.settings = settings
        self.trunk = trunk
        self.loss = loss
        self.miner = miner
        self.transforms: Transforms = make_transforms(settings)

    @property
    def epochs(self) -> int:
        """How many epochs the preset trains."""
        return int(self.settings.epochs)

    @property
    def notes(self) -> dict[str, str]:
        """Where each number comes from: "value: paper", "value: our choice", ..., or "value: given"."""
        return self.settings.notes

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters of backbone, new layers and loss, each with its learning rate; without decay for biases."""
        s = self.settings
        groups = param_groups(self.trunk, self.loss, s.lr, s.head_lr, s.proxy_lr, s.weight_decay)
        return _with_rate(groups, self.loss, s.refiner_lr) if "refiner_lr" in s else groups

    def optimizer(self, groups: list[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
        """Return one optimizer over ``param_groups``, the loss's parameters included, or over some of them."""
        return _OPTIMIZERS[self.settings.optimizer](self.param_groups if groups is None else groups)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return what changes the learning rates; to be stepped once an epoch."""
        s = self.settings
        if s.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.epochs)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(s.milestones), s.gamma)

    def batch_size(self, labels: Any) -> int:
        """Return the size of a batch: that of the preset, less if there are too few classes."""
        m = self.settings.samples_per_class
        return min(self.settings.batch_size // m, len(np.unique(np.asarray(labels)))) * m

    def sampler(self, labels: Any) -> MPerClassSampler:
        """Return PML's ``MPerClassSampler``, with ``samples_per_class`` images of each class of a batch.

        Args:
            labels: ``(N,)``, integers, of the data set.
        """
        size = self.batch_size(labels)
        length = max(len(labels), size)
        return MPerClassSampler(labels, self.settings.samples_per_class, size, length_before_new_iter=length)

    def trainer(self, dataset: Any, labels: Any = None, **kwargs: Any) -> Trainer:
        """Return PML's ``MetricLossOnly`` trainer, wired with all of this.

        Args:
            dataset: Of images and integer labels 0 to ``num_classes`` - 1. Where its ``transform`` is None, it gets the
                recipe's training transform.
            labels: ``(N,)``, those of the data set. None: its attribute ``labels`` or ``targets``.
            **kwargs: Passed to ``Trainer``.

        Raises:
            ValueError: If there are no labels, or they do not fit ``num_classes``.
        """
        if labels is None:
            labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
        if labels is None:
            raise ValueError("labels must be given for a dataset without the attribute labels or targets, got None")
        labels = torch.as_tensor(labels)
        if not len(labels) or labels.min() < 0 or labels.max() >= self.num_classes:
            got = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
            raise ValueError(f"labels must lie in 0 to num_classes - 1 = {self.num_classes - 1}, got {got}")
        if hasattr(dataset, "transform") and dataset.transform is None:
            dataset.transform = self.transforms.train
        return Trainer(self, dataset, labels, **kwargs)


def recipe(
    name: str,
    num_classes: int,
    embedding_size: int | None = None,
    backbone: str | None = None,
    preset: str = "small",
    class_embeddings: Tensor | None = None,
    **settings: Any,
) -> Recipe:
    """Return network, loss, miner and all else of a training.

    Args:
        name: "mhgl", "intra_batch", "attention_ensemble", "adaptive_margin", "combined"; or a baseline: "contrastive",
            "triplet", "multi_similarity", "proxy_anchor", "cosface", "normalized_softmax", "cross_entropy".
        num_classes: Training classes, >= 2.
        embedding_size: None: as the preset has it.
        backbone: "convnet", a small network of ours; "googlenet" (attention_ensemble); or a timm model.
            None: as the preset has it.
        preset: "paper:cub", "paper:cars", "paper:sop" or "paper:inshop": the paper's settings for that data set, where
            they are known. "small": for images of 28 to 64 pixels, trained from scratch on a CPU.
        class_embeddings: ``(num_classes, E)``, of a second modality; used by "adaptive_margin", and by "combined" with
            ``proxy_loss="adaptive_margin"``; others ignore it.
        **settings: Take the place of the preset's: any name in the recipe's ``notes``. None: the preset's.

    Raises:
        ValueError: If a name, preset or setting is unknown or breaks a rule.

    Examples:
        >>> made = recipe("mhgl", num_classes=10, in_channels=1, image_size=28)
        >>> made.trunk(torch.randn(2, 1, 28, 28)).shape, made.notes["proxy_weight"]
        (torch.Size([2, 64]), '0.03: paper')
        >>> recipe("proxy_anchor", num_classes=10, lr=0.01).optimizer().param_groups[0]["lr"]
        0.01
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    check_count("num_classes", num_classes)
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    if class_embeddings is not None:
        shape = np.shape(class_embeddings)
        if len(shape) != 2 or shape[0] != num_classes:
            raise ValueError(f"class_embeddings must have shape ({num_classes}, E), got {tuple(shape)}")
    numbers, build = RECIPES[name]
    found = settle(preset, numbers, {"embedding_size": embedding_size, "backbone": backbone} | settings)
    _check(found)
    try:
        parts = build(found, num_classes, class_embeddings)
        _dry_run(parts.trunk, found)
    except (AssertionError, RuntimeError) as error:  # of networks that images of this size do not fit
        raise ValueError(
            f"backbone must take images of image_size = {found.image_size}, {found.backbone!r} does not: {error}"
        ) from error
    if found.freeze_batch_norm:
        freeze_batch_norm(getattr(parts.trunk, "backbone", parts.trunk))
    return Recipe(name, num_classes, found, parts.trunk, parts.loss, parts.miner)


def _with_rate(groups: list[dict[str, Any]], loss: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Take the parameters of an IntraBatchLoss's refiner out of their groups, into some of their own."""
    parts = [getattr(loss, name, None) for name in ("refiner", "norm", "refined_loss")]
    own = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    found = []
    for group in groups:
        for name, rate, inside in ((group["name"], group["lr"], False), (f"refiner: {group['name']}", lr, True)):
            params = [p for p in group["params"] if (id(p) in own) == inside]
            if params:
                found.append(group | {"name": name, "lr": rate, "params": params})
    return found


@torch.no_grad()
def _dry_run(trunk: nn.Module, s: Settings) -> None:
    with in_mode(trunk):
        trunk(torch.zeros(2, s.in_channels, s.image_size, s.image_size))


def _check(s: Settings) -> None:
    for name in ("embedding_size", "in_channels", "image_size", "batch_size", "samples_per_class", "epochs"):
        check_count(name, s[name])
    for name in ("width", "depth"):
        check_count(name, s[name])
    for name in ("lr", "head_lr", "proxy_lr", "clip_value", "refiner_lr"):
        value = s.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
    if s.flip is not None and not isinstance(s.flip, bool):
        raise ValueError(f"flip must be True, False or None, got {s.flip!r}")
    if not isinstance(s.milestones, list | tuple) or not all(isinstance(x, Integral) for x in s.milestones):
        raise ValueError(f"milestones must be a list of epochs, got {s.milestones!r}")
    if s.batch_size % s.samples_per_class or s.batch_size < 2 * s.samples_per_class:
        rule = f"a multiple of samples_per_class = {s.samples_per_class}, at least twice it"
        raise ValueError(f"batch_size must be {rule}, got {s.batch_size}")
    for name, known in (("optimizer", tuple(_OPTIMIZERS)), ("schedule", ("cosine", "step"))):
        if s[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {s[name]!r}")
