"""The validator at the border of every loss."""

from collections import Counter
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from pytorch_metric_learning import trainers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

import pml_ext
from pml_ext.losses import (
    AdaptiveAdditiveMarginLoss,
    CrossBatchMemory,
    EnsembleLoss,
    HybridLoss,
    IntraBatchLoss,
    LabelSmoothingCrossEntropyLoss,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
)
from pml_ext.validation import check_batch
from tests.contract.cases import CASES, embeddings
from tests.contract.cases import LABELS as CASE_LABELS
from tests.contract.cases import make as make_loss

EMB = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4).repeat(2)
BAD_EMB = {value: EMB.index_fill(0, torch.tensor([3]), float(value)) for value in ("nan", "inf", "-inf")}
LOSSES = [
    pytest.param(lambda: MultiSimilarityLoss(), id="MultiSimilarityLoss"),
    pytest.param(lambda: ProxyAnchorLoss(4, 6), id="ProxyAnchorLoss"),
    pytest.param(lambda: HybridLoss(4, 6), id="HybridLoss"),
]


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((EMB, LABELS.float()), TypeError, r"labels must have an integer dtype, got torch\.float32"),
        ((EMB, LABELS.float() / 0), TypeError, r"labels must have an integer dtype, got torch\.float32"),
        ((EMB, LABELS > 1), TypeError, r"labels must have an integer dtype, got torch\.bool"),
        ((EMB, LABELS.tolist()), TypeError, r"labels must be a torch\.Tensor, got list: torch\.as_tensor\(labels\)$"),
        ((EMB, LABELS.numpy()), TypeError, r"labels must .*, got ndarray: torch\.as_tensor\(labels\)$"),
        ((EMB, list("aabb")), TypeError, r"labels must .*, got list: number the classes, all .*np\.unique\(all_labels"),
        ((EMB, [0.5, 1.0]), TypeError, r"labels must be a torch\.Tensor, got list$"),
        ((EMB, [EMB.clone().requires_grad_()]), TypeError, r"labels must be a torch\.Tensor, got list$"),
        ((EMB, LABELS - 1), ValueError, "labels must be >= 0, got -1 at position 0"),
        ((EMB, LABELS.masked_fill(LABELS == 2, -100)), ValueError, "labels must be >= 0, got -100 at position 2"),
        ((EMB, LABELS[:5]), ValueError, r"labels must have shape \(batch_size,\) = \(8,\), got \(5,\)"),
        ((EMB, LABELS[:, None]), ValueError, r"labels must have shape .* = \(8,\), got \(8, 1\): labels.squeeze\(1\)$"),
        ((EMB, torch.eye(4).long()[LABELS]), ValueError, r"got \(8, 4\): of one-hot labels, labels.argmax\(1\)$"),
        ((EMB, LABELS[:6, None]), ValueError, r"labels must have shape .* = \(8,\), got \(6, 1\)$"),
        (
            (LABELS, EMB),
            TypeError,
            r"embeddings must come before labels, got integers of shape \(\d+,\) first: loss_func",
        ),
        ((EMB.long(), LABELS), TypeError, r"embeddings must have a floating point dtype, got torch\.int64"),
        ((EMB.numpy(), LABELS), TypeError, r"embeddings must be a torch\.Tensor, got ndarray"),
        (
            (EMB[:, None], LABELS),
            ValueError,
            r"embeddings must have shape .*got \(8, 1, 6\): pool or flatten feature maps",
        ),
        ((EMB.to(torch.float8_e5m2), LABELS), TypeError, r"embeddings must be of float16, .*, got torch\.float8_e5m2"),
        ((EMB.to_sparse(), LABELS), TypeError, r"embeddings must be a dense tensor, got torch\.sparse_coo"),
        (
            (torch.nested.nested_tensor([*EMB], layout=torch.jagged), LABELS),
            TypeError,
            "embeddings must be a dense tensor, got a n",
        ),
        ((EMB[:, :0], LABELS), ValueError, r"embeddings must have shape .*got \(8, 0\)"),
        ((EMB, LABELS.to_sparse()), TypeError, r"labels must be a dense tensor, got torch\.sparse_coo"),
        ((EMB, LABELS, (LABELS.to_sparse(),) * 3), TypeError, r"indices_tuple\[0\] must be a dense tensor"),
        ((EMB.to("meta"), LABELS), ValueError, "embeddings must hold numbers, got a tensor on the meta device"),
        ((EMB, LABELS.to("meta")), ValueError, "labels must hold numbers, got a tensor on the meta device"),
        ((EMB, LABELS, (LABELS.to("meta"),) * 3), ValueError, r"indices_tuple\[0\] must hold numbers"),
        ((EMB, LABELS, None, EMB.to(torch.float8_e5m2), LABELS), TypeError, "ref_emb must be of float16"),
        ((EMB[0], LABELS), ValueError, r"embeddings must have shape .*got \(6,\)$"),
        ((BAD_EMB["nan"], LABELS), ValueError, "embeddings must be finite, got nan in row 3, column 0"),
        ((BAD_EMB["inf"], LABELS), ValueError, "embeddings must be finite, got inf in row 3, column 0"),
        ((BAD_EMB["-inf"].half(), LABELS), ValueError, "embeddings must be finite, got -inf in row 3, column 0"),
        (
            (EMB, LABELS, (LABELS, LABELS)),
            ValueError,
            "indices_tuple must be a tuple of 3 or 4 tensors, got 2 elements",
        ),
        (
            (EMB, LABELS, (LABELS, LABELS, LABELS - 1)),
            ValueError,
            r"indices_tuple\[2\] must be >= 0, got -1 at position 0",
        ),
        ((EMB, LABELS, (LABELS + 5,) * 3), ValueError, r"indices_tuple\[0\] must be < the number of rows = 8, got 8"),
        ((EMB, LABELS, (LABELS, LABELS, LABELS[:3])), ValueError, "must pair tensors of one length"),
        ((EMB, LABELS, (LABELS.float(),) * 3), TypeError, r"indices_tuple\[0\] must have an integer dtype"),
        ((EMB, LABELS, None, None, LABELS), ValueError, "ref_labels must come with ref_emb"),
        ((EMB, LABELS, None, EMB + 1), ValueError, "ref_labels must come with ref_emb where labels are used, got None"),
        ((EMB, LABELS, None, EMB[:, :4], LABELS), ValueError, r"ref_emb must have shape .* = \(8, 6\), got \(8, 4\)"),
        ((EMB, LABELS, None, BAD_EMB["nan"], LABELS), ValueError, "ref_emb must be finite, got nan in row 3"),
        (
            (EMB, LABELS, (LABELS, LABELS + 3, LABELS), EMB[:5] + 1, LABELS[:5]),
            ValueError,
            r"\[1\] must be < .* = 5, got 5",
        ),
        ((EMB, LABELS, None, EMB, LABELS - 1), ValueError, "ref_labels must be >= 0, got -1 at position 0"),
        ((EMB, LABELS, None, EMB + 1, LABELS - 1), ValueError, "ref_labels must be >= 0, got -1 at position 0"),
    ],
)
def test_bad_input(make, args, error, message, device):
    args = [x.to(device) if isinstance(x, torch.Tensor) and not x.is_meta else x for x in args]
    with pytest.raises(error, match=message):
        make()(*args)


