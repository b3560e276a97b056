"""Rows shorter than 1e-12, which normalizing divides by that: the dense form by autograd is the reference."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, softplus

from pml_ext.streaming import margin_softmax_loss, proxy_anchor_loss
from pml_ext.streaming.gradients import quick_apply

LENGTHS = [0.0, 1e-20, 3e-13, 9e-13, 2e-12, 1.0]
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2])


def leaves(dtype, seed=0):
    """Return embeddings and proxies of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    unit = [normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64)) for n in (8, 6)]
    rows = (unit[0] * torch.tensor([*LENGTHS, 1.0, 1.0])[:, None], unit[1] * torch.tensor(LENGTHS[::-1])[:, None])
    return [x.to(dtype).requires_grad_() for x in rows]


def dense_softmax(emb, proxies):
    logits = 3 * (normalize(emb) @ normalize(proxies).T + 0.1 * (LABELS[:, None] != torch.arange(6)))
    return cross_entropy(logits, LABELS, reduction="sum")


def dense_anchor(emb, proxies):
    cosine, own = normalize(emb) @ normalize(proxies).T, LABELS[:, None] == torch.arange(6)
    pos = softplus((-3 * (cosine - 0.1)).masked_fill(~own, -torch.inf).logsumexp(0))
    neg = softplus((3 * (cosine + 0.1)).masked_fill(own, -torch.inf).logsumexp(0))
    return pos.sum() / 6 + neg.sum() / 6


def streamed_softmax(emb, proxies, **kwargs):
    return margin_softmax_loss(emb, proxies, LABELS, scale=3.0, margin=0.1, **kwargs).sum()


def streamed_anchor(emb, proxies, **kwargs):
    return sum(proxy_anchor_loss(emb, proxies, LABELS, alpha=3.0, margin=0.1, **kwargs))


@pytest.mark.parametrize(
    ("streamed", "dense"),
    [(streamed_softmax, dense_softmax), (streamed_anchor, dense_anchor)],
    ids=["margin softmax", "Proxy-Anchor"],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_shorter_than_the_smallest_norm(streamed, dense, chunk_size, dtype):
    inputs, reference = leaves(dtype), leaves(torch.float64)
    loss, expected = streamed(*inputs, chunk_size=chunk_size), dense(*reference)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grads = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, reference), strict=True)
    for actual, by_autograd in grads:  # row by row: their gradients are of other orders of magnitude
        scale = by_autograd.abs().amax(1, keepdim=True)
        torch.testing.assert_close(actual / scale, by_autograd / scale, rtol=1e-4, atol=1e-5, check_dtype=False)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, grad, none):
        assert none is None
        x, derivative = ctx.saved_tensors
        return grad * (3 * x**2 if torch.is_grad_enabled() else derivative)


def test_a_quick_function_is_the_same_function(monkeypatch):
    cube = quick_apply(Cube)
    x = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: cube(x)[0], x)
    assert torch.equal(torch.func.grad(lambda x: cube(x)[0].sum())(x.detach()), torch.tensor([12.0, 27.0]).double())
    assert not cube(x)[1].requires_grad
    monkeypatch.setattr("torch.autograd.function._bind_default_args", None)  # what takes long
    (grad,) = torch.autograd.grad(cube(x)[0].sum(), x)
    assert torch.equal(grad, torch.tensor([12.0, 27.0]).double())
    with pytest.raises(TypeError, match="not callable"):
        Cube.apply(x)
