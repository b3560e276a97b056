"""PML's trainer, wired for a recipe, that can be stopped and go on."""

import json
import math
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import Tensor, nn

from pml_ext.recipes.device import usable_device
from pml_ext.recipes.run_config import describe_run, read_config, write_config
from pml_ext.recipes.training_recipe import Recipe


class Trainer(MetricLossOnly):
    """Train a recipe's network with PML's ``MetricLossOnly``, loss optimizer included.

    Batches are drawn anew for each epoch, so that a resumed training goes through the same ones.

    Args:
        recipe: What to train; its modules are trained in place.
        dataset: Of images and integer labels 0 to ``num_classes`` - 1. Where its ``transform`` is None, it gets the
            recipe's training transform.
        labels: ``(N,)``, those of the data set. None: its attribute ``labels`` or ``targets``.
        validate: Called with the trunk after each epoch; returns metrics, a dictionary of numbers.
        metric: Which of them is to be largest; its epoch is kept as the best.
        folder: Where to keep ``config.json``, ``last.pt``, ``best.pt`` and ``metrics.jsonl``, for ``load_run`` and
            ``resume``. None: nowhere.
        autocast: dtype of the network's forward, such as ``torch.bfloat16``; parameters and loss stay as they are.
        channels_last: Whether network and images get this memory format, which convolutions on CPUs are faster with.
        device: None: CUDA if there is any, else the CPU.
        dataloader_num_workers: Processes that load images.
        end_of_iteration_hook: As in PML, called with the trainer.
        end_of_epoch_hook: As in PML; training ends where it returns False.
        **kwargs: Passed to PML's ``MetricLossOnly``: ``freeze_these``, ``collate_fn``, ``data_and_label_getter``, ...

    Attributes:
        recipe: What is trained.
        history: A dictionary for each epoch: ``epoch``, ``loss`` (mean), ``seconds``, ``lr``, and the metrics.
        best: The entry of the best epoch, None without ``validate``.
        epochs_done: How many epochs the modules have been trained.

    Raises:
        ValueError: If there are no labels, they do not fit ``num_classes``, or the device is not there.

    Examples:
        >>> from pml_ext.recipes import recipe
        >>> images, labels = torch.rand(12, 1, 28, 28), torch.arange(12) // 4
        >>> made = recipe("proxy_anchor", 3, in_channels=1, image_size=28, batch_size=12, epochs=2, width=4)
        >>> trainer = Trainer(made, torch.utils.data.TensorDataset(images, labels), labels)
        >>> len(trainer.train())
        2
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Any,
        labels: Any = None,
        validate: Callable[[nn.Module], dict[str, float]] | None = None,
        metric: str = "mean_average_precision_at_r",
        folder: str | os.PathLike[str] | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        device: torch.device | str | None = None,
        dataloader_num_workers: int = 0,
        end_of_iteration_hook: Callable[[Any], Any] | None = None,
        end_of_epoch_hook: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe = recipe
        self.validate = validate
        self.metric = metric
        self._labels = _checked_labels(dataset, labels, recipe.num_classes)
        if hasattr(dataset, "transform") and dataset.transform is None:
            dataset.transform = recipe.transforms.train
        self.folder = None if folder is None else Path(folder)
        self.autocast = autocast
        self.channels_last = channels_last
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        device = usable_device(device)
        trunk, loss = recipe.trunk.to(device), recipe.loss.to(device)
        if channels_last:
            trunk = trunk.to(memory_format=torch.channels_last)
        groups = recipe.param_groups
        of_loss = {id(p) for p in loss.parameters()}
        parts = {
            "trunk": [g for g in groups if not any(id(p) in of_loss for p in g["params"])],
            "metric_loss": [g for g in groups if any(id(p) in of_loss for p in g["params"])],
        }
        optimizers = {f"{name}_optimizer": recipe.optimizer(own) for name, own in parts.items() if own}
        schedulers = {
            f"{name.removesuffix('_optimizer')}_scheduler_by_epoch": recipe.scheduler(optimizer)
            for name, optimizer in optimizers.items()
        }
        clip = recipe.settings.clip_value
        clippers = None
        if clip is not None:
            clippers = {
                f"{name}_grad_clipper": partial(nn.utils.clip_grad_value_, list(module.parameters()), clip)
                for name, module in (("trunk", trunk), ("metric_loss", loss))
            }
        super().__init__(
            models={"trunk": trunk},
            optimizers=optimizers,
            batch_size=recipe.batch_size(self._labels),
            loss_funcs={"metric_loss": loss},
            mining_funcs={} if recipe.miner is None else {"tuple_miner": recipe.miner},
            dataset=dataset,
            data_device=device,
            lr_schedulers=schedulers,
            gradient_clippers=clippers,
            dataloader_num_workers=dataloader_num_workers,
            end_of_iteration_hook=self._add_loss,
            end_of_epoch_hook=self._after_epoch,
            **kwargs,
        )
        backbone = getattr(trunk, "backbone", None)
        self._warming = [] if backbone is None else [p for p in backbone.parameters() if p.requires_grad]
        self._users_hooks = end_of_iteration_hook, end_of_epoch_hook
        self._stopped = False

    @property
    def epochs_done(self) -> int:
        """How many epochs the modules have been trained."""
        return len(self.history)

    def train(self, num_epochs: int | None = None) -> list[dict[str, Any]]:
        """Train up to an epoch and return ``history``.

        Args:
            num_epochs: Epochs in all, those of a resumed training included. None: the recipe's.

        Raises:
            ValueError: If they are more than the recipe's and its schedule ends there, or ``validate`` does not return
                ``metric``.
        """
        last = self.recipe.epochs if num_epochs is None else num_epochs
        if last > self.recipe.epochs and self.recipe.settings.schedule == "cosine":
            raise ValueError(f"num_epochs must be <= {self.recipe.epochs}, where the cosine schedule ends, got {last}")
        self._stopped = False
        while self.epochs_done < last and not self._stopped:
            self._loss_sum, self._started = torch.zeros(()), time.perf_counter()
            self._lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
            epoch = self.epochs_done + 1
            try:
                super().train(start_epoch=epoch, num_epochs=epoch)
            finally:
                self._let_backbone_learn(True)  # whoever comes next finds it as it was
        return self.history

    def resume(self, path: str | os.PathLike[str] | None = None) -> int:
        """Load a checkpoint and return how many epochs it has been trained.

        Args:
            path: None: ``last.pt`` in ``folder``.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If neither ``path`` nor ``folder`` is given.
        """
        if path is None:
            if self.folder is None:
                raise ValueError("path must be given for a trainer without folder, got None")
            path = self.folder / "last.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.history, self.best = state["history"], state["best"]
        _set_random_state(state["random"])
        return self.epochs_done

    def initialize_dataloader(self) -> None:
        """Make loader and sampler; PML's sampler remembers how it shuffled, and a resumed run would not."""
        self.sampler = self.recipe.sampler(self._labels)
        super().initialize_dataloader()

    def get_trunk_output(self, data: Tensor) -> Tensor:
        """Return the embeddings; PML calls it."""
        data = data.to(self.data_device, self.dtype)
        if self.channels_last:
            data = data.contiguous(memory_format=torch.channels_last)
        with torch.autocast(data.device.type, self.autocast, enabled=self.autocast is not None):
            embeddings: Tensor = self.models["trunk"](data)
        return embeddings.float() if self.autocast is not None else embeddings

    def modify_schema(self) -> None:
        """Keep PML from asking for an embedder: the trunk has its own last layer."""
        self.schema["models"].important = ["trunk"]

    def set_to_train(self) -> None:
        """Put all in training mode; the backbone stands still while the new layers warm up."""
        super().set_to_train()
        self._let_backbone_learn(self.epoch > self.recipe.settings.warmup_epochs)

    def _let_backbone_learn(self, learns: bool) -> None:
        if "trunk" not in self.freeze_these:
            for parameter in self._warming:
                parameter.requires_grad_(learns)

    def _parts(self) -> dict[str, Any]:
        parts = {"trunk": self.models["trunk"], "loss": self.loss_funcs["metric_loss"]}
        return parts | self.optimizers | self.lr_schedulers

    def _add_loss(self, trainer: Any) -> None:
        loss = self.losses["total_loss"] = self.losses["total_loss"].detach()  # PML prints it next
        self._loss_sum += loss.cpu()
        if self._users_hooks[0] is not None:
            self._users_hooks[0](self)

    def _after_epoch(self, trainer: Any) -> bool:
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "loss": self._loss_sum.item() / self.iterations_per_epoch,
            "seconds": time.perf_counter() - self._started,
            "lr": self._lr,
        }
        metrics = {} if self.validate is None else self.validate(self.models["trunk"]) or {}
        entry |= metrics
        self.history.append(entry)
        better = self.metric in metrics and self._is_better(metrics[self.metric])
        if better:
            self.best = entry
        if self.folder is not None:
            self._save(better)
        if self.validate is not None and self.metric not in metrics:
            names = ", ".join(metrics) or "none"
            raise ValueError(f"metric must be one that validate returns, {names}, got {self.metric!r}")
        self._stopped = self._users_hooks[1] is not None and self._users_hooks[1](self) is False
        return not self._stopped

    def _is_better(self, value: float) -> bool:
        """Return whether a metric is larger than the best; NaN, of classes without pairs, is smaller than any."""
        return self.best is None or math.isnan(self.best[self.metric]) or value > self.best[self.metric]

    def _save(self, better: bool) -> None:
        assert self.folder is not None
        self._save_config(self.folder)
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"history": self.history, "best": self.best, "random": _random_state()}
        for name in (*(["best.pt"] if better else []), "last.pt"):  # in this order, last.pt never names a best it lacks
            torch.save(state, self.folder / f"{name}.new")
            os.replace(self.folder / f"{name}.new", self.folder / name)  # a run killed here leaves the last one whole
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        (self.folder / "metrics.jsonl").write_text(lines)

    def _save_config(self, folder: Path) -> None:
        """Write ``config.json``, unless it is there with all of that, and more perhaps."""
        config = describe_run(self.recipe, self.autocast)
        try:
            there = read_config(folder)
        except (FileNotFoundError, ValueError):
            there = {}
        if any(name not in there or there[name] != config[name] for name in config if name != "versions"):
            write_config(folder, config)


def _checked_labels(dataset: Any, labels: Any, num_classes: int) -> Tensor:
    if labels is None:
        labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    if labels is None:
        raise ValueError("labels must be given for a dataset without the attribute labels or targets, got None")
    labels = torch.as_tensor(labels)
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        got = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise ValueError(f"labels must lie in 0 to num_classes - 1 = {num_classes - 1}, got {got}")
    return labels


def _random_state() -> dict[str, Any]:
    """Return the state of the generators that samplers, transforms and networks draw from."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (PML's sampler draws from it)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    state["numpy"]["state"]["key"] = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
