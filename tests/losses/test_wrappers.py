"""CrossBatchMemory and SelfSupervisedLoss."""

import copy
import io
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.reducers import MeanReducer

from pml_ext.losses import (
    ContrastiveLoss,
    CrossBatchMemory,
    EnsembleLoss,
    HybridLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    SelfSupervisedLoss,
    SupConLoss,
)
from pml_ext.pairs import own_rows_at
from tests.contract.battery import cloned
from tests.graphs import graphs_of_batches

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


@pytest.mark.parametrize("loss_class", [MultiSimilarityLoss, SupConLoss, NTXentLoss, ContrastiveLoss])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_memory_without_a_list_of_pairs(loss_class, chunk_size):
    """No sample is compared with itself, nor with what it has overwritten, and nobody lists all other pairs."""
    ours = CrossBatchMemory(loss_class(chunk_size=chunk_size), SIZE, memory_size=20)
    theirs = losses.CrossBatchMemory(getattr(losses, loss_class.__name__)(), SIZE, memory_size=20)
    with mock.patch.object(CrossBatchMemory, "create_indices_tuple", side_effect=AssertionError):
        for emb, labels in batches():
            emb.requires_grad_()
            actual, expected = ours(emb, labels), theirs(emb, labels)
            assert expected > 0
            torch.testing.assert_close(actual, expected)
            torch.testing.assert_close(torch.autograd.grad(actual, emb), torch.autograd.grad(expected, emb))


def test_memory_lists_pairs_where_a_loss_needs_them():
    """A loss of PML's inside, or a miner."""
    for loss, miner in (
        (losses.ContrastiveLoss(), None),
        (HybridLoss(4, SIZE, pair_loss=losses.ContrastiveLoss()), None),
        (EnsembleLoss(losses.ContrastiveLoss(), 5), None),
        (MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
        (HybridLoss(4, SIZE, miner=miners.MultiSimilarityMiner()), None),
    ):
        memory = CrossBatchMemory(loss, SIZE, memory_size=20, miner=miner)
        listed = mock.patch.object(CrossBatchMemory, "create_indices_tuple", side_effect=AssertionError("listed"))
        with listed, pytest.raises(AssertionError, match="listed"):
            memory(*next(batches()))


@pytest.mark.parametrize("compare", [HybridLoss(4, SIZE), EnsembleLoss(MultiSimilarityLoss(epsilon=0.1), 5)])
def test_composites_tell_their_children_where_samples_lie(compare):
    memory, listed = (CrossBatchMemory(compare, SIZE, memory_size=20) for _ in range(2))
    for emb, labels in batches():
        actual = memory(emb, labels)
        with mock.patch.object(type(compare), "leaves_out_own", False):
            torch.testing.assert_close(actual, listed(emb, labels))


COMPILED = {
    "pairs": lambda: (loss := MultiSimilarityLoss(), loss),
    "supcon": lambda: (loss := SupConLoss(), loss),
    "ntxent": lambda: (loss := NTXentLoss(), loss),
    "contrastive": lambda: (loss := ContrastiveLoss(reducer=MeanReducer()), loss),
    "tiles": lambda: (loss := MultiSimilarityLoss(chunk_size=3), loss),
    "hybrid": lambda: (loss := HybridLoss(4, SIZE), loss),
    "hybrid's child": lambda: (loss := HybridLoss(4, SIZE), loss.pair_loss),
}


@pytest.mark.compiles
@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_a_compiled_loss_in_a_memory_is_told_where_samples_lie(make):
    """It compares no sample with itself, in another place of the memory in each batch."""
    torch.compiler.reset()
    torch.manual_seed(0)
    compiled, part = make()
    plain = copy.deepcopy(compiled)
    part.compile(backend="eager")
    memories = [CrossBatchMemory(loss, SIZE, memory_size=20) for loss in (compiled, plain)]
    for emb, labels in batches():
        emb.requires_grad_()
        actual, expected = (memory(emb, labels) for memory in memories)
        assert expected > 0
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual, emb), torch.autograd.grad(expected, emb))


