"""No thread of a process group outlives it: with one, a process may abort while it exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SCRIPT = """
import sys

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import ProxyAnchorLoss

sys.path.insert(0, sys.argv[2])
import gloo_threads


def train():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    DistributedLossWrapper(ProxyAnchorLoss(3, 4))(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    dist.destroy_process_group()


before = gloo_threads.count()
train()
print(before, gloo_threads.count())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
def test_no_thread_is_left(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "rendezvous"), str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]
