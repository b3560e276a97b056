"""The wrappers without a process group, and a loss whose classes are all on the only rank."""

import warnings

import pytest
import torch
from pytorch_metric_learning import miners
from pytorch_metric_learning.reducers import SumReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from pml_ext.distributed import DistributedLossWrapper, DistributedMinerWrapper
from pml_ext.losses import CrossBatchMemory, MultiSimilarityLoss, ProxyAnchorLoss
from tests.contract.battery import cloned
from tests.contract.cases import CASES, LABELS, SIZE, make
from tests.distributed.test_sharding import DATA, MAKERS, build, proxy_anchor


def test_the_loss_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in CASES.values():
            wrapped = DistributedLossWrapper(make(case).double())
            torch.testing.assert_close(wrapped(DATA, LABELS), make(case).double()(DATA, LABELS))
        memory = DistributedLossWrapper(CrossBatchMemory(MultiSimilarityLoss(), SIZE))
        single = CrossBatchMemory(MultiSimilarityLoss(), SIZE)
        mask = torch.arange(len(DATA)) < 6
        torch.testing.assert_close(
            memory(DATA.float(), LABELS, enqueue_mask=mask), single(DATA.float(), LABELS, None, mask)
        )
        miner = DistributedMinerWrapper(miners.BatchHardMiner())
        assert all(
            torch.equal(a, b) for a, b in zip(miner(DATA, LABELS), miners.BatchHardMiner()(DATA, LABELS), strict=True)
        )


def test_what_can_be_wrapped():
    with pytest.raises(TypeError, match="loss must be a BaseMetricLossFunction or CrossBatchMemory, got Linear"):
        DistributedLossWrapper(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="efficient must be False for CrossBatchMemory"):
        DistributedLossWrapper(CrossBatchMemory(MultiSimilarityLoss(), SIZE), efficient=True)
    with pytest.raises(TypeError, match="miner must be a BaseMiner, got MultiSimilarityLoss"):
        DistributedMinerWrapper(MultiSimilarityLoss())


def test_memory_has_references_of_its_own():
    memory = DistributedLossWrapper(CrossBatchMemory(MultiSimilarityLoss(), SIZE))
    with pytest.raises(ValueError, match="ref_emb must not be given with CrossBatchMemory"):
        memory(DATA.float(), LABELS, ref_emb=DATA.float())


def test_one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        loss_func = build(MAKERS["HybridLoss"], dist.group.WORLD)[1]
        expected = build(MAKERS["HybridLoss"], None)[1](DATA, LABELS)
        torch.testing.assert_close(DistributedLossWrapper(loss_func)(DATA, LABELS), expected)
        with pytest.raises(ValueError, match="weight_regularizer must not be given with process_group"):
            proxy_anchor(weight_regularizer=LpRegularizer())(dist.group.WORLD)
        summed = DistributedLossWrapper(proxy_anchor(reducer=SumReducer())(dist.group.WORLD))
        with pytest.raises(ValueError, match="a loss with process_group must have a default reducer"):
            summed(DATA.float(), LABELS)
        with pytest.raises(ValueError, match="must be a mesh of one dimension, got 2"):
            proxy_anchor()(init_device_mesh("cpu", (1, 1)))
    finally:
        dist.destroy_process_group()


def test_without_ranks():
    with pytest.raises(ValueError, match=r"process_group must be given after torch\.distributed\.init_process_group"):
        ProxyAnchorLoss(5, SIZE, process_group="all")


def test_a_miner_with_hooks_and_one_that_refuses():
    mining = DistributedMinerWrapper(miners.PairMarginMiner(pos_margin=-1.0, neg_margin=3.0, collect_stats=True))
    mining.register_forward_pre_hook(cloned, with_kwargs=True)
    expected = mining(DATA, LABELS)
    assert len(expected[0])
    for found, pairs in zip(mining(DATA, LABELS, DATA, LABELS), expected, strict=True):
        assert torch.equal(found, pairs)
    statistics = mining.miner.num_pos_pairs, mining.miner.pos_pair_dist
    assert all(statistics)
    with pytest.raises(ValueError, match="Number of embeddings must equal number of labels"):
        mining(DATA, LABELS[:5])
    assert (mining.miner.num_pos_pairs, mining.miner.pos_pair_dist) == statistics
