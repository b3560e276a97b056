import pytest
import torch

from pml_ext.neighbors import neighbor_groups
from tests.neighbors.clusters import EMB, D, reference_groups


@pytest.mark.parametrize(("k1", "size"), [(4, 4), (6, 8), (7, 5), (12, 20), (30, 8), (100, 8)])
def test_groups_match_reference(k1, size):
    unit = EMB / EMB.norm(dim=1, keepdim=True)
    expected, grown = reference_groups(EMB, k1, size)
    assert neighbor_groups(unit, k1, size).tolist() == expected
    if k1 == 6:
        assert grown  # the expansion matters
        plain = (unit @ unit.T).fill_diagonal_(2).argsort(1, descending=True)[:, :size].tolist()
        assert plain != expected  # and so does reciprocity


def test_chunks_change_nothing(monkeypatch):
    unit = EMB / EMB.norm(dim=1, keepdim=True)
    whole = neighbor_groups(unit, 6, 5)
    monkeypatch.setattr("pml_ext.neighbors.similarity._CHUNK_ELEMENTS", 400)
    assert torch.equal(neighbor_groups(unit, 6, 5), whole)


def test_autocast_changes_nothing():
    unit = torch.nn.functional.normalize(torch.randn(300, 32))
    expected = neighbor_groups(unit, 10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(neighbor_groups(unit, 10, 5), expected)


def test_near_items_are_told_apart():
    """All similarities near 1, all items neighbors: the offset of neighbors must not round differences away."""
    emb = torch.ones(1, D) + 0.003 * torch.randn(60, D, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(emb)
    groups = neighbor_groups(unit, 59, 60)
    assert (unit @ unit.T).gather(1, groups)[:, 1:].diff(dim=1).max() <= 0
