import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance

from pml_ext.losses.similarity import distance_matrix

QUERY = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REF = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DISTANCES = [
    CosineSimilarity(),
    CosineSimilarity(power=2),
    DotProductSimilarity(),
    DotProductSimilarity(normalize_embeddings=False),
    LpDistance(p=1),
]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_is_the_distance(distance, with_ref, device):
    inputs = [x.clone().to(device).requires_grad_() for x in ([QUERY, REF] if with_ref else [QUERY])]
    ours, theirs = distance_matrix(distance, *inputs), distance(*inputs)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    grads = [torch.autograd.grad(x, inputs, upstream) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_ref", [False, True])
def test_gradcheck_twice(with_ref):
    inputs = [x.clone().requires_grad_() for x in ([QUERY, REF] if with_ref else [QUERY])]
    assert torch.autograd.gradcheck(lambda *x: distance_matrix(CosineSimilarity(), *x), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: distance_matrix(CosineSimilarity(), *x), inputs)


def test_gradient_only_where_wanted():
    query, ref = QUERY.clone().requires_grad_(), REF.clone()
    distance_matrix(CosineSimilarity(), query, ref).sum().backward()
    assert query.grad.any()
    assert ref.grad is None


def test_zero_row():
    query = QUERY.clone()
    query[2] = 0
    query.requires_grad_()
    mat = distance_matrix(CosineSimilarity(), query)
    mat.sum().backward()
    assert not mat[2].any()
    assert query.grad.isfinite().all()


def test_statistics_are_collected():
    distance = CosineSimilarity(collect_stats=True)
    distance_matrix(distance, QUERY)
    assert distance.initial_avg_query_norm == pytest.approx(QUERY.norm(dim=1).mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_ref", [False, True])
def test_rows_shorter_than_the_smallest_norm(with_ref, dtype):  # the derivative of x / 1e-12 has a part along x
    lengths = torch.tensor([0.0, 1e-20, 3e-13, 9e-13, 2e-12, 1.0])[:, None]
    inputs = [(torch.nn.functional.normalize(x) * lengths[: len(x)]).to(dtype).requires_grad_() for x in (QUERY, REF)]
    inputs = inputs if with_ref else inputs[:1]
    ours, theirs = distance_matrix(CosineSimilarity(), *inputs), CosineSimilarity()(*inputs)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (ours, theirs)), strict=True):
        scale = b.abs().amax(1, keepdim=True)
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-4, atol=1e-5)