@pytest.mark.compiles
def test_places_of_samples_leave_a_loss_in_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(MultiSimilarityLoss(), backend="eager", fullgraph=True)
    emb, labels = next(batches())
    refs, ref_labels = torch.cat([emb, emb + 1]), torch.cat([labels, labels])
    values = []
    for places in (torch.arange(8), torch.arange(8, 16), None):
        with own_rows_at(places):
            values.append(compiled(emb, labels, None, refs, ref_labels))
            torch.testing.assert_close(values[-1], MultiSimilarityLoss()(emb, labels, None, refs, ref_labels))
    assert len({x.item() for x in values}) == 3


def test_mining_inside_a_memory():
    """As PML's miner, but for its taking a sample for its own positive where there is no other."""
    ours = CrossBatchMemory(MultiSimilarityLoss(epsilon=0.1), SIZE, memory_size=20)
    theirs = losses.CrossBatchMemory(
        losses.MultiSimilarityLoss(), SIZE, memory_size=20, miner=miners.MultiSimilarityMiner(0.1)
    )
    for emb, _ in batches():
        labels = torch.arange(8) // 2  # each has another positive
        actual = ours(emb, labels)
        assert actual > 0
        torch.testing.assert_close(actual, theirs(emb, labels))


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


def test_pml_state_dict_loads_as_an_empty_memory():
    theirs = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), SIZE, memory_size=20)
    for emb, labels in batches(2):
        theirs(emb, labels)
    ours = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.queue_idx, ours.has_been_filled) == (0, False)


def filled_memory(memory_size=20, embedding_size=SIZE):
    memory = CrossBatchMemory(HybridLoss(4, embedding_size), embedding_size, memory_size=memory_size)
    for emb, labels in batches(3):
        memory(emb[:, :embedding_size], labels)
    return memory


@pytest.mark.parametrize(
    ("parts", "sizes", "error"),
    [
        ("loss", {}, ""),
        ("loss _extra_state", {}, ""),
        ("loss embedding_memory _extra_state", {}, "must be loaded together, got embedding_memory alone"),
        ("loss label_memory", {}, "must be loaded together, got label_memory alone"),
        ("loss embedding_memory label_memory _extra_state", {"memory_size": 16}, "size mismatch for embedding_memory"),
        ("embedding_memory label_memory _extra_state", {"embedding_size": 4}, "size mismatch for embedding_memory"),
    ],
)
def test_a_memory_that_is_not_loaded_stays_with_its_position(parts, sizes, error):
    """Rows of zeros must not count as filled, nor a live memory as empty."""
    first, second = filled_memory(**sizes), filled_memory()
    second(*next(batches(1)))
    before = copy.deepcopy(second)
    some = {name: x for name, x in first.state_dict().items() if name.split(".")[0] in parts.split()}
    with pytest.raises(RuntimeError, match=error) if error else nullcontext():
        second.load_state_dict(some, strict=False)
    assert (second.queue_idx, second.has_been_filled) == (before.queue_idx, before.has_been_filled) == (12, True)
    torch.testing.assert_close(second.embedding_memory, before.embedding_memory, rtol=0, atol=0)
    torch.testing.assert_close(second.label_memory, before.label_memory, rtol=0, atol=0)
    if "loss" in parts:
        torch.testing.assert_close(second.loss.state_dict(), first.loss.state_dict(), rtol=0, atol=0)


def test_a_position_outside_the_memory_is_refused():
    state = filled_memory().state_dict()
    state["_extra_state"] = torch.tensor([20, 1])
    with pytest.raises(ValueError, match="queue_idx must be 0 to memory_size - 1 = 19, got 20"):
        filled_memory().load_state_dict(state)


