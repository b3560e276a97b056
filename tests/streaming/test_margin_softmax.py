import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pml_ext.streaming import ClassMargins, margin_softmax_loss
from tests.largest_tensor import LargestTensor
from tests.streaming.test_proxy_anchor import BATCHES, distance, leaf, problem  # noqa: F401 (a fixture)


def margins_of(kind, num_classes):
    """Return margins between classes, some of which are not described, and their matrix by loops."""
    rng = torch.Generator().manual_seed(5)
    described = torch.arange(num_classes) % 5 != 3
    rows = torch.randn(num_classes, 4, generator=rng, dtype=torch.float64) * described[:, None]
    table = torch.rand(num_classes, num_classes, generator=rng, dtype=torch.float64) if kind == "table" else rows
    margins = ClassMargins(table, described, kind, constant=0.2, slope=-0.3)
    matrix = np.zeros((num_classes, num_classes))
    for y in range(num_classes):
        for j in range(num_classes):
            square = ((rows[y] - rows[j]) ** 2).sum().item()
            d = {"squared": square, "euclidean": square**0.5, "table": table[y, j].item() if kind == "table" else 0}
            if described[y] and described[j] and y != j:
                matrix[y, j] = 0.2 - 0.3 * d[kind]
    return margins, matrix


def reference(emb, proxies, labels, scale, margin, matrix, normalize=True):
    """Losses of all samples and a function of the gradient by them, in numpy."""
    x, w, y = emb.double().numpy(), proxies.double().numpy(), labels.numpy()
    x_norm, w_norm = (np.linalg.norm(a, axis=1, keepdims=True) if normalize else 1.0 for a in (x, w))
    xu, wu = x / x_norm, w / w_norm
    own = y[:, None] == np.arange(len(w))
    logits = scale * (xu @ wu.T + (margin + matrix[y]) * ~own)
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    p = shifted / shifted.sum(1, keepdims=True)

    def gradients(upstream):
        by_c = scale * upstream[:, None] * (p - own)
        by_x, by_w = by_c @ wu, by_c.T @ xu
        if normalize:
            by_x = (by_x - (by_x * xu).sum(1, keepdims=True) * xu) / x_norm
            by_w = (by_w - (by_w * wu).sum(1, keepdims=True) * wu) / w_norm
        return by_x, by_w

    return -np.log(p[own]), gradients


@pytest.fixture(params=["none", "squared", "euclidean", "table"])
def kind(request):
    return request.param


def both_margins(kind, num_classes):
    if kind == "none":
        return None, np.zeros((num_classes, num_classes))
    return margins_of(kind, num_classes)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_matches_reference(problem, kind, chunk_size, normalize, dtype, tol, device):  # noqa: F811
    emb, proxies, labels, _ = problem
    emb, proxies = emb.to(dtype), proxies.to(dtype)
    margins, matrix = both_margins(kind, len(proxies))
    scale = 6.0 if normalize else 0.5
    losses, gradients = reference(emb, proxies, labels, scale, 0.15, matrix, normalize)
    upstream = torch.linspace(0.0, 1.0, len(labels)) if len(labels) > 1 else torch.ones(1)
    by_x, by_w = gradients(upstream.double().numpy())
    if margins is not None:
        margins = margins._replace(table=margins.table.to(device, dtype), described=margins.described.to(device))
    emb, proxies = leaf(emb, device), leaf(proxies, device)
    actual = margin_softmax_loss(emb, proxies, labels.to(device), scale, 0.15, margins, normalize, chunk_size)
    if len(proxies) == 1:  # no other class
        assert not actual.any()
        actual.sum().backward()
        assert not emb.grad.any()
        assert not proxies.grad.any()
        return
    assert losses.max() > 1e-3
    assert distance(actual, losses) < tol
    actual.backward(upstream.to(actual))
    for x, expected in ((emb, by_x), (proxies, by_w)):
        assert np.abs(expected).max() > 1e-3
        assert distance(x.grad, expected) < tol


