"""Some classes of a labeled data set."""

import copy
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pml_ext.datasets.content import fingerprint_of
from pml_ext.datasets.labels import as_labels, label_values


class ClassSubset(torch.utils.data.Dataset[tuple[Any, int]]):
    """View of some classes of a labeled data set, with labels 0, 1, ... and its own transform.

    The view holds a shallow copy of the data set (attributes copied, data shared) whose ``transform`` and
    ``target_transform`` are None, takes images from there and applies its own transform. Views of one data set, and
    the data set, therefore do not see each other's transforms, whenever these are set.

    Args:
        dataset: Data set of (image, label) pairs with integer ``labels`` or ``targets``, one for each sample: any of
            this package, of PML, or of torchvision; another view, too.
        classes: Labels to keep. They become 0, 1, ... in this order; the samples keep the order of ``dataset``.

    Attributes:
        labels: ``(N,)``, int64 tensor, 0 to C - 1.
        classes: The C labels in ``dataset``.
        class_names: Names of the C classes; None if ``dataset`` has neither ``class_names`` nor ``classes`` that fit:
            one string for each label value, or one for each label that occurs, in sorted order.
        transform: Applied to the image. Starts as that of ``dataset``; may be set at any time.
        indices: ``(N,)``, positions of the samples in ``dataset``.
        num_classes: C.

    Raises:
        TypeError: If ``dataset`` has no integer labels, or ``classes`` are not integers.
        ValueError: If ``classes`` are empty, repeat one, or ``dataset`` has no sample of one.

    Examples:
        >>> from pml_ext.datasets import ImageArrays
        >>> view = ClassSubset(ImageArrays(torch.zeros(4, 8, 8, dtype=torch.uint8), [5, 7, 9, 5]), [9, 5])
        >>> view.labels, view.indices
        (tensor([1, 0, 1]), tensor([0, 2, 3]))
    """

    def __init__(self, dataset: Any, classes: Iterable[int]) -> None:
        labels = labels_of(dataset)
        chosen = classes.tolist() if isinstance(classes, Tensor) else list(classes)
        for label in chosen:
            if not isinstance(label, Integral) or isinstance(label, bool):
                raise TypeError(f"classes must be integers, got {label!r}")
        self.classes = [int(label) for label in chosen]
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be different and at least one, got {self.classes}")
        present = label_values(labels)
        missing = sorted(set(self.classes) - set(present))
        if missing:
            raise ValueError(f"classes must be labels of dataset, got {missing[0]}, which has no sample")
        new = {label: i for i, label in enumerate(self.classes)}
        relabeled = torch.tensor([new.get(label, -1) for label in labels.tolist()])
        self.indices = (relabeled >= 0).nonzero().flatten()
        self.labels = relabeled[self.indices]
        names = _class_names(dataset, present)
        self.class_names = None if names is None else [names[label] for label in self.classes]
        self.transform: Callable[[Any], Any] | None = getattr(dataset, "transform", None)
        self.dataset = copy.copy(dataset)
        for name in ("transform", "target_transform"):
            if getattr(dataset, name, None) is not None:
                setattr(self.dataset, name, None)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, label): the image as the data set gives it unless the transform changes it, and an int."""
        image = self.dataset[int(self.indices[index])][0]
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def fingerprint(self, sizes: bool = True) -> str:
        """Return 64 hexadecimal digits that change with the samples, their order and their labels.

        The SHA-256 of each sample's label and content: for files, the path below the folder that all files of the data
        set share, and the size, so that they may move together and need not be read; for arrays, the values. Of data
        sets that keep neither ``paths``, ``samples``, ``images`` nor ``data``, only index and label count.

        Args:
            sizes: Whether sizes of files count.
        """
        return fingerprint_of(self, self.labels, sizes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {len(self)} images of {self.num_classes} classes"


def labels_of(dataset: Any) -> Tensor:
    """Return ``labels`` or ``targets`` of a data set, ``(N,)``, int64.

    Raises:
        TypeError: If it has neither, or they are not integers.
        ValueError: If their number is not that of the samples.
    """
    for name in ("labels", "targets"):
        labels = getattr(dataset, name, None)
        if labels is not None:
            return as_labels(f"dataset.{name}", labels, len(dataset))
    raise TypeError(f"dataset must have labels or targets, got a {type(dataset).__name__} with neither")


def _class_names(dataset: Any, labels: list[int]) -> dict[int, str] | None:
    """Return the name of each label that occurs (``labels``, sorted), or None."""
    for attribute in ("class_names", "classes"):
        names = getattr(dataset, attribute, None)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            continue
        if labels[0] >= 0 and labels[-1] < len(names):
            return {label: names[label] for label in labels}
        if len(names) == len(labels):  # as in Glyphs("test"), whose labels do not begin at 0
            return dict(zip(labels, names, strict=True))
    return None
