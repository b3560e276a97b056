"""A data set that a linear map can learn in seconds."""

import torch

from tests.contract.cases import NUM_CLASSES

IN_FEATURES, PER_CLASS = 16, 24


def clusters(seed):
    """Return a data set of NUM_CLASSES clusters in 4 of 16 dimensions; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    signal = torch.randn(NUM_CLASSES, 4, generator=torch.Generator().manual_seed(0))[labels]
    signal = signal + 0.3 * torch.randn(len(labels), 4, generator=generator)
    data = torch.cat([signal, 3 * torch.randn(len(labels), IN_FEATURES - 4, generator=generator)], dim=1)
    return torch.utils.data.TensorDataset(data, labels)
