import time

import pytest
import torch

from pml_ext.inference import neighbor_groups, refine_with_neighbors
from pml_ext.losses import IntraBatchLoss
from pml_ext.trunks import IntraBatchRefiner

D = 6
LABELS = torch.arange(12).repeat_interleave(5)


def clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(12, D, generator=generator, dtype=torch.float64)
    return centers[LABELS] + 0.6 * torch.randn(60, D, generator=generator, dtype=torch.float64)


EMB = clusters()


def reference_groups(emb, k1, size):
    """The neighbours with sets and loops."""
    unit = emb / emb.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T).fill_diagonal_(2)
    order = similarity.argsort(1, descending=True).tolist()

    def mutual(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    found, grown = [], 0
    for i in range(len(emb)):
        own = mutual(i, k1)
        members = set(own)
        for j in own:
            theirs = mutual(j, round(k1 / 2))
            if len(theirs & own) > 2 / 3 * len(theirs):
                members |= theirs
        grown += len(members) > len(own)
        nearest = [j for j in order[i] if j in members] + [j for j in order[i] if j not in members]
        found.append(nearest[:size])
    return found, grown


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
    monkeypatch.setattr("pml_ext.graphs._CHUNK_ELEMENTS", 400)
    assert torch.equal(neighbor_groups(unit, 6, 5), whole)


@pytest.mark.parametrize("output", ["last", "cat", "every"])
def test_item_by_item(output):
    """What the refiner makes of each small batch by itself."""
    refiner = IntraBatchRefiner(D, num_layers=2, dropout=0.5, output=output).double().train()
    unit = EMB / EMB.norm(dim=1, keepdim=True)
    found = refine_with_neighbors(refiner, 3 * EMB, k1=6, size=5)
    assert refiner.training
    refiner.eval()
    groups, _ = reference_groups(EMB, 6, 5)
    for i, group in enumerate(groups):
        refined = refiner(unit[group])
        refined = refined[-1] if output == "every" else refined
        torch.testing.assert_close(found[i], refined[0])
    assert not found.requires_grad


@pytest.mark.slow
def test_many_items_take_seconds():
    """10,000 items of 128 numbers in less than a minute of processor time, statistics on or not."""
    emb = torch.randn(10_000, 128)
    start = time.process_time()
    refiner = IntraBatchRefiner(128, collect_stats=True)
    assert refine_with_neighbors(refiner, emb, progress=True).shape == (10_000, 128)
    assert time.process_time() - start < 60


def test_autocast_changes_nothing():
    unit = torch.nn.functional.normalize(torch.randn(300, 32))
    refiner = IntraBatchRefiner(32)
    expected = neighbor_groups(unit, 10, 5), refine_with_neighbors(refiner, unit, 10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        groups, refined = neighbor_groups(unit, 10, 5), refine_with_neighbors(refiner, unit, 10, 5)
    assert torch.equal(groups, expected[0])
    torch.testing.assert_close(refined, expected[1], rtol=0.05, atol=0.05)  # the refiner itself may be in half


def test_near_items_are_told_apart():
    """All similarities near 1: the offset of neighbours must not round differences away."""
    emb = (torch.ones(1, D) + 0.01 * torch.randn(60, D)).float()
    groups = neighbor_groups(torch.nn.functional.normalize(emb), 8, 6)
    unit = torch.nn.functional.normalize(emb.double())
    same = (groups == neighbor_groups(unit, 8, 6)).all(1)
    assert same.float().mean() > 0.9


def test_refiner_of_another_dtype():
    refiner = IntraBatchRefiner(D).double()
    found = refine_with_neighbors(refiner, EMB.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), refine_with_neighbors(refiner, EMB), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_dtypes(half):
    refiner = IntraBatchRefiner(D)
    assert refine_with_neighbors(refiner, EMB.to(half)).dtype == half
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert refine_with_neighbors(refiner, EMB.float()).dtype == torch.float32


def test_few_items():
    refiner = IntraBatchRefiner(D).double().eval()
    assert refine_with_neighbors(refiner, EMB[:3]).shape == (3, D)
    torch.testing.assert_close(refine_with_neighbors(refiner, EMB[:1]), refiner(EMB[:1] / EMB[:1].norm()))
    assert refine_with_neighbors(refiner, EMB[:0]).shape == (0, D)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k1": 0}, ValueError, "k1 must be an integer >= 1, got 0"),
        ({"k1": 2.5}, ValueError, r"k1 must be an integer >= 1, got 2\.5"),
        ({"size": 0}, ValueError, "size must be an integer >= 1, got 0"),
        ({"refiner": IntraBatchLoss(5, D)}, TypeError, "refiner must be a module such as .* got IntraBatchLoss"),
        ({"embeddings": EMB.numpy()}, TypeError, r"embeddings must be a torch\.Tensor, got ndarray"),
        ({"embeddings": EMB.long()}, TypeError, r"embeddings must have a floating point dtype, got torch\.int64"),
        ({"embeddings": EMB / 0}, ValueError, "embeddings must be finite"),
        ({"embeddings": EMB[:, :2]}, ValueError, r"embeddings must have shape .*, 6\), got"),
    ],
)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=message):
        refine_with_neighbors(**({"refiner": IntraBatchRefiner(D).double(), "embeddings": EMB} | kwargs))
