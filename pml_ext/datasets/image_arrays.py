"""A data set from arrays of images and labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_ext.datasets.labels import as_class_names, as_labels
from pml_ext.validation import check_values


class ImageArrays(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images and labels in memory.

    Args:
        images: ``(N, H, W)`` or ``(N, H, W, 3)``, uint8, an array or a tensor. Not copied where that can be avoided.
        labels: ``(N,)``, integers.
        transform: Applied to the image, a uint8 tensor ``(1, H, W)`` or ``(3, H, W)`` of its own.
        class_names: The name of label i at index i, or None.

    Attributes:
        images: ``(N, H, W)`` or ``(N, H, W, 3)``, uint8 tensor.
        labels: ``(N,)``, int64 tensor, the values given.
        transform: May be set at any time.
        class_names: A list, or None.
        in_channels: 1 or 3.

    Raises:
        TypeError: If ``images`` are not uint8, ``labels`` no integers, or ``class_names`` no strings.
        ValueError: If a shape is wrong, there is no image, or a label has no name.

    Examples:
        >>> dataset = ImageArrays(torch.zeros(2, 8, 8, dtype=torch.uint8), [3, 5])
        >>> image, label = dataset[1]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), 5)
    """

    def __init__(
        self,
        images: Any,
        labels: Any,
        transform: Callable[[Any], Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(images, Tensor):
            check_values("images", images)
        else:
            images = np.asarray(images)
        if images.dtype not in (torch.uint8, np.uint8):
            raise TypeError(f"images must have dtype uint8, got {images.dtype}")
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise ValueError(f"images must have shape (N, H, W) or (N, H, W, 3), got {tuple(images.shape)}")
        if not all(images.shape):
            raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        self.images: Tensor = images
        self.labels = as_labels("labels", labels, len(images))
        self.transform = transform
        self.class_names = as_class_names(class_names, self.labels)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return 1 if self.images.ndim == 3 else 3

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, label), as a uint8 tensor (C, H, W) unless the transform changes it, and an int."""
        image: Any = self.images[index]
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
        image = image.clone(memory_format=torch.contiguous_format)  # a transform in place must not reach the data
        return image if self.transform is None else self.transform(image), int(self.labels[index])
