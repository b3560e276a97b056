import numpy as np
import pytest
import torch

from pml_ext.visualization.report_search import _PairCounts, counted


@pytest.mark.parametrize("num_codes", [7, 5000])
def test_counted(num_codes):
    """Few codes are counted, many are sorted."""
    codes = torch.tensor([5, 0, 5, 6, 5, 0, 6, 5])
    assert counted(codes, num_codes).tolist() == [[0, 5, 6], [2, 4, 2]]


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
def test_pair_counts_take_the_memory_of_what_occurs(monkeypatch, at_once):
    monkeypatch.setattr("pml_ext.visualization.report_search._PAIRS_AT_ONCE", at_once)
    pairs, parts = _PairCounts(10**6), [torch.randint(100, (40,)) * 1000 for _ in range(60)]
    for part in parts:
        pairs.add(part)
        assert sum(x.shape[1] for x in pairs.parts) <= max(at_once, 200) + 40
    codes, counts = np.unique(torch.cat(parts).numpy(), return_counts=True)
    assert pairs.total().tolist() == [codes.tolist(), counts.tolist()]