EMBEDDINGS, CLASSES = next(batches(1))
ALL = torch.ones(8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((EMBEDDINGS / 0, CLASSES), ValueError, "embeddings must be finite"),
        ((EMBEDDINGS, CLASSES + 4), ValueError, "labels must be < num_classes = 4, got"),
        ((EMBEDDINGS, None), ValueError, "labels are required"),
        ((EMBEDDINGS.repeat(3, 1), CLASSES.repeat(3)), ValueError, "at most memory_size = 20 embeddings .* got 24"),
        ((EMBEDDINGS, CLASSES, None, ALL.long()), TypeError, r"bool tensor of shape \(8,\), got torch\.int64"),
        ((EMBEDDINGS, CLASSES, None, ALL[:5]), ValueError, r"enqueue_mask must be .* shape \(8,\), got shape \(5,\)"),
        (
            (EMBEDDINGS, CLASSES, (CLASSES, CLASSES + 20, CLASSES)),
            ValueError,
            r"indices_tuple\[1\] must be < the number",
        ),
        ((EMBEDDINGS, CLASSES, (CLASSES,) * 3, ALL), ValueError, "mutually exclusive"),
    ],
)
def test_bad_batch_does_not_enter_the_memory(args, error, message):
    memory = CrossBatchMemory(HybridLoss(4, SIZE), SIZE, memory_size=20)
    with pytest.raises(error, match=message):
        memory(*args)
    assert memory.queue_idx == 0
    assert not memory.embedding_memory.any()


def test_nothing_enters():
    """PML's memory counts as full after such a call, and zero vectors of class 0 are compared with."""
    memory = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    assert memory(EMBEDDINGS, CLASSES, enqueue_mask=~ALL) == 0
    assert memory(EMBEDDINGS[:0], CLASSES[:0]) == 0
    assert (memory.queue_idx, memory.has_been_filled) == (0, False)
    other = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    torch.testing.assert_close(memory(EMBEDDINGS, CLASSES), other(EMBEDDINGS, CLASSES))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_integer_labels_of_any_dtype(dtype):
    memory, other = (CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20) for _ in range(2))
    memory(EMBEDDINGS, CLASSES + 300)
    other(EMBEDDINGS, CLASSES + 300)
    torch.testing.assert_close(memory(EMBEDDINGS, CLASSES.to(dtype)), other(EMBEDDINGS, CLASSES))
    assert memory.label_memory[:8].min() >= 300


def test_miner_of_the_hybrid_is_used():
    torch.manual_seed(0)
    inside = CrossBatchMemory(HybridLoss(4, SIZE, miner=miners.BatchHardMiner()), SIZE, memory_size=20)
    torch.manual_seed(0)
    outside = CrossBatchMemory(HybridLoss(4, SIZE), SIZE, memory_size=20, miner=miners.BatchHardMiner())
    for emb, labels in batches(3):
        torch.testing.assert_close(inside(emb, labels), outside(emb, labels))


def test_miner_works_in_full_precision_under_autocast():
    seen = []

    def miner(emb, labels, ref_emb, ref_labels):
        seen.append((emb @ ref_emb.T).dtype)
        return miners.BatchHardMiner()(emb, labels, ref_emb, ref_labels)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20, miner=miner)(EMBEDDINGS, CLASSES)
    assert seen == [torch.float32]


def test_input_is_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr("pml_ext.losses.base_loss.check_batch", lambda *args: calls.append(args))
    CrossBatchMemory(HybridLoss(4, SIZE), SIZE)(EMBEDDINGS, CLASSES)
    assert not calls


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


def test_embedding_size_is_that_of_the_loss():
    with pytest.raises(ValueError, match="embedding_size must be that of the loss, 5, got 7"):
        CrossBatchMemory(HybridLoss(4, SIZE), 7)


def test_unsupported_losses_are_refused():
    with pytest.raises(TypeError, match=r"loss must be one of .*HybridLoss, got ProxyAnchorLoss"):
        CrossBatchMemory(ProxyAnchorLoss(4, SIZE), SIZE)
    with pytest.raises(TypeError, match=r"loss\.pair_loss must be one that supports ref_emb, got VICRegLoss"):
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


@pytest.mark.parametrize("given", [MultiSimilarityLoss, "multi_similarity", 5])
@pytest.mark.parametrize("wrapper", [lambda loss: CrossBatchMemory(loss, 5), SelfSupervisedLoss])
def test_losses_of_the_wrong_kind(wrapper, given):
    with pytest.raises(TypeError, match=r"loss must be an object such as \w+\(\), got (the class Multi|'multi|5)"):
        wrapper(given)


def test_a_class_in_place_of_a_miner():
    with pytest.raises(TypeError, match=r"miner must be an object, got the class BatchHardMiner: BatchHardMiner\(\)"):
        CrossBatchMemory(MultiSimilarityLoss(), 5, miner=miners.BatchHardMiner)


