import numpy as np
import pytest
import torch

from pml_ext.neighbors import search
from pml_ext.neighbors.search import nearest_by_cosine, nearest_others

EMB = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def by_loops(x, k):
    """The k nearest others of each row by squared distance, without torch."""
    nearest = []
    for i, row in enumerate(x):
        distances = [(((row - other) ** 2).sum(), j) for j, other in enumerate(x) if j != i]
        nearest.append([j for _, j in sorted(distances)[:k]])
    return nearest


@pytest.mark.parametrize("k", [1, 7, 49])
@pytest.mark.parametrize("parts", [None, 1, 2, 3])
def test_matches_loops(k, parts):
    searched = list(nearest_others(EMB, k, parts))
    assert len(searched) == (parts or 1)
    assert torch.equal(torch.cat([rows for rows, _ in searched]), torch.arange(50))
    nearest = torch.cat([neighbors for _, neighbors in searched])
    assert nearest.tolist() == by_loops(EMB.numpy().astype(np.float64), k)


def test_parts_keep_memory_low(monkeypatch):
    """As many parts of one size as hold the given numbers of rows and neighbours."""
    monkeypatch.setattr(search, "_ROWS_AT_ONCE", 20)
    monkeypatch.setattr(search, "_NEIGHBORS_AT_ONCE", 1)
    assert [len(rows) for rows, _ in nearest_others(EMB, 3)] == [17, 17, 16]
    monkeypatch.setattr(search, "_NEIGHBORS_AT_ONCE", 4 * 25)  # of 4, the row itself included
    assert [len(rows) for rows, _ in nearest_others(EMB, 3)] == [25, 25]
    assert len(list(nearest_others(EMB, 4))) == 3


def test_equal_rows():
    """A row is never its own neighbour, though others lie as near."""
    ((rows, neighbors),) = nearest_others(torch.ones(30, 4), 2)
    assert neighbors.shape == (30, 2)
    assert (neighbors != rows[:, None]).all()


def test_progress(capsys):
    assert len(list(nearest_others(EMB, 1, progress=True))) == 1
    assert "neighbours" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["faiss", "torch"])
def test_cosine_order_is_that_of_distances_of_unit_rows(dtype):
    unit = torch.nn.functional.normalize(EMB.to(dtype))
    assert nearest_by_cosine(unit, 5).tolist() == by_loops(unit.double().numpy(), 5)
    assert nearest_by_cosine(unit, 0).shape == (50, 0)
