"""A data set that gets by without the images that cannot be read."""

from typing import Any

import torch
from torch import Tensor


class Readable(torch.utils.data.Dataset[tuple[Any, int]]):
    """A data set whose images that cannot be read are told by the label -1, so that they can be left out.

    Args:
        dataset: Of transformed images and labels; what cannot be read raises ``ValueError`` there.
        nothing: Stands for such an image: of the shape and dtype of the others.

    Examples:
        >>> from pml_ext.datasets.image_files import ImageFiles
        >>> Readable(ImageFiles(["lost.jpg"], [3]), torch.zeros(2))[0]
        (tensor([0., 0.]), -1)
    """

    def __init__(self, dataset: Any, nothing: Tensor) -> None:
        self.dataset = dataset
        self.nothing = nothing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return (image, label)."""
        try:
            image, label = self.dataset[index]
        except ValueError:
            return self.nothing, -1
        return image, label