def test_two_views_must_match():
    with pytest.raises(ValueError, match=r"ref_emb must have the shape of embeddings, \(8, 5\), got \(6, 5\)"):
        SelfSupervisedLoss(MultiSimilarityLoss())(EMBEDDINGS, EMBEDDINGS[:6])
    with pytest.raises(TypeError, match=r"ref_emb must be a torch\.Tensor, got NoneType"):
        SelfSupervisedLoss(MultiSimilarityLoss())(EMBEDDINGS, None)


def by_loops(emb, labels, memory, memory_labels, own):
    """Multi-Similarity of rows against a memory in NumPy, each row's own place left out."""
    unit, others = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (emb.numpy(), memory.numpy()))
    total = 0.0
    for i, row in enumerate(unit):
        pairs = [(row @ other, labels[i] == memory_labels[j]) for j, other in enumerate(others) if j != own[i]]
        total += np.log1p(sum(np.exp(-2 * (s - 0.5)) for s, same in pairs if same)) / 2
        total += np.log1p(sum(np.exp(50 * (s - 0.5)) for s, same in pairs if not same)) / 50
    return total / len(unit)


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner(epsilon=10.0)])
def test_batches_of_one_row_are_not_compared_with_themselves(miner):
    """PML takes the only row for a batch that goes round the end of the queue, and leaves its pair with itself in."""
    memory = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=5, miner=miner)
    seen, classes = torch.empty(0, SIZE), torch.empty(0, dtype=torch.long)
    emb, labels = EMBEDDINGS.double(), CLASSES % 2
    for step in range(7):
        loss = memory(emb[step : step + 1], labels[step : step + 1])
        seen, classes = torch.cat([seen, emb[step : step + 1]])[-5:], torch.cat([classes, labels[step : step + 1]])[-5:]
        expected = by_loops(emb[step : step + 1], labels[step : step + 1], seen, classes, [len(seen) - 1])
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert expected > 0


def test_given_tuples_are_added():
    emb, labels = EMBEDDINGS.double(), CLASSES
    for given in ((torch.tensor([0]), torch.tensor([5]), torch.tensor([6])), (torch.tensor([1]),) * 4):
        for miner in (None, miners.TripletMarginMiner(margin=2.0)):
            ours = CrossBatchMemory(losses.ContrastiveLoss(), SIZE, memory_size=20, miner=miner)
            theirs = losses.CrossBatchMemory(losses.ContrastiveLoss(), SIZE, memory_size=20, miner=miner)
            for tuples in (None, None if len(given) == 4 else given):
                torch.testing.assert_close(ours(emb, labels, tuples), theirs(emb, labels, tuples))


def contents(memory):
    return [x.clone() for x in (memory.embedding_memory, memory.label_memory)] + [
        torch.tensor([memory.queue_idx, memory.has_been_filled, memory.embedding_memory.dtype == torch.float64])
    ]


@pytest.mark.parametrize("filled", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["loss", "miner"])
def test_a_call_that_fails_late_leaves_the_memory(part, dtype, filled, monkeypatch):
    memory = CrossBatchMemory(HybridLoss(4, SIZE), SIZE, memory_size=20, miner=miners.BatchHardMiner())
    for emb, labels in batches(filled):
        memory(emb, labels)
    before = contents(memory)
    monkeypatch.setattr(getattr(memory, part), "forward", mock.Mock(side_effect=RuntimeError("out of memory")))
    for mask in (None, torch.arange(8) < 3):
        with pytest.raises(RuntimeError, match="out of memory"):
            memory(EMBEDDINGS.to(dtype) + 1, CLASSES, enqueue_mask=mask)
        for x, y in zip(contents(memory), before, strict=True):
            assert torch.equal(x, y)


def test_patched_namespace(monkeypatch):
    """Drop-in tests put our classes where PML has its own."""
    for ours in (CrossBatchMemory, SelfSupervisedLoss):
        monkeypatch.setattr(losses, ours.__name__, ours)
    assert "HybridLoss" in CrossBatchMemory.supported_losses()
    assert losses.CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)(EMBEDDINGS, CLASSES) > 0
    assert losses.CrossBatchMemory(HybridLoss(4, SIZE), SIZE)(EMBEDDINGS, CLASSES) > 0
    assert losses.SelfSupervisedLoss(MultiSimilarityLoss())(EMBEDDINGS, EMBEDDINGS.flip(0)) > 0
    assert "EnsembleLoss" in SelfSupervisedLoss.supported_losses()


