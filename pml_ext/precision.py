"""Half precision: embeddings may come in it, losses are computed in float32 or better."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def upcast_half(x: Tensor) -> Tensor:
    """Return float32 for float16, bfloat16 and smaller; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which autocast does not act on ``device``."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
