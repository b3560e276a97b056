import time

import pytest
import torch

from pml_ext.losses import IntraBatchLoss
from pml_ext.neighbors import refine_with_neighbors
from pml_ext.trunks import IntraBatchRefiner
from tests.neighbors.clusters import EMB, D, reference_groups


@pytest.mark.parametrize("output", ["last", "cat"])
def test_item_by_item(output):
    """What the refiner makes of each small batch by itself."""
    refiner = IntraBatchRefiner(D, num_layers=2, dropout=0.5, output=output).double().train()
    unit = EMB / EMB.norm(dim=1, keepdim=True)
    all_refined = refine_with_neighbors(refiner, 3 * EMB, k1=6, size=5)
    assert refiner.training
    refiner.eval()
    groups, _ = reference_groups(EMB, 6, 5)
    for i, group in enumerate(groups):
        torch.testing.assert_close(all_refined[i], refiner(unit[group])[0])
    assert not all_refined.requires_grad


@pytest.mark.slow
def test_many_items_take_seconds():
    """10,000 items of 128 dimensions in less than a minute of processor time, statistics on or not."""
    emb = torch.randn(10_000, 128)
    start = time.process_time()
    refiner = IntraBatchRefiner(128, collect_stats=True)
    assert refine_with_neighbors(refiner, emb, progress=True).shape == (10_000, 128)
    assert time.process_time() - start < 60


def test_autocast_changes_what_the_refiner_computes_only():
    unit = torch.nn.functional.normalize(torch.randn(300, 32))
    refiner = IntraBatchRefiner(32)
    expected = refine_with_neighbors(refiner, unit, 10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = refine_with_neighbors(refiner, unit, 10, 5)
    torch.testing.assert_close(refined, expected, rtol=0.05, atol=0.05)  # the refiner itself may be in half


def test_refiner_of_another_dtype():
    refiner = IntraBatchRefiner(D).double()
    refined = refine_with_neighbors(refiner, EMB.float())
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined.double(), refine_with_neighbors(refiner, EMB), rtol=1e-4, atol=1e-5)


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
