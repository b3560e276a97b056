"""Refused calls of networks leave no trace; for losses the battery of tests/contract looks at that."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from pml_ext.pml_internals import statistics_of
from pml_ext.refused import unchanged_where_refused
from pml_ext.trunks import AttentionEnsemble, GlobalLocalTrunk, IntraBatchRefiner, PooledTrunk, SecondOrderAttention

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def stage(channels, out):
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride=2), nn.BatchNorm2d(out), nn.ReLU())


class TwoLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = stage(3, 8), stage(8, 12)

    def forward(self, images):
        local = self.first(images)
        return local, self.second(local)


def ensemble(**kwargs):
    attention = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6))
    head = nn.Sequential(stage(8, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return AttentionEnsemble(stage(3, 8), attention, head, 2, 8, input_size=(3, 32, 32), **kwargs)


def two_levels(**kwargs):
    return GlobalLocalTrunk(TwoLevels(), 8, attention="solar", feature_channels=(8, 12), **kwargs)


def pooled(**kwargs):
    return PooledTrunk(stage(3, 8), 8, attention="normalized", feature_channels=8, **kwargs)


MAKERS = {"ensemble": ensemble, "two levels": two_levels, "pooled": pooled}


def state(module):
    tensors = {name: x.clone() for name, x in module.state_dict().items()}
    return tensors, {path: statistics_of(part) for path, part in module.named_modules()}


def assert_same(after, before):
    assert after[1] == before[1]
    assert all(torch.equal(x, before[0][name]) for name, x in after[0].items())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("late", [False, True])
def test_networks(name, late):
    """The first norm counts a batch of one value before it refuses it; at the end all norms have seen the batch."""
    trunk = MAKERS[name](collect_stats=True)
    trunk(IMAGES)
    before = state(trunk)
    assert any(statistics for statistics in before[1].values())
    last = trunk.linear if name != "two levels" else trunk.global_head[2]
    out_of_memory = mock.patch.object(last, "forward", side_effect=RuntimeError("out of memory"))
    with out_of_memory if late else nullcontext(), pytest.raises((RuntimeError, ValueError)):
        trunk(IMAGES * 2 if late else IMAGES[:1, :, :3, :3])
    assert_same(state(trunk), before)
    trunk(IMAGES * 2)
    with pytest.raises(AssertionError):
        assert_same(state(trunk), before)


@pytest.mark.parametrize(
    ("name", "method"), [("ensemble", "masks"), ("two levels", "feature_maps"), ("two levels", "attention_maps")]
)
def test_maps(name, method):
    trunk = MAKERS[name]()
    trunk(IMAGES)
    before = state(trunk)
    with pytest.raises((RuntimeError, ValueError)):
        getattr(trunk, method)(IMAGES[:1, :, :3, :3])
    assert_same(state(trunk), before)


def test_attention():
    block = SecondOrderAttention(8, style="solar", collect_stats=True)
    block(torch.randn(2, 8, 3, 3))
    before = state(block)
    for call in (block, block.attention_map):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            call(torch.randn(1, 8, 1, 1))
        assert_same(state(block), before)


def test_refiner():
    refiner = IntraBatchRefiner(6, collect_stats=True)
    refiner(torch.randn(5, 6))
    before = state(refiner)
    layer = mock.patch.object(refiner.layers[0], "forward", side_effect=RuntimeError("out of memory"))
    with layer, pytest.raises(RuntimeError, match="out of memory"):
        refiner(torch.randn(5, 6))
    assert_same(state(refiner), before)


def test_what_the_caller_keeps_is_not_kept_again():
    trunk = pooled()
    with unchanged_where_refused(trunk):
        assert isinstance(unchanged_where_refused(trunk.attention), nullcontext)
    assert not isinstance(unchanged_where_refused(trunk.attention), nullcontext)
