import numpy as np
import pytest
import torch

from pml_ext.streaming import proxy_anchor_loss
from tests.largest_tensor import LargestTensor

BATCHES = {
    "random": (23, [3, 22, 7, 7, 0, 19, 5, 5, 5, 11]),
    "absent classes": (50, [49, 49, 1, 1]),
    "single class": (9, [4] * 6),
    "one sample": (5, [2]),
    "every class": (6, [5, 4, 3, 2, 1, 0]),
    "one class in all": (1, [0, 0, 0]),
}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def problem(request):
    """Return embeddings, proxies, labels and sample shifts, float64."""
    num_classes, labels = request.param
    rng = torch.Generator().manual_seed(3)
    emb, proxies = (torch.randn(n, 7, generator=rng, dtype=torch.float64) for n in (len(labels), num_classes))
    shift = torch.rand(len(labels), generator=rng, dtype=torch.float64) - 1
    return emb, proxies, torch.tensor(labels), shift


def reference(emb, proxies, labels, alpha, margin, shift=None, normalize=True):
    """Value of each class and gradients of all, in numpy: $P_c$, $N_c$ and a function of the gradients by them."""
    x, w, y = emb.double().numpy(), proxies.double().numpy(), labels.numpy()
    b = np.zeros(len(x)) if shift is None else shift.double().numpy()
    x_norm, w_norm = (np.linalg.norm(a, axis=1, keepdims=True) if normalize else 1.0 for a in (x, w))
    xu, wu = x / x_norm, w / w_norm
    s = xu @ wu.T
    own = y[:, None] == np.arange(len(w))
    pos = np.exp(-alpha * (s - margin) + b[:, None]) * own
    neg = np.exp(alpha * (s + margin) + b[:, None]) * ~own

    def gradients(by_pos, by_neg):
        by_s = alpha * (by_neg * neg / (1 + neg.sum(0)) - by_pos * pos / (1 + pos.sum(0)))
        by_x, by_w = by_s @ wu, by_s.T @ xu
        if normalize:
            by_x = (by_x - (by_x * xu).sum(1, keepdims=True) * xu) / x_norm
            by_w = (by_w - (by_w * wu).sum(1, keepdims=True) * wu) / w_norm
        return by_x, by_w

    return np.log1p(pos.sum(0)), np.log1p(neg.sum(0)), gradients


def distance(actual, expected):
    """Return the difference relative to the expected norm."""
    return np.linalg.norm(actual.detach().double().cpu().numpy() - expected) / np.linalg.norm(expected)


