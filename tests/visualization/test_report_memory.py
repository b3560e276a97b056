"""The report stores no pairs: measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = f"""
import sys
import torch
from pml_ext.visualization import retrieval_report

sys.path.insert(0, {str(BENCHMARKS)!r})
from harness import peak_since, start_peak

torch.set_num_threads(1)
path = sys.argv[1]
retrieval_report(torch.randn(100, 4), torch.arange(100) % 2, path=path, num_points=0)  # what is loaded on first use
x, labels = torch.randn(12_000, 4), torch.arange(12_000) % 2
start = start_peak()
retrieval_report(x, labels, path=path, num_points=0)
print(peak_since(start))
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_large_classes(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "r.html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 5 < float(done.stdout) < 450, done.stdout  # the neighbors of all queries: 576 MB, as integers
    assert (tmp_path / "r.html").stat().st_size > 10_000
