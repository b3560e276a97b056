"""Training and test classes of a retrieval task."""

from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor

from pml_ext.datasets.class_subset import ClassSubset


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """Data for zero-shot retrieval: no class is both in training and test.

    Args:
        train: Training images, labels 0 to ``num_classes - 1``.
        test: Test images: the queries. Their labels begin at 0 again and have nothing to do with those of ``train``.
            None: all classes are training classes.
        gallery: Where queries are looked up, with the labels of ``test``. None: every test image is a query against
            all other test images.
        class_embeddings: ``(num_classes, E)``, float32, a description of each class of ``train``, or None.
        in_channels: 1 (gray) or 3 (RGB).
        name: Name of the data set.

    Raises:
        ValueError: If ``class_embeddings`` do not have a row for each training class, or ``in_channels`` is neither 1
            nor 3.

    Examples:
        >>> from pml_ext.datasets import open_data
        >>> data = open_data("glyphs").hold_out(0.1, seed=1)
        >>> data.num_classes, data.test.num_classes
        (240, 27)
    """

    train: ClassSubset
    test: ClassSubset | None
    gallery: ClassSubset | None = None
    class_embeddings: Tensor | None = None
    in_channels: int = 3
    name: str = ""

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, got {self.in_channels}")
        rows = self.class_embeddings
        if rows is not None and (rows.ndim != 2 or len(rows) != self.num_classes):
            raise ValueError(f"class_embeddings must have shape ({self.num_classes}, E), got {tuple(rows.shape)}")

    @property
    def num_classes(self) -> int:
        """Number of training classes."""
        return self.train.num_classes

    def hold_out(self, val_classes: float, seed: int = 0) -> "RetrievalData":
        """Cut validation classes from the training classes: to choose settings without looking at the test classes.

        Args:
            val_classes: Share of the training classes (0 to 1, both excluded; rounded, at least 2), or their number,
                an integer >= 2.
            seed: Seed of the random choice of classes.

        Returns:
            Data whose ``train`` has the other classes, relabeled in their order, with their rows of
            ``class_embeddings``, and whose ``test`` has the validation classes, with the transform of this ``test``,
            None without one. ``gallery`` is None.

        Raises:
            TypeError: If ``val_classes`` is not a number.
            ValueError: If fewer than 2 classes would be left on one side.
        """
        count = number_of_classes("val_classes", val_classes, self.num_classes, smallest=2)
        order = torch.randperm(self.num_classes, generator=torch.Generator().manual_seed(seed))
        held, rest = order[:count].sort().values, order[count:].sort().values
        validation = ClassSubset(self.train, held)
        validation.transform = None if self.test is None else self.test.transform
        rows = None if self.class_embeddings is None else self.class_embeddings[rest]
        return replace(self, train=ClassSubset(self.train, rest), test=validation, gallery=None, class_embeddings=rows)


def number_of_classes(name: str, value: float, num_classes: int, smallest: int, none: bool = False) -> int:
    """Return how many of ``num_classes`` classes are cut off, at least 2 being left.

    Args:
        name: Name of the setting, for the messages.
        value: A share (a float in (0, 1), rounded to what is possible), or a number (an integer).
        num_classes: Number of classes of the whole.
        smallest: The least that may be cut off.
        none: Whether 0, of none at all, may be too.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it is out of range, or there are fewer than ``smallest + 2`` classes.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a share or a number of classes, got {value!r}")
    if none and value == 0:
        return 0
    largest = num_classes - 2
    if largest < smallest:
        raise ValueError(f"{name} must cut off >= {smallest} classes and leave >= 2, got {num_classes} classes in all")
    if isinstance(value, Integral):
        if not smallest <= value <= largest:
            raise ValueError(f"{name} must be {smallest} to {largest} of {num_classes} classes, got {value}")
        return int(value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be a share between 0 and 1 or an integer, got {value}")
    return min(max(round(float(value) * num_classes), smallest), largest)
