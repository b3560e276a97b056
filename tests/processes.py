"""Processes that begin with what most of them need imported."""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

import torch

from tests import gloo_threads

START_METHOD = "forkserver"
multiprocessing.get_context(START_METHOD).set_forkserver_preload(
    ["torch.distributed", "torch_geometric", "timm", "pytorch_metric_learning.losses", "pytorch_metric_learning.miners"]
)
ROOT = Path(__file__).parents[1]
KINDS = ("out", "err")


def start(worker, args, world):
    """Run ``worker(rank, *args)`` in several processes, and wait for them; an error in one is raised here.

    They are forked from a server that has imported torch and has computed nothing: importing it in each takes seconds.
    """
    torch.multiprocessing.start_processes(worker, args, nprocs=world, start_method=START_METHOD)


def run_scripts(commands, folder, world=1, **environment):
    """Run scripts, each with its arguments, in one process or several; return what all print, stdout and stderr.

    They run as ``python`` and ``torchrun`` run them, but for the start of Python and torch: each is ``__main__``, with
    its folder and the repository on the path. At the end a process tells which threads of its process group are left.
    """
    if world > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    commands = [[str(word) for word in command] for command in commands]
    start(_run_scripts, (commands, str(folder), world, environment), world)
    printed = [[(folder / f"{kind}{rank}").read_text(encoding="utf-8") for rank in range(world)] for kind in KINDS]
    return tuple(map("".join, printed))


def _run_scripts(rank, commands, folder, world, environment):
    os.environ |= environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
    os.chdir(folder)
    for descriptor, kind in enumerate(KINDS, 1):
        os.dup2(os.open(f"{kind}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    paths = [path for path in sys.path if Path(path).resolve() not in (ROOT / "benchmarks", ROOT / "examples")]
    gc.disable()  # what is freed by chance is no proof
    for command in commands:
        sys.argv, sys.path = command, [str(Path(command[0]).parent), *paths]
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as stopped:
            print("exit status:", stopped.code or 0)
    if sys.platform == "linux":
        print("threads of gloo:", gloo_threads.count())
    sys.stdout.flush()
