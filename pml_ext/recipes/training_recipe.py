"""All that a training needs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn

from pml_ext.recipes.settings import Settings
from pml_ext.recipes.transforms import Transforms, make_transforms
from pml_ext.samplers.shuffled_pass_sampler import ShuffledPassSampler
from pml_ext.trunks.parameter_groups import param_groups
from pml_ext.trunks.wrappers import unwrapped
from pml_ext.types import Indices

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "RAdam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
}


class Recipe:
    """All that a training needs. ``recipe`` makes it.

    Attributes:
        name: Name of the recipe.
        num_classes: Training classes.
        trunk: The network, images to embeddings.
        loss: The loss, with its proxies or classifiers, if it has any.
        miner: A miner, or None.
        settings: All settings, as attributes.
        transforms: ``train`` and ``test``: PIL images or uint8 tensors to what the trunk takes.
        epochs: Number of epochs that the preset trains.
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
        return OPTIMIZERS[self.settings.optimizer](self.param_groups if groups is None else groups)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the learning rate scheduler; step it once in each epoch."""
        s = self.settings
        if s.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.epochs)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(s.milestones), s.gamma)

    def batch_size(self, labels: Any) -> int:
        """Return the size of a batch: that of the preset, less if there are too few classes."""
        m = self.settings.samples_per_class
        return min(self.settings.batch_size // m, len(np.unique(np.asarray(labels)))) * m

    def sampler(self, labels: Any, length: int | None = None) -> torch.utils.data.Sampler[int]:
        """Return the sampler that is set, with ``samples_per_class`` images of each class of a batch.

        ``sampler="ShuffledPassSampler"`` is ours; "MPerClassSampler" is PML's, which draws each batch anew.

        Args:
            labels: ``(N,)``, integers, of the data set.
            length: Number of images in an epoch. None: N, or one batch if that is more.
        """
        size = self.batch_size(labels)
        length = max(len(labels), size) if length is None else length
        m = self.settings.samples_per_class
        if self.settings.sampler == "MPerClassSampler":
            sampler: torch.utils.data.Sampler[int] = MPerClassSampler(labels, m, size, length_before_new_iter=length)
            return sampler
        return ShuffledPassSampler(labels, m, size, length)


def _with_rate(groups: list[dict[str, Any]], loss: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Take the parameters of an IntraBatchLoss's refiner out of their groups, into some of their own."""
    parts = [getattr(unwrapped(loss), name, None) for name in ("refiner", "norm", "refined_loss")]
    own = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    parted = []
    for group in groups:
        for name, rate, inside in ((group["name"], group["lr"], False), (f"refiner: {group['name']}", lr, True)):
            params = [p for p in group["params"] if (id(p) in own) == inside]
            if params:
                parted.append(group | {"name": name, "lr": rate, "params": params})
    return parted