def test_ref_emb_of_another_device():
    """Of a device that is always there."""
    advice = r"must be on the device of embeddings, cpu, got meta: ref_emb\.to\(embeddings\.device\)$"
    with pytest.raises(ValueError, match=f"ref_emb {advice}"):
        MultiSimilarityLoss()(EMB, LABELS, ref_emb=EMB.to("meta"), ref_labels=LABELS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shapes_in_every_loss(case):
    """Each loss refuses them at the border, whatever its own code would do."""
    emb, labels = embeddings().detach(), CASE_LABELS
    with pytest.raises(ValueError, match=r"embeddings must have shape .*, got \(12, 6, 2, 2\): pool or flatten"):
        make_loss(case)(emb[:, :, None, None].expand(-1, -1, 2, 2), labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(batch_size,\) = \(12,\), got \(11,\)$"):
        make_loss(case)(emb, labels[1:])
    with pytest.raises(ValueError, match=r"ref_emb must have shape .* = \(12, 6\), got \(12, 5\)$"):
        make_loss(case)(emb, labels, ref_emb=emb[:, 1:], ref_labels=labels)


@pytest.mark.parametrize("make", LOSSES[1:])
def test_labels_and_width_against_the_proxies(make):
    if type(make()) is HybridLoss:
        with pytest.raises(ValueError, match="ref_labels must be < num_classes = 4, got 9 at position 0"):
            make()(EMB, LABELS, None, EMB + 1, LABELS + 9)
    with pytest.raises(ValueError, match="labels must be < num_classes = 4, got 4 at position 3"):
        make()(EMB, LABELS.masked_fill(LABELS == 3, 4))
    with pytest.raises(ValueError, match=r"embeddings must have shape .* = \(8, 6\), got \(8, 5\)"):
        make()(EMB[:, :5], LABELS)


WITH_CLASSES = {
    "ProxyAnchorLoss": lambda: ProxyAnchorLoss(4, 6),
    "HybridLoss": lambda: HybridLoss(4, 6),
    "AdaptiveAdditiveMarginLoss": lambda: AdaptiveAdditiveMarginLoss(4, 6, class_embeddings=torch.randn(4, 3)),
    "LabelSmoothingCrossEntropyLoss": lambda: LabelSmoothingCrossEntropyLoss(4, 6),
    "IntraBatchLoss": lambda: IntraBatchLoss(4, 6),
    "EnsembleLoss": lambda: EnsembleLoss(lambda: ProxyAnchorLoss(4, 3), 2),
    "CrossBatchMemory": lambda: CrossBatchMemory(HybridLoss(4, 6), 6),
}


@pytest.mark.parametrize("make", WITH_CLASSES.values(), ids=WITH_CLASSES)
def test_class_numbers_that_do_not_fit_the_proxies(make):
    """The message tells the range, and its advice works."""
    all_labels = torch.tensor([103, 100, 180, 190] * 2)
    with pytest.raises(ValueError, match=r"labels must be < num_classes = 4, got 103 at .* 100 to 190\)") as caught:
        make()(EMB, all_labels)
    with pytest.raises(ValueError, match=r"got 7 at position 3 \(this batch: 0 to 7\): number the classes from 0"):
        make()(EMB, torch.tensor([0, 1, 2, 7] * 2))
    scope = {"torch": torch, "all_labels": all_labels}
    (advice,) = [part.split(";")[0] for part in str(caught.value).split(": ") if part.startswith("labels = ")]
    exec(advice, scope)
    assert make()(EMB, scope["labels"]) > 0


def test_gaps_are_allowed_without_proxies():
    """And so nothing is said about them."""
    loss_func, gaps = MultiSimilarityLoss(), torch.tensor([103, 100, 180, 190] * 2)
    assert loss_func(EMB, gaps) == loss_func(EMB, LABELS)
    with pytest.raises(ValueError, match=r"labels must be >= 0, got -1 at position 0 \(this batch: -1 to 2\)$"):
        loss_func(EMB, LABELS - 1)
    with pytest.raises(ValueError, match=r"labels must be >= 0, got -1 at .*: number the classes from 0 without gaps"):
        ProxyAnchorLoss(4, 6)(EMB, LABELS - 1)


def test_trainers_of_pml_number_the_classes():
    """The other half of the advice."""
    data = torch.utils.data.TensorDataset(EMB, LABELS * 10 + 100)
    trunk, loss_func = torch.nn.Linear(6, 6), ProxyAnchorLoss(4, 6)
    optimizers = {
        "trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1),
        "metric_loss_optimizer": torch.optim.SGD(loss_func.parameters(), lr=0.1),
    }
    args = {"trunk": trunk}, optimizers, 8, {"metric_loss": loss_func}, data
    kwargs = {"dataloader_num_workers": 0, "data_device": torch.device("cpu")}
    with pytest.raises(ValueError, match="in PML's trainers set_min_label_to_zero=True, dataset_labels=all_labels"):
        trainers.MetricLossOnly(*args, **kwargs).train()
    before = loss_func.proxies.detach().clone()
    numbered = {"set_min_label_to_zero": True, "dataset_labels": data.tensors[1].numpy()}
    trainers.MetricLossOnly(*args, **kwargs, **numbered).train()
    assert not torch.equal(loss_func.proxies, before)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
def test_integer_labels_of_any_dtype(make, dtype):
    loss_func = make()
    assert loss_func(EMB, LABELS.to(dtype)) == loss_func(EMB, LABELS)


def test_only_rows_whose_norm_overflows_are_refused():
    """Their normalized embedding would be 0, and their gradient too."""
    check_batch(torch.full((2000, 4), 9e18), torch.arange(2000))  # the norm of all rows together overflows
    check_batch(torch.full((4, 40), 6e4, dtype=torch.float16), torch.arange(4))
    with pytest.raises(
        ValueError, match=r"embeddings must have finite norms, got an overflow of torch\.float32 in row 1"
    ):
        check_batch(torch.tensor([[1.0, 1.0], [3e19, 3e19]]), torch.arange(2))


def test_switch(without_validation):
    """Without the checks a label out of range is PyTorch's own error, and NaN comes through."""
    assert MultiSimilarityLoss()(BAD_EMB["nan"], LABELS).isnan()
    with pytest.raises((IndexError, RuntimeError)):
        ProxyAnchorLoss(4, 6)(EMB, LABELS + 1)
    pml_ext.set_validation(True)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        MultiSimilarityLoss()(BAD_EMB["nan"], LABELS)
    with pytest.raises(TypeError, match="enabled must be a bool, got 1"):
        pml_ext.set_validation(1)


@pytest.mark.parametrize("make", LOSSES)
def test_lengths_are_checked_even_without_validation(make, without_validation):
    with pytest.raises(ValueError, match=r"labels must have shape \(batch_size,\)"):
        make()(EMB, LABELS[:5])
    with pytest.raises(ValueError, match=r"labels must have shape \(batch_size,\)"):
        make()(EMB, LABELS[:5], ref_emb=EMB[:5] + 1, ref_labels=LABELS[:5])
    if make().takes_refs:
        with pytest.raises(ValueError, match=r"^ref_labels must have shape \(batch_size,\) = \(5,\)"):
            make()(EMB, LABELS, ref_emb=EMB[:5] + 1, ref_labels=LABELS[:4])


@pytest.mark.compiles
def test_lengths_are_checked_when_compiled():
    compiled = torch.compile(MultiSimilarityLoss(), backend="eager")
    with pytest.raises(Exception, match=r"labels must have shape \(batch_size,\)"):
        compiled(EMB, LABELS[:5])


def test_a_child_is_not_checked_again(monkeypatch):
    calls = []
    monkeypatch.setattr("pml_ext.losses.base_loss.check_batch", lambda *args: calls.append(args))
    HybridLoss(4, 6)(EMB, LABELS)
    assert len(calls) == 1
    MultiSimilarityLoss()(EMB, LABELS)  # outside, checks are on again
    assert len(calls) == 2


def test_checks_are_on_again_after_an_error_in_a_child():
    loss_func = HybridLoss(4, 6)
    both = tuple(torch.tensor([i]) for i in (0, 1, 0, 1))
    with pytest.raises(ValueError, match="as both"):
        loss_func(EMB, LABELS, both)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        loss_func(BAD_EMB["nan"], LABELS)


class CountOperators(TorchDispatchMode):
    """Count the operators that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_value_of_one_tensor_is_read(monkeypatch):
    """On a device each such reading is a synchronization; it needs none to be counted."""
    monkeypatch.setattr("pml_ext.validation._plain", lambda x: x)  # a CPU reads numbers, for it waits for nothing
    args = EMB, LABELS, (LABELS, LABELS, LABELS), EMB + 1, LABELS + 0, 4
    with CountOperators() as mode:
        check_batch(*args)
    assert mode.calls["_local_scalar_dense"] == 1
    assert not {"nonzero", "masked_select", "_unique2", "unique_dim", "equal"} & set(mode.calls)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("labels_device", ["cpu", "cuda"])
def test_one_synchronization_on_cuda(labels_device):
    emb, labels = EMB.cuda(), LABELS.to(labels_device)
    args = emb, labels, (labels, labels, labels), emb + 1, labels + 0, 4
    check_batch(*args)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            check_batch(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1


def test_checks_are_cheap(without_validation):
    """Under 5% of HybridLoss's forward and backward at 128 x 512; measured apart, the difference being noise."""
    emb, labels = torch.randn(128, 512, requires_grad=True), torch.arange(128) // 4
    loss_func = HybridLoss(100, 512)
    scope = {"f": loss_func, "emb": emb, "labels": labels, "check": check_batch}
    whole, check = [], []
    for _ in range(5):  # alternating
        whole.append(Timer("f(emb, labels).backward()", globals=scope).timeit(30).mean)
        check.append(Timer("check(emb, labels, None, None, None, 100, 512)", globals=scope).timeit(100).mean)
    assert min(check) < 0.05 * min(whole)


@pytest.mark.parametrize(
    "number",
    [Fraction(2), Decimal(2), torch.tensor(2.0, device="meta"), torch.tensor(2.0).to(torch.float8_e5m2), "2", True, 2j],
    ids=repr,
)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("alpha", lambda x: MultiSimilarityLoss(alpha=x)),
        ("margin", lambda x: ProxyAnchorLoss(4, 6, margin=x)),
        ("scale", lambda x: AdaptiveAdditiveMarginLoss(4, 6, scale=x)),
        ("temperature", lambda x: LabelSmoothingCrossEntropyLoss(4, 6, temperature=x)),
        ("pair_weight", lambda x: HybridLoss(4, 6, pair_weight=x)),
        ("divergence_weight", lambda x: EnsembleLoss(MultiSimilarityLoss(), 2, divergence_weight=x)),
    ],
)
def test_settings_that_are_no_number_to_compute_with(make, name, number):
    with pytest.raises(TypeError, match=f"{name} must be a number or a tensor of one number, got"):
        make(number)
