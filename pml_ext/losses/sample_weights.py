"""How much each sample counts in what a miner returned."""

import torch
from torch import Tensor

from pml_ext.types import Indices


def sample_weights(indices_tuple: Indices, batch_size: int, dtype: torch.dtype) -> Tensor:
    """Return each sample's share, ``(B,)``: how often it occurs, divided by the largest count; 1 if nothing was mined.

    PML's classification losses weigh by the same numbers. A triplet counts its anchor once, a pair of pairs twice.

    Args:
        indices_tuple: Three or four tensors of int64.
        batch_size: B.
        dtype: dtype of the weights, float32 or wider.
    """
    mined = torch.cat(indices_tuple)
    if not len(mined):
        return torch.ones(batch_size, dtype=dtype, device=mined.device)
    counts = torch.zeros(batch_size, dtype=torch.int64, device=mined.device).index_add(0, mined, torch.ones_like(mined))
    return counts.to(dtype) / counts.max()
