"""Losses of pairs need no matrix of all pairs: measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH, REFS = 6144, 300_000  # all pairs of a batch: 144 MB as float32, 36 MB as bools; 128 x REFS: 146 and 37 MB
SCRIPT = f"""
import sys
import torch
from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import *

sys.path.insert(0, {str(BENCHMARKS)!r})
from harness import peak_since, start_peak

torch.set_num_threads(1)
x = torch.randn({BATCH}, 16).requires_grad_()
labels = torch.arange({BATCH}) // 4
refs = torch.randn({REFS}, 16)
ref_labels = torch.randint(2000, ({REFS},))
memory = CrossBatchMemory(HybridLoss(2000, 16, pair_loss=MultiSimilarityLoss(epsilon=0.1)), 16, memory_size={REFS})
memory.embedding_memory.copy_(refs)
memory.label_memory.copy_(ref_labels)
memory.has_been_filled = True
pair = MultiSimilarityLoss()
whole = dict(
    multi_similarity=lambda: pair(x, labels),
    mined=lambda: MultiSimilarityLoss(epsilon=0.1)(x, labels),
    supcon=lambda: SupConLoss()(x, labels),
    ntxent=lambda: NTXentLoss()(x, labels),
    contrastive=lambda: ContrastiveLoss()(x, labels),
    hybrid=lambda: HybridLoss(2000, 16)(x, labels),
    ensemble=lambda: EnsembleLoss(pair, 2)(x, labels),
    two_views=lambda: SelfSupervisedLoss(pair)(x[: {BATCH} // 2], x[{BATCH} // 2 :]),
    one_rank=lambda: DistributedLossWrapper(pair, efficient=True)(x, labels),
    references=lambda: pair(x[:128], labels[:128], None, refs, ref_labels),
    supcon_references=lambda: SupConLoss()(x[:128], labels[:128], None, refs, ref_labels),
    contrastive_references=lambda: ContrastiveLoss()(x[:128], labels[:128], None, refs, ref_labels),
    memory=lambda: memory(x[:128], labels[:128]),
)
small = torch.randn(600, 16)
pair(small.requires_grad_(), torch.arange(600) // 4).backward()  # what is loaded on first use
for name, loss_of in whole.items():
    start = start_peak()
    loss = loss_of()
    (grad,) = torch.autograd.grad(loss, x)
    print(name, peak_since(start), loss.item(), grad.norm().item())
start = start_peak()
pair._can_stream = lambda *_: False
pair(x, labels)
print("dense", peak_since(start), 1, 1)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_of_all_pairs():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(float(loss) > 0 and float(norm) > 0 for *_, loss, norm in lines)
    peaks = {name: float(peak) for name, peak, *_ in lines}
    assert peaks.pop("dense") > 250  # or the measurement sees nothing
    assert len(peaks) == 13
    assert max(peaks.values()) < 34, peaks
    assert min(peaks.values()) > 0.5, peaks