def leaf(x, *args):
    return x.clone().to(*args).requires_grad_()


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_reduced_matches_reference(problem, chunk_size, normalize, with_shift, dtype, tol, device):
    emb, proxies, labels, shift = problem
    emb, proxies = emb.to(dtype), proxies.to(dtype)
    shift = shift.to(dtype) if with_shift else None
    alpha = 6.0 if normalize else 0.5
    pos, neg, gradients = reference(emb, proxies, labels, alpha, 0.1, shift, normalize)
    emb, proxies = leaf(emb, device), leaf(proxies, device)
    shift = None if shift is None else shift.to(device)
    actual = proxy_anchor_loss(emb, proxies, labels.to(device), alpha, 0.1, shift, normalize, False, chunk_size)
    present = len(set(labels.tolist()))
    assert actual[0].item() == pytest.approx(pos.sum() / present, rel=tol)
    assert actual[1].item() == pytest.approx(neg.mean(), rel=tol)
    sum(actual).backward()
    for x, expected in zip((emb, proxies), gradients(1 / present, 1 / len(proxies)), strict=True):
        assert np.abs(expected).max() > 1e-3
        assert distance(x.grad, expected) < tol


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_per_class_matches_reference(problem, chunk_size, normalize, device):
    """Each class with an upstream gradient of its own, zeros among them."""
    emb, proxies, labels, shift = problem
    pos, neg, gradients = reference(emb, proxies, labels, 3.0, 0.2, shift, normalize)
    by_pos, by_neg = torch.randn(2, len(proxies), dtype=torch.float64)
    by_neg[0] = 0
    emb, proxies = leaf(emb, device), leaf(proxies, device)
    actual = proxy_anchor_loss(
        emb, proxies, labels.to(device), 3.0, 0.2, shift.to(device), normalize, per_class=True, chunk_size=chunk_size
    )
    for a, expected in zip(actual, (pos, neg), strict=True):
        np.testing.assert_allclose(a.detach().cpu().numpy(), expected, rtol=1e-12, atol=1e-15)
    torch.autograd.backward(actual, [by_pos.to(device), by_neg.to(device)])
    for x, expected in zip((emb, proxies), gradients(by_pos.numpy(), by_neg.numpy()), strict=True):
        np.testing.assert_allclose(x.grad.cpu().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.3), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_any_upstream_gradient(problem, weights):
    """One number for both parts scales what the forward walk found; two numbers take another walk."""
    emb, proxies, labels, _ = problem
    _, _, gradients = reference(emb, proxies, labels, 4.0, 0.1)
    emb, proxies = leaf(emb), leaf(proxies)
    pos, neg = proxy_anchor_loss(emb, proxies, labels, 4.0, chunk_size=3)
    (weights[0] * pos + weights[1] * neg).backward()
    expected = gradients(weights[0] / len(labels.unique()), weights[1] / len(proxies))
    for x, e in zip((emb, proxies), expected, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part", [0, 1])
def test_one_part_alone(problem, part):
    emb, proxies, labels, _ = problem
    *_, gradients = reference(emb, proxies, labels, 4.0, 0.1)
    expected = gradients(1 / len(labels.unique()), 0) if part == 0 else gradients(0, 1 / len(proxies))
    emb, proxies = leaf(emb), leaf(proxies)
    proxy_anchor_loss(emb, proxies, labels, 4.0)[part].backward()
    for x, e in zip((emb, proxies), expected, strict=True):
        np.testing.assert_allclose(x.grad.numpy(), e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
def test_gradcheck(problem, per_class):
    emb, proxies, labels, shift = problem

    def parts(emb, proxies):
        return proxy_anchor_loss(
            emb, proxies, labels, 4.0, 0.1, shift, per_class=per_class, chunk_size=max(2, len(proxies) // 4)
        )

    assert torch.autograd.gradcheck(parts, (leaf(emb), leaf(proxies)), fast_mode=len(proxies) > 25)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_what_requires_grad(problem, needed, monkeypatch):
    """And nothing else is computed."""
    emb, proxies, labels, _ = problem
    *_, gradients = reference(emb, proxies, labels, 4.0, 0.1)
    expected = gradients(1 / len(labels.unique()), 1 / len(proxies))[needed]
    inputs = [emb.clone(), proxies.clone()]
    inputs[needed].requires_grad_()
    if needed == 0:
        monkeypatch.setattr("pml_ext.streaming.proxy_anchor.write_gradient", None)
    sum(proxy_anchor_loss(*inputs, labels, 4.0)).backward()
    np.testing.assert_allclose(inputs[needed].grad.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert inputs[1 - needed].grad is None


def test_no_grad_computes_no_gradient(problem, monkeypatch):
    emb, proxies, labels, _ = problem
    expected = proxy_anchor_loss(emb, proxies, labels)
    monkeypatch.setattr("pml_ext.streaming.proxy_anchor.write_gradient", None)
    with torch.no_grad():
        actual = proxy_anchor_loss(leaf(emb), leaf(proxies), labels)
    assert not any(a.requires_grad for a in actual)
    torch.testing.assert_close(actual, expected)


def test_backward_twice_through_one_graph(problem):
    """The first one hands its gradients over; a second walk finds the same, bit for bit."""
    emb, proxies, labels, _ = problem
    emb, proxies = leaf(emb, torch.float32), leaf(proxies, torch.float32)
    value = sum(proxy_anchor_loss(emb, proxies, labels))
    first = torch.autograd.grad(0.7 * value, (emb, proxies), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # they are the caller's
    second = torch.autograd.grad(0.7 * value, (emb, proxies))
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))


@pytest.mark.parametrize("per_class", [False, True])
def test_second_derivatives_raise(problem, per_class):
    """Also where the upstream gradient is a constant: there, precomputed gradients would look like constants."""
    emb, proxies, labels, _ = problem
    emb = leaf(emb)
    value = sum(part.sum() for part in proxy_anchor_loss(emb, proxies, labels, per_class=per_class))
    (grad,) = torch.autograd.grad(value, emb, create_graph=True)
    assert grad.any()
    with pytest.raises(NotImplementedError, match="Proxy-Anchor is streamed and has no second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("alpha", [32.0, 5000.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_no_overflow(problem, alpha, normalize, device):
    """Nor is a tiny exponential lost in the sum with 1."""
    emb, proxies, labels, _ = (x.to(device) for x in problem)
    emb, proxies = leaf(emb.float()), leaf(proxies.float())
    value = sum(proxy_anchor_loss(emb, proxies, labels, alpha, normalize=normalize))
    value.backward()
    assert value.isfinite() and value > 0
    assert emb.grad.isfinite().all() and proxies.grad.isfinite().all()


def test_small_values_are_exact(device):
    """log(1 + exp(-60)) is exp(-60), not 0."""
    emb, proxies = torch.tensor([[1.0, 0.0]], device=device), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    pos, neg = proxy_anchor_loss(emb, proxies, torch.tensor([0], device=device), 60.0, 0.0)
    assert pos.item() == pytest.approx(np.exp(-60), rel=1e-4)
    assert neg.item() == pytest.approx(np.exp(-60) / 2, rel=1e-4)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(problem, half, device):
    """The value of the same numbers in float32; each gradient in its input's dtype."""
    emb, proxies, labels, _ = (x.to(device) for x in problem)
    expected = [leaf(x.to(half), torch.float32) for x in (emb, proxies)]
    sum(proxy_anchor_loss(*expected, labels, chunk_size=4)).backward()
    for emb_dtype, proxy_dtype in ((half, torch.float32), (torch.float32, half), (half, half)):
        inputs = [leaf(x.to(half), d) for x, d in zip((emb, proxies), (emb_dtype, proxy_dtype), strict=True)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = sum(proxy_anchor_loss(*inputs, labels, chunk_size=4))
            value.backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, sum(proxy_anchor_loss(*expected, labels)))
        for x, e in zip(inputs, expected, strict=True):
            torch.testing.assert_close(x.grad, e.grad.to(x.dtype), rtol=1e-2, atol=1e-3)


def test_half_proxies_with_scaled_loss():
    """A gradient below float16's range is scaled up first, as GradScaler expects, and rounded then."""
    emb, proxies = torch.randn(4, 8), (30 * torch.randn(60_000, 8)).half()
    labels, grads = torch.arange(4), []
    for dtype in (torch.float16, torch.float32):
        w = leaf(proxies, dtype)
        (2.0**16 * sum(proxy_anchor_loss(emb, w, labels, 2.0))).backward()
        grads.append(w.grad.float())
    assert (grads[1].abs() / 2.0**16).median() < 6e-8  # most would be lost
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


def test_shift_has_no_gradient(problem):
    emb, proxies, labels, shift = problem
    with pytest.raises(ValueError, match="sample_shift must not require a gradient"):
        proxy_anchor_loss(emb, proxies, labels, sample_shift=shift.requires_grad_())


def test_inputs_are_not_changed(problem):
    emb, proxies, labels, shift = problem
    copies = [x.clone() for x in problem]
    sum(proxy_anchor_loss(leaf(emb), proxies.requires_grad_(), labels, 32.0, 0.1, shift, normalize=False)).backward()
    assert all(torch.equal(a, b) for a, b in zip((emb, proxies, labels, shift), copies, strict=True))


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "1"])
def test_bad_chunk_size(problem, chunk_size):
    emb, proxies, labels, _ = problem
    with pytest.raises(ValueError, match=rf"chunk_size must be None or an integer >= 1, got {chunk_size!r}"):
        proxy_anchor_loss(emb, proxies, labels, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 20_000])
def test_memory_does_not_grow_with_batch_times_classes(chunk_size):
    """No tensor comes near a matrix of batch times classes, forward or backward; unless one chunk holds all."""
    emb, proxies = torch.randn(64, 4, requires_grad=True), torch.randn(20_000, 4, requires_grad=True)
    with LargestTensor() as largest:
        sum(proxy_anchor_loss(emb, proxies, torch.arange(64), chunk_size=chunk_size)).backward()
    assert (largest.numel < 64 * 20_000 / 4) == (chunk_size is None)


def test_dependence_on_the_upstream_gradient_is_not_lost(problem):
    """A learned weight of the loss: a gradient by it through the gradient would silently miss a part."""
    emb, proxies, labels, _ = problem
    for per_class in (False, True):
        weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        emb = leaf(emb)
        value = sum(part.sum() for part in proxy_anchor_loss(emb, proxies, labels, 4.0, per_class=per_class))
        (grad,) = torch.autograd.grad(weight * value, emb, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            torch.autograd.grad(grad.square().sum() + weight**2, weight)


def test_second_derivatives_by_proxies_raise(problem):
    emb, proxies, labels, _ = problem
    proxies = leaf(proxies)
    (grad,) = torch.autograd.grad(sum(proxy_anchor_loss(emb, proxies, labels)), proxies, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.square().sum().backward()


def test_large_shifts_do_not_overflow(problem):
    emb, proxies, labels, _ = problem
    shift = torch.full((len(labels),), 100.0)
    pos, neg, _ = reference(emb, proxies, labels, 6.0, 0.1, shift)
    actual = proxy_anchor_loss(emb.float(), proxies.float(), labels, 6.0, 0.1, shift)
    assert actual[0].item() == pytest.approx(pos.sum() / len(labels.unique()), rel=1e-6)
    assert actual[1].item() == pytest.approx(neg.mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("shift", "error", "message"),
    [
        (torch.zeros(8, 1), ValueError, r"sample_shift must have shape \(batch_size,\) = \(8,\) on cpu, got \(8, 1\)"),
        (torch.zeros(()), ValueError, r"sample_shift must have shape .* got \(\) on cpu"),
        (torch.zeros(8, device="meta"), ValueError, "sample_shift must have shape .* on meta"),
        (torch.full((8,), torch.nan), ValueError, "sample_shift must be finite or -inf, got NaN or inf"),
        (torch.full((8,), torch.inf), ValueError, "sample_shift must be finite or -inf, got NaN or inf"),
        (
            torch.zeros(8, dtype=torch.long),
            TypeError,
            r"sample_shift must be a floating point tensor, got torch\.int64",
        ),
        ([0.0] * 8, TypeError, "sample_shift must be a floating point tensor, got list"),
    ],
)
def test_bad_shifts(shift, error, message):
    emb, proxies, labels = torch.eye(8), torch.eye(8)[:4], torch.arange(8) % 4
    with pytest.raises(error, match=message):
        proxy_anchor_loss(emb, proxies, labels, sample_shift=shift)


def test_a_shift_of_minus_infinity_leaves_samples_out():
    emb, proxies, labels = torch.eye(8) + 0.1, torch.eye(8)[:4], torch.arange(8) % 4
    shift = torch.zeros(8).index_fill(0, torch.tensor([6, 7]), -torch.inf)
    left = proxy_anchor_loss(emb[:6], proxies, labels[:6])
    torch.testing.assert_close(proxy_anchor_loss(emb, proxies, labels, sample_shift=shift), left)
