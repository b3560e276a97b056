import pytest
import torch
from pytorch_metric_learning.miners import BatchHardMiner, MultiSimilarityMiner

from pml_ext.losses.sample_weights import sample_weights
from tests.pml_internals import lmu

EMB = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([7, 7, 2, 2, 2, 0, 0, 7, 9])


def test_hand_computed():
    """Sample 0 occurs three times, 1 and 2 once, 3 never."""
    triplets = torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([2, 2])
    assert sample_weights(triplets, 4, torch.float32).tolist() == pytest.approx([1, 1 / 3, 2 / 3, 0])


def test_nothing_mined_weighs_all_alike():
    nothing = (torch.empty(0, dtype=torch.long),) * 4
    assert sample_weights(nothing, 3, torch.float64).tolist() == [1, 1, 1]


@pytest.mark.parametrize("miner", [BatchHardMiner(), MultiSimilarityMiner(0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_pml(miner, dtype):
    mined = miner(EMB, LABELS)
    weights = sample_weights(mined, len(LABELS), dtype)
    assert weights.dtype == dtype
    assert len(weights.unique()) > 1
    assert torch.equal(weights, lmu.convert_to_weights(mined, LABELS, dtype=dtype))
