"""Memory does not grow with the number of classes nor with their sizes: measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
METRICS = ("recall_at_1", "r_precision", "mean_average_precision_at_r")
SCRIPT = f"""
import sys
import torch
from pml_ext.evaluation import retrieval_metrics

sys.path.insert(0, {str(BENCHMARKS)!r})
from harness import peak_since, start_peak

torch.set_num_threads(1)
x = torch.randn(20_000, 4)
x = x[x[:, 0].argsort()]  # neighbors in number are near
retrieval_metrics(x[:100], torch.arange(100) // 2)  # what is loaded on first use
for labels in (torch.arange(20_000) // 2, torch.arange(20_000).clamp(min=10_000)):
    start = start_peak()
    metrics = retrieval_metrics(x, labels, metrics={METRICS})
    print(peak_since(start), metrics["r_precision"])
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_classes():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (many, of_many), (large, of_large) = ([float(x) for x in line.split()] for line in done.stdout.splitlines())
    assert 0 < of_many < of_large < 1
    assert 5 < many < 160, many  # of all queries and 10,000 classes: 191 MB as bools
    assert 5 < large < 240, large  # of 10,000 queries and their 10,000 neighbors: 763 MB as integers
