"""Exact losses on several processes, through torch.distributed."""

from pml_ext.distributed.loss_wrapper import DistributedLossWrapper
from pml_ext.distributed.miner_wrapper import DistributedMinerWrapper

__all__ = ["DistributedLossWrapper", "DistributedMinerWrapper"]