def test_gradcheck(problem, kind):  # noqa: F811
    emb, proxies, labels, _ = problem
    margins, _ = both_margins(kind, len(proxies))

    def losses(emb, proxies):
        return margin_softmax_loss(emb, proxies, labels, 4.0, 0.1, margins, chunk_size=max(2, len(proxies) // 4))

    assert torch.autograd.gradcheck(losses, (leaf(emb), leaf(proxies)), fast_mode=len(proxies) > 25)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_what_requires_grad(problem, needed, monkeypatch):  # noqa: F811
    emb, proxies, labels, _ = problem
    _, gradients = reference(emb, proxies, labels, 4.0, 0.1, np.zeros((len(proxies),) * 2))
    inputs = [emb.clone(), proxies.clone()]
    inputs[needed].requires_grad_()
    if needed == 0:
        monkeypatch.setattr("pml_ext.streaming.margin_softmax.write_gradient", None)
    margin_softmax_loss(*inputs, labels, 4.0, 0.1).sum().backward()
    expected = gradients(np.ones(len(emb)))[needed]
    np.testing.assert_allclose(inputs[needed].grad.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert inputs[1 - needed].grad is None


def test_no_grad(problem):  # noqa: F811
    emb, proxies, labels, _ = problem
    with torch.no_grad():
        actual = margin_softmax_loss(leaf(emb), leaf(proxies), labels)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, margin_softmax_loss(emb, proxies, labels))


def test_backward_twice_and_in_place_scaling(problem):  # noqa: F811
    emb, proxies, labels, _ = problem
    emb = leaf(emb)
    losses = margin_softmax_loss(emb, proxies, labels)
    losses *= 3
    first, second = (torch.autograd.grad(losses.sum(), emb, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (once,) = torch.autograd.grad(margin_softmax_loss(emb, proxies, labels).sum(), emb)
    torch.testing.assert_close(first, 3 * once)


def test_second_derivatives_raise():
    emb, proxies = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    (grad,) = torch.autograd.grad(margin_softmax_loss(emb, proxies, torch.arange(4)).sum(), emb, create_graph=True)
    with pytest.raises(NotImplementedError, match="margin softmax is streamed and has no second derivatives"):
        grad.square().sum().backward()


@pytest.mark.parametrize("scale", [64.0, 5000.0])
def test_no_overflow(problem, scale, kind, device):  # noqa: F811
    emb, proxies, labels, _ = (x.to(device) for x in problem)
    margins, _ = both_margins(kind, len(proxies))
    if margins is not None:
        margins = margins._replace(table=margins.table.to(device), described=margins.described.to(device))
    emb, proxies = leaf(emb.float()), leaf(proxies.float())
    losses = margin_softmax_loss(emb, proxies, labels, scale, 0.3, margins, normalize=False, chunk_size=3)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert emb.grad.isfinite().all() and proxies.grad.isfinite().all()


@pytest.mark.parametrize("chunk_size", [None, 20_000])
def test_memory_does_not_grow_with_batch_times_classes(chunk_size):
    emb, proxies = torch.randn(64, 4, requires_grad=True), torch.randn(20_000, 4, requires_grad=True)
    margins = ClassMargins(torch.randn(20_000, 3), torch.ones(20_000, dtype=torch.bool), "squared", 0.0, 0.1)
    with LargestTensor() as largest:
        margin_softmax_loss(
            emb, proxies, torch.arange(64), class_margins=margins, chunk_size=chunk_size
        ).sum().backward()
    assert (largest.numel < 64 * 20_000 / 4) == (chunk_size is None)


def test_dependence_on_the_upstream_gradient_is_not_lost():
    emb, weight = torch.randn(4, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    value = weight * margin_softmax_loss(emb, torch.randn(5, 3), torch.arange(4)).mean()
    (grad,) = torch.autograd.grad(value, emb, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(grad.square().sum() + weight**2, weight)


def test_second_derivatives_by_proxies_raise():
    proxies = torch.randn(5, 3, requires_grad=True)
    value = margin_softmax_loss(torch.randn(4, 3), proxies, torch.arange(4)).sum()
    (grad,) = torch.autograd.grad(value, proxies, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.square().sum().backward()


def test_small_losses_are_exact(device):
    """A sample on its proxy, the other one opposite: log(1 + exp(-2 s)) is exp(-2 s), not 0, and so are gradients."""
    emb, proxies = torch.tensor([[1.0, 1e-3]], device=device), torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    emb.requires_grad_()
    proxies.requires_grad_()
    loss = margin_softmax_loss(emb, proxies, torch.tensor([0], device=device), 20.0)
    assert loss.item() == pytest.approx(np.exp(-40), rel=1e-4)
    loss.backward()
    assert emb.grad[0, 1].item() == pytest.approx(40 * np.exp(-40) * 1e-3, rel=1e-3)
    assert proxies.grad[0, 1].item() == pytest.approx(-20 * np.exp(-40) * 1e-3, rel=1e-3)  # by the own slope alone


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(problem, half, device):  # noqa: F811
    emb, proxies, labels, _ = (x.to(device) for x in problem)
    expected = [leaf(x.to(half), torch.float32) for x in (emb, proxies)]
    margin_softmax_loss(*expected, labels).mean().backward()
    for emb_dtype, proxy_dtype in ((half, torch.float32), (torch.float32, half), (half, half)):
        inputs = [leaf(x.to(half), d) for x, d in zip((emb, proxies), (emb_dtype, proxy_dtype), strict=True)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            losses = margin_softmax_loss(*inputs, labels, chunk_size=4)
            losses.mean().backward()
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, margin_softmax_loss(*expected, labels))
        for x, e in zip(inputs, expected, strict=True):
            torch.testing.assert_close(x.grad, e.grad.to(x.dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
def test_bad_chunk_size(problem, chunk_size):  # noqa: F811
    emb, proxies, labels, _ = problem
    with pytest.raises(ValueError, match=rf"chunk_size must be None or an integer >= 1, got {chunk_size}"):
        margin_softmax_loss(emb, proxies, labels, chunk_size=chunk_size)


@pytest.mark.parametrize("offset", [1e2, -1e4, 1e5])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_an_offset_of_all_logits_changes_nothing(offset, chunk_size):
    rng = torch.Generator().manual_seed(0)
    emb, proxies = (torch.randint(-8, 9, (n, 6), generator=rng) / 16.0 for n in (12, 40))  # logits without rounding
    labels = torch.randint(0, 40, (12,), generator=rng)
    expected, gradients = reference(emb, proxies, labels, 1.0, 0.0, np.zeros((40, 40)), normalize=False)
    emb, proxies = (torch.cat([x, torch.full((len(x), 1), y)], 1) for x, y in ((emb, 1.0), (proxies, offset)))
    emb, proxies = leaf(emb), leaf(proxies)
    losses = margin_softmax_loss(emb, proxies, labels, scale=1.0, normalize=False, chunk_size=chunk_size)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-4 if abs(offset) < 1e3 else 2e-2)
    by_x, by_w = torch.autograd.grad(losses.sum(), (emb, proxies))
    of_x, of_w = gradients(np.ones(12))
    tolerance = 1e-5 if abs(offset) < 1e3 else 2e-2
    np.testing.assert_allclose(by_x[:, :6].numpy(), of_x, atol=tolerance)
    np.testing.assert_allclose(by_w[:, :6].numpy(), of_w, atol=tolerance)
    np.testing.assert_allclose(by_x[:, 6].numpy() / offset, np.zeros(12), atol=1e-5)  # probabilities sum to 1


@pytest.mark.parametrize(
    "settings",
    [{"scale": 1e4}, {"margin": -3.0}, {"margin": 1.5}, {"margin": 10.0, "scale": 1e3}, {"margin": -2.0, "scale": 1e4}],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1], ids=["at the proxy", "opposite"])
def test_extreme_settings_in_float32(settings, sign):
    rng = torch.Generator().manual_seed(0)
    proxies, labels = torch.randn(40, 8, generator=rng), torch.randint(0, 40, (12,), generator=rng)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [leaf((3.0 * sign * proxies[labels]).to(dtype)), leaf(proxies.to(dtype))]
        losses = margin_softmax_loss(*leaves, labels, **settings)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "cosine"}, ValueError, "class_margins.kind must be one of squared, euclidean, table, got 'cosine'"),
        ({"constant": float("nan")}, ValueError, "class_margins.constant must be finite, got nan"),
        ({"slope": float("inf")}, ValueError, "class_margins.slope must be finite, got inf"),
        ({"slope": "3"}, TypeError, "class_margins.slope must be a number"),
        ({"table": torch.full((4, 3), torch.nan)}, ValueError, "class_margins.table must be finite"),
        ({"table": torch.ones(4)}, ValueError, "class_margins.table must have shape"),
        ({"table": torch.ones(4, 3).long()}, TypeError, "class_margins.table must have a floating point dtype"),
        ({"table": np.ones((4, 3))}, TypeError, r"class_margins.table must be a torch\.Tensor, got ndarray"),
        (
            {"described": torch.full((4,), 0.5)},
            TypeError,
            r"class_margins.described must be a bool tensor, got .*float32",
        ),
    ],
)
def test_bad_class_margins(change, error, message):
    good = ClassMargins(torch.eye(4)[:, :3], torch.ones(4, dtype=torch.bool), "squared", 0.0, 0.3)
    emb, labels = torch.eye(4), torch.arange(4)
    assert margin_softmax_loss(emb, emb, labels, class_margins=good).isfinite().all()
    with pytest.raises(error, match=message):
        margin_softmax_loss(emb, emb, labels, class_margins=good._replace(**change))
    with pytest.raises(TypeError, match="class_margins must be a ClassMargins, got tuple"):
        margin_softmax_loss(emb, emb, labels, class_margins=tuple(good))


def kept_problem(batch_size, dtype=torch.float64, width=6):
    """Return embeddings and proxies of 29 classes, leaves, and labels: in chunks of 4 the last one is short."""
    rng = torch.Generator().manual_seed(batch_size)
    emb, proxies = (torch.randn(n, width, generator=rng, dtype=torch.float64) for n in (batch_size, 29))
    return leaf(emb.to(dtype)), leaf(proxies.to(dtype)), torch.randint(29, (batch_size,), generator=rng)


def kept_by(losses):
    """Return for each chunk 1 if its exponentials wait for backward, else 0."""
    return [int(x is not None and x.exponentials is not None) for x in losses.grad_fn.kept]


@pytest.mark.parametrize(
    ("batch_size", "memory", "expected"),
    [
        (3, 0, [1] * 8),  # batch < width: all fit where the gradient will be
        (6, 0, [1] * 8),
        (14, 0, [1, 1, 1, 0, 0, 0, 0, 0]),  # 12 of 29 classes
        (14, 8 * 14 * 5, [1, 1, 1, 1, 0, 0, 0, 0]),  # the numbers of a chunk, and one a sample
        (14, 8 * 14 * 5 - 1, [1, 1, 1, 0, 0, 0, 0, 1]),  # one byte less: the last chunk alone is short enough
        (14, 10**6, [1] * 8),
    ],
)
def test_exponentials_are_kept(batch_size, memory, expected, kind):
    emb, proxies, labels = kept_problem(batch_size)
    margins, matrix = both_margins(kind, 29)
    losses = margin_softmax_loss(emb, proxies, labels, 6.0, 0.15, margins, chunk_size=4, memory=memory)
    assert kept_by(losses) == expected
    values, gradients = reference(emb.detach(), proxies.detach(), labels, 6.0, 0.15, matrix)
    assert distance(losses, values) < 1e-12
    upstream = torch.linspace(0.5, 1.0, batch_size, dtype=torch.float64)
    for _ in range(2):  # the second time nothing is kept any more
        grads = torch.autograd.grad(losses, (emb, proxies), upstream, retain_graph=True)
        for x, y in zip(grads, gradients(upstream.numpy()), strict=True):
            assert distance(x, y) < 1e-12
        assert not any(kept_by(losses))
    assert all(map(torch.equal, grads, torch.autograd.grad(losses, (emb, proxies), upstream)))


@pytest.mark.parametrize("memory", [1000, 2000, 10**5])
@pytest.mark.parametrize("frozen", [0, 1, None], ids=["embeddings frozen", "proxies frozen", "none frozen"])
def test_memory_is_a_limit_and_given_back(memory, frozen):
    inputs = [*kept_problem(14, torch.float32)]
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    losses = margin_softmax_loss(*inputs, chunk_size=4, memory=memory)
    node = losses.grad_fn
    gradient = node.proxy_grad
    assert (gradient is None) == (frozen == 1)
    waiting = [x.exponentials for x in node.kept if x is not None]
    beside = [x for x in waiting if gradient is None or x.untyped_storage().data_ptr() != gradient.data_ptr()]
    taken = sum(x.untyped_storage().nbytes() + 4 * len(x) for x in beside)
    all_ = 4 * 14 * (29 + 8) if frozen == 1 else 4 * 14 * (17 + 5)
    assert (memory - 4 * 14 * 5 < taken <= memory) if memory < all_ else taken == all_
    storages = [StorageWeakRef(x.untyped_storage()) for x in beside]
    del waiting, beside, gradient
    assert storages and not any(x.expired() for x in storages)
    losses.sum().backward(retain_graph=True)
    assert all(x.expired() for x in storages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_is_where_exponentials_were_and_no_copy(dtype):
    emb, proxies, labels = kept_problem(3, dtype)
    losses = margin_softmax_loss(emb, proxies, labels)
    place = losses.grad_fn.proxy_grad.data_ptr()
    losses.sum().backward()
    assert (proxies.grad.data_ptr() == place) == (dtype == torch.float32)


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr("pml_ext.streaming.margin_softmax._Kept", None)
    emb, proxies, labels = kept_problem(3)
    with torch.no_grad():
        margin_softmax_loss(emb, proxies, labels, memory=10**6)
    margin_softmax_loss(emb.detach(), proxies.detach(), labels, memory=10**6)
    with pytest.raises(TypeError, match="not callable"):
        margin_softmax_loss(emb, proxies, labels)


def test_kept_exponentials_hold_a_logit_that_grows(device):
    """Chunk by chunk the largest logit rises by 50: what was kept before counts nothing, what comes last all."""
    proxies = torch.arange(8.0, dtype=torch.float64, device=device)[:, None] * 50
    emb = torch.ones(3, 1, dtype=torch.float64, device=device)
    labels = torch.tensor([0, 3, 7], device=device)
    expected, gradients = reference(emb.cpu(), proxies.cpu(), labels.cpu(), 1.0, 0.0, np.zeros((8, 8)), False)
    emb, proxies = leaf(emb), leaf(proxies)
    losses = margin_softmax_loss(emb, proxies, labels, 1.0, normalize=False, chunk_size=1, memory=10**4)
    assert all(kept_by(losses))
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach().cpu().numpy(), expected, atol=1e-12)
    for x, y in zip((emb, proxies), gradients(np.ones(3)), strict=True):
        np.testing.assert_allclose(x.grad.cpu().numpy(), y, atol=1e-12)


@pytest.mark.parametrize("memory", [-1, 6e8, True, None])
def test_bad_memory(memory):
    with pytest.raises(ValueError, match=f"memory must be an integer >= 0, in bytes, got {memory}"):
        margin_softmax_loss(*kept_problem(3), memory=memory)
