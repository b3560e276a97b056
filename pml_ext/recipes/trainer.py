"""PML's trainer, set up for a recipe, that can be stopped and resumed."""

import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import Tensor, nn

from pml_ext.datasets.content import fingerprint_of, reader_of
from pml_ext.datasets.labels import as_labels
from pml_ext.gradient_cache import cached_backward
from pml_ext.recipes.checkpoint import read_checkpoint, try_checkpoint, write_checkpoint, write_text
from pml_ext.recipes.device import usable_device, warn_of_slow_autocast
from pml_ext.recipes.evaluation import pair_of
from pml_ext.recipes.networks import matched_state, network_state
from pml_ext.recipes.run_config import describe_run, differences, read_config, write_config
from pml_ext.recipes.run_lock import RunLock
from pml_ext.recipes.training_recipe import Recipe
from pml_ext.strict_json import strict_json
from pml_ext.trunks.wrappers import backbone_of, unwrapped
from pml_ext.validation import check_count

_OF_HISTORY = ("epoch", "loss", "seconds", "lr")


class Trainer(MetricLossOnly):
    """Train a recipe's network with PML's ``MetricLossOnly``, loss optimizer included.

    The network may be compiled or wrapped (``made.trunk = torch.compile(made.trunk)``): the network inside is kept.

    Args:
        recipe: What to train; its modules are trained in place.
        dataset: A data set of images and integer labels 0 to ``num_classes`` - 1. If its ``transform`` is None, it gets
            the recipe's training transform.
        labels: ``(N,)``, integers, those of the data set. None: its attribute ``labels`` or ``targets``.
        validate: Called with the trunk after each epoch, which is then on disk; returns metrics, a dictionary of
            numbers. Their names must not be those that ``history`` already has.
        metric: Name of the metric whose largest value makes the best epoch.
        folder: Where to keep ``config.json``, ``last.pt``, ``best.pt`` and ``metrics.jsonl``, for ``load_run`` and
            ``resume``. One training at a time: ``lock.json`` names its process. Files of an earlier run
            that is not resumed are moved to ``replaced-1``. None: nothing is kept.
        autocast: dtype of the network's forward, ``torch.bfloat16``, or ``torch.float16``, with which gradients are
            scaled (``torch.amp.GradScaler``); parameters and loss stay as they are.
        channels_last: Whether network and images get this memory format, which convolutions on CPUs are faster with.
        device: None: CUDA if there is any, else the CPU.
        dataloader_num_workers: Processes that load images.
        end_of_iteration_hook: Called with the trainer after each batch, as in PML.
        end_of_epoch_hook: Called with the trainer after each epoch, as in PML. Training ends if it returns False.
        **kwargs: Passed to PML's ``MetricLossOnly``: ``freeze_these``, ``collate_fn``, ``data_and_label_getter``,
            ``sampler`` in place of the recipe's, ...

    Attributes:
        recipe: What is trained.
        history: A dictionary for each epoch: ``epoch``, ``loss`` (mean), ``seconds``, ``lr``, and the metrics.
        best: The entry of the best epoch, None without ``validate``.
        epochs_done: Number of epochs that the modules have been trained.

    Raises:
        TypeError: If labels are not integers.
        ValueError: If there are no labels, they do not fit the data set or ``num_classes``, the device is not there,
            ``autocast`` is another dtype, or new layers are to warm up and the network has no ``backbone``.

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
        channels_last: bool | None = None,
        device: torch.device | str | None = None,
        dataloader_num_workers: int = 0,
        end_of_iteration_hook: Callable[[Any], Any] | None = None,
        end_of_epoch_hook: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if "batch_size" in kwargs:
            raise TypeError(f"batch_size must be a setting of the recipe, got {kwargs['batch_size']} for the trainer")
        self.recipe = recipe
        self.validate = validate
        self.metric = metric
        self._labels = _checked_labels(dataset, labels, recipe.num_classes)
        kwargs.setdefault("data_and_label_getter", _images_and_labels)
        if hasattr(dataset, "transform") and dataset.transform is None:
            dataset.transform = recipe.transforms.train
        self.folder = None if folder is None else Path(folder)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
        self.autocast = autocast
        self.channels_last = channels_last = recipe.settings.channels_last if channels_last is None else channels_last
        self.history: list[dict[str, Any]] = []
        self.sampler: Any
        self.best: dict[str, Any] | None = None
        device = usable_device(device)
        warn_of_slow_autocast(device, autocast)
        trunk, loss = recipe.trunk.to(device), recipe.loss.to(device)
        if channels_last:
            trunk = trunk.to(memory_format=torch.channels_last)
        self._scaler = torch.amp.GradScaler(device.type) if autocast == torch.float16 else None
        optimizers, schedulers = self._make_optimizers()
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
        self._backbone = backbone_of(trunk)
        if self._backbone is None and recipe.settings.warmup_epochs:
            raise ValueError(
                "warmup_epochs must be 0 for a network whose new layers are not known, "
                f"got {recipe.settings.warmup_epochs} for a {type(unwrapped(trunk)).__name__} without backbone"
            )
        self._warming: list[nn.Parameter] = []
        self._users_hooks = end_of_iteration_hook, end_of_epoch_hook
        self._users_sampler = kwargs.get("sampler")
        self._sampler_state: dict[str, Any] | None = None  # to go on with
        self._iterations = self.iterations_per_epoch
        self._stopped = False
        self._unvalidated = False  # whether the metrics of the last epoch are missing
        self._fingerprint = _fingerprint(dataset, self._labels)
        self._reader = reader_of(dataset)
        self._resumed: list[dict[str, Any]] | None = None  # what config.json says of it
        self._own_files: tuple[int, ...] | None = None  # last.pt as this training knows it
        self._can_be_saved = False

    @property
    def epochs_done(self) -> int:
        """How many epochs the modules have been trained."""
        return len(self.history)

    def train(self, num_epochs: int | None = None) -> list[dict[str, Any]]:
        """Train up to a given epoch and return ``history``.

        Args:
            num_epochs: Total number of epochs, including those of a resumed training. None: the recipe's.

        Raises:
            OSError: If a file cannot be written.
            TypeError: If a metric is not a number, or something is trained that cannot be saved.
            ValueError: If ``num_epochs`` is not an integer >= 1, or more than the recipe's and its schedule ends there,
                another training runs in ``folder``, or ``validate`` does not return ``metric``.
        """
        if num_epochs is not None:
            check_count("num_epochs", num_epochs)
        last = self.recipe.epochs if num_epochs is None else num_epochs
        if last > self.recipe.epochs and self.recipe.settings.schedule == "cosine":
            raise ValueError(f"num_epochs must be <= {self.recipe.epochs}, where the cosine schedule ends, got {last}")
        backbone = [] if self._backbone is None or "trunk" in self.freeze_these else self._backbone.parameters()
        if self.epochs_done < last <= self.recipe.settings.warmup_epochs and any(p.requires_grad for p in backbone):
            warnings.warn(
                f"only the new layers are trained in {last} of {self.recipe.epochs} epochs: the backbone begins to "
                f"learn after warmup_epochs = {self.recipe.settings.warmup_epochs}",
                UserWarning,
                stacklevel=2,
            )
        self._stopped = False
        with nullcontext() if self.folder is None else RunLock(self.folder):
            self._train(last)
        return self.history

    def _train(self, last: int) -> None:
        if self.folder is not None and (self._unvalidated or self.epochs_done < last):
            self._prepare(self.folder)
        if self._unvalidated:
            self.epoch = self.epochs_done
            self._finish_epoch()
        while self.epochs_done < last and not self._stopped:
            backbone = [] if self._backbone is None else self._backbone.parameters()
            self._warming = [p for p in backbone if p.requires_grad]
            self._loss_sum, self._started = torch.zeros(()), time.perf_counter()
            self._lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
            epoch = self.epochs_done + 1
            try:
                super().train(start_epoch=epoch, num_epochs=epoch)
            finally:
                self._let_backbone_learn(True)  # whoever comes next finds it as it was

    def resume(self, path: str | os.PathLike[str] | None = None, other_data: bool = False) -> int:
        """Load a checkpoint and return how many epochs it has been trained.

        The recipe must be that of the checkpoint, but may have more epochs. From the next epoch on, the learning rates
        are then those of a training that was planned with them. With a cosine schedule, the first epochs had other
        rates, and a warning says so.

        Args:
            path: None: ``last.pt`` in ``folder``.
            other_data: Whether the data set may be another, such as one without the files that have broken since.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If neither ``path`` nor ``folder`` is given, the file is damaged, or it is of a training with
                other settings, another network or, without ``other_data``, other images. Nothing is changed then.
        """
        if path is None:
            if self.folder is None:
                raise ValueError("path must be given for a trainer without folder, got None")
            path = self.folder / "last.pt"
        path = Path(path)
        state = read_checkpoint(path)
        done = len(state["history"])
        try:
            recorded = state["config"] if "config" in state else read_config(path.parent)
        except (FileNotFoundError, ValueError):  # of a checkpoint of former versions that was moved
            recorded = None
        settings = self._settings_to_go_on_with(path, state, recorded)
        trained_on = None if recorded is None else recorded.get("training_images")
        if not other_data and trained_on not in (None, self._fingerprint):
            raise ValueError(
                f"dataset must have the images and labels that {path} was trained with, or other_data=True be given, "
                f"got others (fingerprint {self._fingerprint}, not {trained_on})"
            )
        weights = self._checked_weights(path, state)
        planned, new = (None if recorded is None else int(recorded["settings"]["epochs"])), self.recipe.epochs
        if new < done:
            raise ValueError(f"epochs must be >= {done}, which {path} has been trained, got {new}")

        self.recipe.settings = settings
        for name, part in self._parts().items():
            part.load_state_dict(weights.get(name, state.get(name)))
        if planned not in (None, new):
            self._plan_anew(done)
            if settings.schedule == "cosine":
                warnings.warn(
                    f"epochs 1 to {done} had the learning rates of a cosine schedule of {planned} epochs; those from "
                    f"epoch {done + 1} on are of one of {new}",
                    stacklevel=2,
                )
        self.history, self.best = state["history"], state["best"]
        self._unvalidated = self.validate is not None and not state.get("validated", True)
        if self._scaler is not None:
            if "scaler" in state:
                self._scaler.load_state_dict(state["scaler"])
            else:
                warnings.warn(f"{path} was trained without scaled gradients; from here on they are", stacklevel=2)
        self._sampler_state = state.get("sampler") if trained_on == self._fingerprint else None
        self._resumed = [] if recorded is None else list(recorded.get("resumed", []))
        if planned not in (None, new):
            self._resumed.append({"epoch": done, "epochs": [planned, new]})
        if self.folder is not None and path.resolve().parent == self.folder.resolve():
            self._own_files = _signature(self.folder / "last.pt")
        _set_random_state(state["random"])
        return self.epochs_done

    def _settings_to_go_on_with(self, path: Path, state: dict[str, Any], recorded: dict[str, Any] | None) -> Any:
        """Return the recipe's settings, with the sampler that former versions had; refuse those of another training."""
        settings = self.recipe.settings
        former = "config" not in state
        if former and not settings.notes["sampler"].endswith(": given"):
            settings = settings.replaced("sampler", "MPerClassSampler", "as in the version that began the training")
        now = self._config()
        now["settings"]["sampler"] = settings.sampler
        if recorded is not None:
            others = differences(recorded, now)
        else:
            others = [
                f"{name} of {part}: {before}, got {here}"
                for part in self.optimizers
                for name, before, here in _other_numbers(state.get(part), self.optimizers[part])
            ]
        if others:
            raise ValueError(f"the recipe must be that of {path} to resume: {'; '.join(others)}")
        return settings

    def _checked_weights(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Return the weights under the names that network and loss have here; check that all else is there."""
        missing = [name for name in (*self._parts(), "best", "random") if name not in state]
        if missing:
            raise ValueError(f"{path} must have {missing[0]!r} to resume from, got none")
        rule = f"{path} must hold the network of this recipe"
        modules = {"trunk": self.models["trunk"], "loss": self.loss_funcs["metric_loss"]}
        weights = {name: matched_state(module, state[name], rule) for name, module in modules.items()}
        for name, optimizer in self.optimizers.items():
            sizes = [
                [len(g["params"]) for g in groups] for groups in (state[name]["param_groups"], optimizer.param_groups)
            ]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"{path} must have the parameters of {name}, {sizes[1]} in its groups, got {sizes[0]}: other "
                    "layers are frozen now than then"
                )
        return weights

    def _make_optimizers(self) -> tuple[dict[str, Any], dict[str, Any]]:
        recipe = self.recipe
        of_loss = {id(p) for p in recipe.loss.parameters()}
        parts: dict[str, list[dict[str, Any]]] = {"trunk": [], "metric_loss": []}
        for group in recipe.param_groups:
            name = "metric_loss" if any(id(p) in of_loss for p in group["params"]) else "trunk"
            parts[name].append(group)
        optimizers = {f"{name}_optimizer": recipe.optimizer(groups) for name, groups in parts.items() if groups}
        schedulers = {
            f"{name.removesuffix('_optimizer')}_scheduler_by_epoch": recipe.scheduler(optimizer)
            for name, optimizer in optimizers.items()
        }
        return optimizers, schedulers

    def _plan_anew(self, done: int) -> None:
        """Give optimizers and schedulers the learning rates of a training that had these settings from the start."""
        optimizers, schedulers = self._make_optimizers()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*before.*optimizer.step")
            for scheduler in schedulers.values():
                for _ in range(done):
                    scheduler.step()
        for name, scheduler in schedulers.items():
            self.lr_schedulers[name].load_state_dict(scheduler.state_dict())
        for name, optimizer in optimizers.items():
            for group, planned in zip(self.optimizers[name].param_groups, optimizer.param_groups, strict=True):
                group["lr"] = planned["lr"]

    def initialize_dataloader(self) -> None:
        """Make the loader of an epoch; PML's sampler anew, which remembers how it shuffled and cannot be saved."""
        if self._users_sampler is None and not hasattr(self.sampler, "state_dict"):
            length = None
            if self._iterations and self.recipe.settings.sampler == "ShuffledPassSampler":
                length = self._iterations * self.batch_size
            with torch.random.fork_rng(
                devices=[], enabled=self._sampler_state is not None
            ):  # its seed is not used then
                self.sampler = self.recipe.sampler(self._labels, length)
        if self._sampler_state is not None and hasattr(self.sampler, "load_state_dict"):
            self.sampler.load_state_dict(self._sampler_state)
        self._sampler_state = None
        super().initialize_dataloader()

    def backward(self) -> None:
        """Compute the gradients, scaled for float16, unless ``calculate_loss`` has."""
        if self.recipe.settings.chunk_size is not None:
            return
        loss = self.losses["total_loss"]
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def clip_gradients(self) -> None:
        """Clip the gradients, which are no longer scaled then."""
        if self._scaler is not None:
            for optimizer in self._stepping():
                self._scaler.unscale_(optimizer)
        super().clip_gradients()

    def step_optimizers(self) -> None:
        """Step; with float16, optimizers whose gradients overflowed skip it."""
        if self._scaler is None:
            super().step_optimizers()
            return
        for optimizer in self._stepping():
            self._scaler.step(optimizer)
        self._scaler.update()

    def _stepping(self) -> list[torch.optim.Optimizer]:
        return [
            optimizer
            for name, optimizer in self.optimizers.items()
            if name.removesuffix("_optimizer") not in self.freeze_these
            and any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        ]

    def calculate_loss(self, curr_batch: tuple[Tensor, Tensor]) -> None:
        """Compute the loss of a batch; with the setting ``chunk_size`` the gradients too."""
        chunk_size = self.recipe.settings.chunk_size
        if chunk_size is None:
            super().calculate_loss(curr_batch)
            return
        data, labels = curr_batch
        data = data.to(dtype=self.dtype)
        if self.channels_last:
            data = data.contiguous(memory_format=torch.channels_last)

        def weighted_loss(embeddings: Tensor, labels: Tensor) -> Any:
            loss = self.maybe_get_metric_loss(embeddings, labels, self.maybe_mine_embeddings(embeddings, labels))
            self.losses["metric_loss"] = loss.detach()
            return self.loss_weights["metric_loss"] * loss

        trunk = self.models["trunk"]
        cached_backward(trunk, weighted_loss, data, labels, chunk_size, autocast=self.autocast, scaler=self._scaler)

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
        parts = {"trunk": unwrapped(self.models["trunk"]), "loss": unwrapped(self.loss_funcs["metric_loss"])}
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
        self.history.append(entry)
        self._unvalidated = self.validate is not None
        if self._unvalidated and self.folder is not None:
            self._save(better=False)  # validate may fail
        return self._finish_epoch()

    def _finish_epoch(self) -> bool:
        entry = self.history[-1]
        returned = None if self.validate is None else self.validate(self.models["trunk"])
        metrics = _metrics(returned)
        entry |= metrics
        self._unvalidated = False
        better = self.metric in metrics and self._is_better(metrics[self.metric])
        if better:
            self.best = entry
        if math.isnan(metrics.get(self.metric, 0)):
            warnings.warn(
                f"{self.metric} of epoch {entry['epoch']} is NaN: it counts as lower than any other value", stacklevel=2
            )
        if self.folder is not None:
            self._save(better)
        if self.validate is not None and self.metric not in metrics:
            names = ", ".join(metrics) or "none"
            raise ValueError(f"metric must be one that validate returns, {names}, got {self.metric!r}")
        self._stopped = self._users_hooks[1] is not None and self._users_hooks[1](self) is False
        return not self._stopped

    def _is_better(self, value: float) -> bool:
        """Return whether a metric is larger than the best; NaN, of classes without pairs, is smaller than any."""
        best = math.nan if self.best is None else self.best.get(self.metric, math.nan)  # chosen by another metric
        return math.isnan(best) or value > best

    def _state(self) -> dict[str, Any]:
        parts = self._parts()
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {name: network_state(parts[name]) for name in ("trunk", "loss")}
        state |= {"history": self.history, "best": self.best, "random": _random_state()}
        state |= {"validated": not self._unvalidated, "config": self._config()}
        if hasattr(self.sampler, "state_dict"):
            state["sampler"] = self.sampler.state_dict()
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return state

    def _prepare(self, folder: Path) -> None:
        """Make sure, before there is anything to lose, that the folder is this training's and that it can be kept."""
        if self._own_files != _signature(folder / "last.pt") or (self._own_files is None and not self.history):
            _set_aside(folder)
        self._save_config(folder)
        if not self._can_be_saved:
            try_checkpoint(folder, self._state())
            self._can_be_saved = True

    def _save(self, better: bool) -> None:
        assert self.folder is not None
        RunLock(self.folder).confirm()
        self._save_config(self.folder)
        state = self._state()
        if better:
            write_checkpoint(self.folder / "best.pt", state)  # first: last.pt never names a best that is not there
        write_checkpoint(self.folder / "last.pt", state)
        self._own_files = _signature(self.folder / "last.pt")
        if not self._unvalidated:
            text = "".join(strict_json(entry) + "\n" for entry in self.history)
            write_text(self.folder / "metrics.jsonl", text)

    def _config(self) -> dict[str, Any]:
        more: dict[str, Any] = {"training_images": self._fingerprint}
        if self._reader is not None:
            more["reader"] = asdict(self._reader)
        if self._users_sampler is not None:
            more["sampler"] = type(self._users_sampler).__name__
        if self._resumed:
            more["resumed"] = self._resumed
        return describe_run(self.recipe, self.autocast, **more)

    def _save_config(self, folder: Path) -> None:
        """Write ``config.json``, unless it is there with all of that, and more perhaps."""
        config = self._config()
        try:
            there = read_config(folder)
        except (FileNotFoundError, ValueError):
            there = {}
        if any(name not in there or there[name] != config[name] for name in config if name != "versions"):
            core = ("recipe", "num_classes", "preset", "settings", "autocast")
            same = self._resumed is not None or all(there.get(name) == config[name] for name in core)
            write_config(folder, there | config if same else config)


def _checked_labels(dataset: Any, labels: Any, num_classes: int) -> Tensor:
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must have a length, so that batches can be drawn, got a {type(dataset).__name__}")
    own = getattr(dataset, "labels", getattr(dataset, "targets", None))
    chosen = own if labels is None else labels
    if chosen is None:
        raise ValueError("labels must be given for a dataset without the attribute labels or targets, got None")
    labels = as_labels("labels", chosen, len(dataset))
    if chosen is not own and getattr(dataset, "target_transform", None) is None:
        _warn_of_other_labels(labels, own)
    if not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        got = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise ValueError(f"labels must lie in 0 to num_classes - 1 = {num_classes - 1}, got {got}")
    return labels


def _warn_of_other_labels(labels: Tensor, own: Any) -> None:
    """Warn where labels make other classes than those of the data set, as they do in another order."""
    try:
        pairs = set(zip(labels.tolist(), as_labels("labels", own, len(labels)).tolist(), strict=True))
    except (TypeError, ValueError):  # the data set has none that could be compared
        return
    if not len(pairs) == len({first for first, _ in pairs}) == len({second for _, second in pairs}):
        warnings.warn(
            "labels make other classes than those of the dataset: batches are drawn by labels, but the loss gets what "
            "the dataset returns; are they in the same order?",
            UserWarning,
            stacklevel=4,
        )


def _images_and_labels(batch: Any) -> tuple[Any, Any]:
    try:
        return pair_of(batch)
    except ValueError as error:
        raise ValueError(f"{error}: data_and_label_getter takes them out of a batch") from None


def _fingerprint(dataset: Any, labels: Tensor) -> str:
    own = getattr(dataset, "fingerprint", None)
    return str(own()) if callable(own) else fingerprint_of(dataset, labels)


def _metrics(returned: Any) -> dict[str, float]:
    """Return metrics as numbers of Python, by names of Python, which all files know."""
    if not isinstance(returned, dict | None):
        raise TypeError(f"validate must return a dictionary of numbers, got {returned!r}")
    metrics: dict[str, float] = {}
    for name, value in (returned or {}).items():
        if name in _OF_HISTORY:
            raise ValueError(f"validate must not return {name!r}, which history has of each epoch, got {value!r}")
        if isinstance(value, np.generic | np.ndarray | Tensor) and np.prod(value.shape) == 1:
            value = value.item()
        if not isinstance(name, str) or not isinstance(value, int | float):
            raise TypeError(f"validate must return numbers by name, got {name!r}: {value!r}")
        metrics[str(name)] = value if type(value) in (int, float) else float(value)
    return metrics


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return what changes where a file is written anew; None if it is not there."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _set_aside(folder: Path) -> None:
    """Move the files of a former run out of the way."""
    files = [folder / name for name in ("best.pt", "last.pt", "metrics.jsonl") if (folder / name).is_file()]
    if not files:
        return
    number = 1
    while (folder / f"replaced-{number}").exists():
        number += 1
    target = folder / f"replaced-{number}"
    target.mkdir()
    if (folder / "config.json").is_file():
        if (folder / "last.pt") in files:  # what it says of data and seed is of that run
            files.append(folder / "config.json")
        else:
            shutil.copy2(folder / "config.json", target)
    for file in files:
        os.replace(file, target / file.name)
    warnings.warn(f"{folder} held another run, which was moved to {target}", stacklevel=4)


def _other_numbers(state: Any, optimizer: torch.optim.Optimizer) -> list[tuple[str, Any, Any]]:
    """Return names and values of what an optimizer had other than it has, but for what a schedule changes."""
    groups = [] if state is None else state["param_groups"]
    others = {
        name: (before.get(name, "none"), now.get(name, "none"))
        for before, now in zip(groups, optimizer.param_groups, strict=False)
        for name in ("momentum", "betas", "initial_lr", "weight_decay")
        if before.get(name, "none") != now.get(name, "none")
    }
    return [(name, *values) for name, values in others.items()]


def _random_state() -> dict[str, Any]:
    """Return the state of the generators that samplers, transforms and networks draw from."""
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (PML's sampler draws from it)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):  # there may be fewer now
            torch.cuda.set_rng_state(of_device, device)
    state["numpy"]["state"]["key"] = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
