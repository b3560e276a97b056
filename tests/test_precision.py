"""Half rows near zero, and backward under autocast, for every loss."""

import pytest
import torch

from pml_ext.losses import LabelSmoothingCrossEntropyLoss, MultiSimilarityLoss, ProxyAnchorLoss
from pml_ext.precision import narrow, upcast_half
from pml_ext.regularizers import DivergenceRegularizer
from tests.contract.battery import evaluate
from tests.contract.cases import CASES, LABELS, NUM_CLASSES, SIZE, WRAPPED, embeddings, grads_of, make, trained

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ALL = pytest.mark.parametrize("case", (CASES | WRAPPED).values(), ids=CASES | WRAPPED)
PROXIES = {name: case for name, case in (CASES | WRAPPED).items() if "IntraBatch" not in name and trained(make(case))}


def gradients(case, emb, loss_func):
    loss = evaluate(loss_func, emb)
    return [grad for grad in grads_of(loss, emb, *trained(loss_func).values()) if grad is not None]


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [slice(None), slice(0, SIZE // 2)], ids=["rows", "slices"])
def test_gradients_of_rows_near_zero_are_finite(case, dtype, columns):
    for length in (0.0, 1e-38, 1e-20, 1e-13, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        emb = embeddings(torch.float64).detach()
        emb[::3, columns] *= length
        loss_func = make(case).double() if dtype == torch.float64 else make(case)
        grads = gradients(case, emb.to(dtype).requires_grad_(), loss_func)
        assert all(grad.isfinite().all() for grad in grads), length
        assert grads[0].any()


@pytest.mark.parametrize("case", PROXIES.values(), ids=PROXIES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_gradients_of_half_proxies_near_zero_are_finite(case, dtype):
    for length in (0.0, 1e-7, 1e-5, 1e-3):
        loss_func = make(case).to(dtype)
        with torch.no_grad():
            for proxies in trained(loss_func).values():
                proxies[0] *= length
        assert all(grad.isfinite().all() for grad in gradients(case, embeddings(dtype), loss_func))


def test_half_gradient_is_that_of_float32_where_float16_can_hold_it():
    emb = embeddings().detach()
    emb[0] *= 1e-3
    emb = emb.half().requires_grad_()
    wide = emb.detach().float().requires_grad_()
    (actual,) = grads_of(MultiSimilarityLoss()(emb, LABELS), emb)
    (expected,) = grads_of(MultiSimilarityLoss()(wide, LABELS), wide)
    assert expected[0].abs().max() > 10
    torch.testing.assert_close(actual, expected.half())


def test_only_numbers_near_zero_lose_a_gradient_that_overflows():
    x = torch.tensor([0.0, 6e-8, -9e-4, 0.01, 1.0, 0.0], dtype=torch.float16)
    grad = torch.tensor([1e12, -1e6, 7e4, 7e4, -1e6, 6e4])
    expected = torch.tensor([0.0, 0.0, 0.0, torch.inf, -torch.inf, 6e4], dtype=torch.float16)
    assert torch.equal(narrow(grad, x), expected)  # a GradScaler has to see the infinite ones
    assert torch.equal(narrow(grad, x.bfloat16()), grad.bfloat16())
    assert narrow(grad, x.float()) is grad


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_upcast_under_transforms(transform):
    x = torch.tensor([0.0, 2.0], dtype=torch.float16)
    grad = transform(lambda x: (upcast_half(x) * torch.tensor([1e12, 3.0])).sum())(x)
    assert torch.equal(grad, torch.tensor([0.0, 3.0], dtype=torch.float16))


def check_backward_under_autocast(evaluate_with_inputs):
    outside, *inputs = evaluate_with_inputs()
    expected = grads_of(outside, *inputs)
    for forward_too in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_too):
            inside, *inputs = evaluate_with_inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for actual, same in zip(grads_of(inside, *inputs), expected, strict=True):
                assert (actual is None) == (same is None)
                assert actual is None or torch.equal(actual, same)
            assert torch.is_autocast_enabled("cpu")
            assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16


@ALL
def test_backward_under_autocast(case):
    def run():
        emb, loss_func = embeddings(), make(case)
        return evaluate(loss_func, emb), emb, *trained(loss_func).values()

    check_backward_under_autocast(run)


@pytest.mark.parametrize(
    "value",
    [
        lambda emb: LabelSmoothingCrossEntropyLoss(NUM_CLASSES, SIZE).get_logits(emb).square().sum(),
        lambda emb: ProxyAnchorLoss(NUM_CLASSES, SIZE).get_logits(emb).square().sum(),
        lambda emb: DivergenceRegularizer(num_learners=3, margin=4.0)(emb),
        lambda emb: MultiSimilarityLoss()(emb, LABELS, ref_emb=emb.flip(0), ref_labels=LABELS.flip(0)),
        lambda emb: make(CASES["EnsembleLoss of HybridLoss"])(emb.tanh(), LABELS),
    ],
    ids=["logits", "proxies' logits", "regularizer", "references", "after a network"],
)
def test_backward_under_autocast_elsewhere(value):
    def run():
        torch.manual_seed(0)
        emb = embeddings()
        return value(emb), emb

    check_backward_under_autocast(run)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_transforms_under_autocast(transform):
    loss_func, emb = MultiSimilarityLoss(), embeddings().detach()
    expected = transform(lambda x: loss_func(x, LABELS))(emb)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(lambda x: loss_func(x, LABELS))(emb), expected)


def test_the_network_ahead_keeps_its_autocast():
    linear, emb = torch.nn.Linear(SIZE, SIZE), embeddings().detach()
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(emb)
        out.grad_fn.register_prehook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        MultiSimilarityLoss()(out, LABELS).backward()
    assert seen == [True]
    assert linear.weight.grad.any()
