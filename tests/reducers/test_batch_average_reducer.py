import copy
import pickle

import pytest
import torch
from pytorch_metric_learning import losses, reducers

from pml_ext.losses import LabelSmoothingCrossEntropyLoss
from pml_ext.reducers import BatchAverageReducer

EMB = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([4, 4, 2, 2, 2, 0, 0, 1])


@pytest.mark.parametrize(
    "make",
    [losses.ContrastiveLoss, losses.TripletMarginLoss, lambda **kw: LabelSmoothingCrossEntropyLoss(5, 5, **kw)],
    ids=["pairs", "triplets", "elements"],
)
def test_sum_over_batch_size(make):
    torch.manual_seed(0)
    summed = make(reducer=reducers.SumReducer())(EMB, LABELS)
    torch.manual_seed(0)
    loss = make(reducer=BatchAverageReducer())(EMB, LABELS)
    assert loss > 0
    torch.testing.assert_close(loss, summed / 8)


def test_repeated_pairs_count_each_time():
    loss_func = losses.ContrastiveLoss(reducer=BatchAverageReducer())
    pairs = tuple(torch.tensor(x) for x in ([0, 2], [1, 3], [0, 2], [2, 5]))
    twice = tuple(x.repeat(2) for x in pairs)
    torch.testing.assert_close(loss_func(EMB, LABELS, twice), 2 * loss_func(EMB, LABELS, pairs))


def test_no_pairs_and_copies():
    reducer = BatchAverageReducer()
    emb = EMB.clone().requires_grad_()
    loss = losses.ContrastiveLoss(reducer=reducer)(emb, torch.arange(8), (torch.tensor([]).long(),) * 4)
    loss.backward()
    assert loss == 0
    for other in (copy.deepcopy(reducer), pickle.loads(pickle.dumps(reducer))):
        assert isinstance(other, BatchAverageReducer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_losses_are_added_up_in_float32(dtype):
    one = torch.tensor(484.8, dtype=dtype)
    summed = BatchAverageReducer()(
        {"loss": {"losses": one.repeat(512), "indices": torch.arange(512), "reduction_type": "element"}},
        torch.zeros(512, 2, dtype=dtype),
        torch.zeros(512, dtype=torch.long),
    )
    assert summed.dtype == torch.float32
    assert summed.item() == pytest.approx(one.item())  # float16 holds no sum beyond 65504, bfloat16 stops at 2 ** 17
