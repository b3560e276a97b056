"""CrossBatchMemory and SelfSupervisedLoss."""

import io

import pytest
import torch
from pytorch_metric_learning import losses, miners

from pml_ext.losses import CrossBatchMemory, HybridLoss, MultiSimilarityLoss, ProxyAnchorLoss, SelfSupervisedLoss

SIZE = 5


def batches(number=5, size=8):
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        yield torch.randn(size, SIZE, generator=generator), torch.randint(4, (size,), generator=generator)


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner()])
def test_memory_is_pml_memory(miner):
    ours = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20, miner=miner)
    theirs = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), SIZE, memory_size=20, miner=miner)
    for emb, labels in batches():
        torch.testing.assert_close(ours(emb, labels), theirs(emb, labels))
        assert ours.queue_idx == theirs.queue_idx
    assert ours.has_been_filled


def test_hybrid_sees_memory_in_the_pair_part_alone():
    hybrid = HybridLoss(4, SIZE, pair_loss=MultiSimilarityLoss(), proxy_weight=2.0)
    memory = CrossBatchMemory(hybrid, SIZE, memory_size=32)
    pairs = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=32)
    for emb, labels in batches(3):
        expected = pairs(emb, labels) + 2 * hybrid.proxy_loss(emb, labels)
        torch.testing.assert_close(memory(emb, labels), expected)


def test_enqueue_mask():
    ours = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    theirs = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), SIZE, memory_size=20)
    mask = torch.arange(8) % 2 == 0
    for emb, labels in batches():
        torch.testing.assert_close(ours(emb, labels, enqueue_mask=mask), theirs(emb, labels, enqueue_mask=mask))


@pytest.mark.parametrize("number", [2, 4])
def test_position_is_saved(number):
    """PML saves the memory without the position: after loading it counts as empty."""
    first = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    for emb, labels in batches(number):
        first(emb, labels)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert (second.queue_idx, second.has_been_filled) == (first.queue_idx, first.has_been_filled) != (0, False)
    emb, labels = next(batches(1))
    torch.testing.assert_close(second(emb, labels), first(emb, labels))


def test_bad_batch_does_not_enter_the_memory():
    memory = CrossBatchMemory(HybridLoss(4, SIZE), SIZE, memory_size=20)
    emb, labels = next(batches(1))
    with pytest.raises(ValueError, match="embeddings must be finite"):
        memory(emb / 0, labels)
    with pytest.raises(ValueError, match="labels must be < num_classes = 4, got 7"):
        memory(emb, labels + 4 * (labels == 3))
    assert memory.queue_idx == 0
    assert not memory.embedding_memory.any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_embeddings(half):
    memory = CrossBatchMemory(HybridLoss(4, SIZE), SIZE, memory_size=20)
    for emb, labels in batches(2):
        emb = emb.to(half).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = memory(emb, labels)
        loss.backward()
        assert loss.dtype == memory.embedding_memory.dtype == torch.float32
        assert emb.grad.dtype == half


def test_unsupported_losses_are_refused():
    with pytest.raises(TypeError, match=r"loss must be one of .*HybridLoss, got ProxyAnchorLoss"):
        CrossBatchMemory(ProxyAnchorLoss(4, SIZE), SIZE)
    with pytest.raises(TypeError, match="got VICRegLoss"):
        CrossBatchMemory(HybridLoss(4, SIZE, pair_loss=losses.VICRegLoss()), SIZE)
    for loss_func in (ProxyAnchorLoss(4, SIZE), HybridLoss(4, SIZE)):
        with pytest.raises(TypeError, match=f"got {type(loss_func).__name__}"):
            SelfSupervisedLoss(loss_func)


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_is_pml(symmetric):
    (first, _), (second, _) = batches(2)
    ours = SelfSupervisedLoss(MultiSimilarityLoss(), symmetric=symmetric)(first, second)
    theirs = losses.SelfSupervisedLoss(losses.MultiSimilarityLoss(), symmetric=symmetric)(first, second)
    assert ours > 0
    torch.testing.assert_close(ours, theirs)
