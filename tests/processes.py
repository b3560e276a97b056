"""Processes that begin with what most of them need imported."""

import multiprocessing

import torch

START_METHOD = "forkserver"
multiprocessing.get_context(START_METHOD).set_forkserver_preload(
    ["torch.distributed", "torch_geometric", "timm", "pytorch_metric_learning.losses", "pytorch_metric_learning.miners"]
)


def start(worker, args, world):
    """Run ``worker(rank, *args)`` in several processes, and wait for them; an error in one is raised here.

    They are forked from a server that has imported torch and has computed nothing: importing it in each takes seconds.
    """
    torch.multiprocessing.start_processes(worker, args, nprocs=world, start_method=START_METHOD)