def with_hooks(loss_func):
    for part in loss_func.modules():
        if isinstance(part, losses.BaseMetricLossFunction):
            part.register_full_backward_hook(lambda *_: None)
            part.register_forward_pre_hook(cloned, with_kwargs=True)
    return loss_func


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20),
        lambda: CrossBatchMemory(HybridLoss(4, SIZE, pair_loss=losses.ContrastiveLoss()), SIZE, memory_size=20),
        lambda: SelfSupervisedLoss(MultiSimilarityLoss(), symmetric=False),
        lambda: SelfSupervisedLoss(EnsembleLoss(losses.ContrastiveLoss(), 5)),
    ],
)
def test_hooks_inside_do_not_change_the_value(make):
    emb = EMBEDDINGS.clone().requires_grad_()
    second = EMBEDDINGS.flip(0) if isinstance(make(), SelfSupervisedLoss) else CLASSES
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    hooked = with_hooks(make())
    for _ in range(2):
        expected = plain(emb, second)
        assert expected > 0
        torch.testing.assert_close(hooked(emb, second), expected)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "make",
    [MultiSimilarityLoss, lambda: HybridLoss(8, 8), lambda: EnsembleLoss(lambda: HybridLoss(8, 4), 2)],
    ids=["pairs", "hybrid", "ensemble"],
)
def test_graphs_of_the_first_batch_are_those_of_all(make):
    """One ahead of the queue, which is not compiled, and one behind it."""
    counts = graphs_of_batches(CrossBatchMemory(make(), 8, memory_size=48), (12, 16, 12, 9, 20))
    assert set(counts) == {2}


def test_indices_tuple_beside_a_mask_without_validation(without_validation):
    memory = CrossBatchMemory(MultiSimilarityLoss(), 8, memory_size=20)
    pairs = (torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="indices_tuple and enqueue_mask are mutually exclusive, got both"):
        memory(torch.eye(8), torch.arange(8) // 2, pairs, torch.ones(8, dtype=torch.bool))
    assert memory.queue_idx == 0


def test_views_of_a_kind_that_has_no_arithmetic():
    loss_func, emb = SelfSupervisedLoss(MultiSimilarityLoss()), torch.eye(4)
    with pytest.raises(TypeError, match="ref_emb must be of float16, bfloat16, float32 or float64, got"):
        loss_func(emb, emb.to(torch.float8_e5m2))
    with pytest.raises(ValueError, match="embeddings must hold numbers, got a tensor on the meta device"):
        loss_func(emb.to("meta"), emb)


class Counting(losses.ContrastiveLoss):
    """Keeps something between batches in a plain attribute, in place and as a new tensor."""

    def __init__(self):
        super().__init__()
        self.seen, self.last = torch.zeros(1), torch.zeros(())

    def compute_loss(self, embeddings, *args):
        self.seen += len(embeddings)
        self.last = embeddings.sum()
        return super().compute_loss(embeddings, *args)


@pytest.mark.parametrize(
    "make", [lambda: HybridLoss(4, SIZE, pair_loss=Counting()), lambda: EnsembleLoss(Counting(), 1)]
)
def test_refused_calls_leave_what_losses_of_others_keep(make):
    loss_func = make().eval()
    counting = next(part for part in loss_func.modules() if isinstance(part, Counting))
    emb, labels = next(batches(1))
    emb.requires_grad_()
    loss_func(emb, labels)
    before = counting.seen.clone(), counting.last
    with (
        mock.patch.object(counting.reducer, "forward", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        loss_func(emb * 2, labels)
    assert torch.equal(counting.seen, before[0]) and before[0] == len(emb)
    assert counting.last is before[1]


def test_indices_without_numbers():
    memory = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=20)
    emb, labels = next(batches(1))
    with pytest.raises(ValueError, match=r"indices_tuple\[0\] must hold numbers, got a tensor on the meta device"):
        memory(emb, labels, (torch.arange(2, device="meta"),) * 3)
    assert memory.queue_idx == 0
