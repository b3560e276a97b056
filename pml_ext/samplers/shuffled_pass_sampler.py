"""Batches of M images a class that leave out no class and no image."""

import copy
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.validation import check_count


class ShuffledPassSampler(torch.utils.data.Sampler[int]):
    """Draw M images of each class of a batch; classes, and the images of each class, in shuffled passes.

    All classes are drawn once before one is drawn again, in a new order; so are the images of a class. At any time no
    class, and no image of a class, has therefore been drawn more than once more than another. Passes continue from
    epoch to epoch. PML's ``MPerClassSampler`` draws each batch anew and leaves out many classes in an epoch of many
    classes.

    Within a batch no class occurs twice, and no image of a class that has M images; the images of smaller classes are
    repeated.

    Args:
        labels: ``(N,)``, integers, of the data set.
        m: M, images of each class of a batch, >= 1.
        batch_size: A multiple of M, at most M times the number of classes.
        length: Number of images in an epoch, rounded down to whole batches. None: N, or one batch if that is more.
        seed: Seed of the order. None: drawn from PyTorch's generator.

    Raises:
        TypeError: If ``seed`` is not an integer.
        ValueError: If an argument breaks a rule.

    Examples:
        >>> labels = torch.tensor([7, 7, 7, 5, 5, 9, 9, 9])
        >>> sampler = ShuffledPassSampler(labels, m=2, batch_size=4, length=12, seed=0)
        >>> labels[list(sampler)].view(3, 4).tolist()
        [[9, 9, 5, 5], [7, 7, 5, 5], [9, 9, 7, 7]]
    """

    def __init__(
        self, labels: Any, m: int, batch_size: int, length: int | None = None, seed: int | None = None
    ) -> None:
        for name, value in (("m", m), ("batch_size", batch_size)):
            check_count(name, value)
        labels = np.asarray(labels)
        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"labels must have shape (N,) with N >= 1, got {labels.shape}")
        own = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
        num_classes = int(own.max()) + 1
        if batch_size % m or batch_size > m * num_classes:
            rule = f"a multiple of m = {m} and at most {m} times the number of classes, {num_classes}"
            raise ValueError(f"batch_size must be {rule}, got {batch_size}")
        length = max(len(labels), batch_size) if length is None else length
        check_count("length", length)
        if length < batch_size:
            raise ValueError(f"length must be >= batch_size = {batch_size}, got {length}")
        self.m, self.batch_size, self.length = int(m), int(batch_size), int(length) // int(batch_size) * int(batch_size)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise TypeError(f"seed must be an integer or None, got {seed!r}")
        seed = int(torch.randint(2**62, ()) if seed is None else seed)
        self._queues = _Queues(own, torch.Generator().manual_seed(seed))
        self._start = self._queues.state()  # when the epoch began
        self._handed_out = 0  # since then
        self._skip = 0

    def __len__(self) -> int:
        """Return how many images an epoch has."""
        return self.length

    def __iter__(self) -> Iterator[int]:
        """Begin an epoch; after ``load_state_dict``, go on in the middle of one."""
        skip, self._skip = self._skip, 0
        if not skip:
            self._start = self._queues.state()
        self._handed_out = 0
        for _ in range(self.length // self.batch_size):
            for index in self._queues.batch(self.batch_size // self.m, self.m):
                self._handed_out += 1
                if self._handed_out > skip:
                    yield index

    def state_dict(self, used: int | None = None) -> dict[str, Any]:
        """Return the state from which ``load_state_dict`` continues: tensors and numbers.

        Args:
            used: How many images of the running epoch have been used. None: all that were handed out. With worker
                processes a ``DataLoader`` draws ahead: say how many.

        Raises:
            ValueError: If more have been used than were handed out.
        """
        used = self._handed_out if used is None else used
        if not 0 <= used <= self._handed_out:
            raise ValueError(f"used must be 0 to {self._handed_out}, the images handed out, got {used}")
        numbers = {"m": self.m, "batch_size": self.batch_size}
        if used == self.length:
            return {"used": 0} | numbers | self._queues.state()
        return {"used": used} | numbers | copy.deepcopy(self._start)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another sampler, of the same labels and numbers, stopped.

        Raises:
            ValueError: If it had other labels or numbers, or was farther than an epoch is long here.
        """
        for name in ("m", "batch_size"):
            if state.get(name, getattr(self, name)) != getattr(self, name):
                raise ValueError(f"state must be of a sampler with {name}={getattr(self, name)}, got {state[name]}")
        if state["used"] >= self.length:
            raise ValueError(f"state must be of an epoch of up to {self.length} images, got {state['used']} used")
        self._start = copy.deepcopy({name: state[name] for name in self._start})
        self._queues.load(copy.deepcopy(self._start))
        self._skip = self._handed_out = state["used"]


class _Queues:
    """The order of the classes, and of the images of each, with the places that have been reached."""

    def __init__(self, own: Tensor, generator: torch.Generator) -> None:
        self.own = own
        self.generator = generator
        self.ends = own.bincount().cumsum(0)
        self.classes = self._shuffled(torch.arange(len(self.ends)))
        self.images = own.argsort(stable=True)  # those of class 0, of class 1, ...
        for part in self._parts():
            part[:] = self._shuffled(part)
        self.place, self.places = 0, [0] * len(self.ends)

    def state(self) -> dict[str, Any]:
        return {
            "classes": self.classes.clone(),
            "images": self.images.clone(),
            "place": self.place,
            "places": torch.tensor(self.places),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        same_size = state["images"].shape == self.own.shape
        if not same_size or not torch.equal(self.own[state["images"]], self.own[self.images]):
            raise ValueError("state must be of a sampler with the same labels, got another")
        self.generator.set_state(state["generator"])
        self.classes, self.images = state["classes"], state["images"]
        self.place, self.places = state["place"], state["places"].tolist()

    def batch(self, num_classes: int, m: int) -> list[int]:
        chosen, self.place = self._draw(self.classes, self.place, num_classes)
        parts, indices = self._parts(), []
        for c in chosen.tolist():
            drawn, self.places[c] = self._draw(parts[c], self.places[c], m)
            indices += drawn.tolist()
        return indices

    def _parts(self) -> Sequence[Tensor]:
        """Return views of the images of each class."""
        return self.images.tensor_split(self.ends[:-1])

    def _draw(self, order: Tensor, place: int, count: int) -> tuple[Tensor, int]:
        """Return the next entries, and the place behind them; at the end of a pass, shuffle ``order`` in place."""
        drawn = order[place : place + count].clone()
        place += len(drawn)
        while len(drawn) < count:  # into the next pass: what has just been drawn comes late in it
            order[:] = self._shuffled(order)
            late = torch.isin(order, drawn)
            order[:] = torch.cat([order[~late], order[late]])
            place = min(count - len(drawn), len(order))
            drawn = torch.cat([drawn, order[:place]])
        return drawn, place

    def _shuffled(self, order: Tensor) -> Tensor:
        return order[torch.randperm(len(order), generator=self.generator)]
