import itertools

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.miners import MultiSimilarityMiner

from pml_ext.streaming import multi_similarity_loss
from pml_ext.streaming.pair_hinges import pair_hinges
from pml_ext.streaming.pair_list import list_similarities
from pml_ext.streaming.pair_sums import pair_sums
from pml_ext.streaming.pair_tiles import Pairs
from tests.largest_tensor import LargestTensor

BATCHES = {
    "random": [3, 9, 7, 7, 0, 9, 5, 5, 5, 3, 1, 7, 5],
    "one class": [4] * 7,
    "all alone": [5, 4, 3, 2, 1, 0],
    "one sample": [2],
    "two classes": [0, 1] * 4 + [1],
    "large numbers": [2**40, 7, 2**40, 2**62, 7],
}
REF_LABELS = [7, 5, 7, 3, 11, 2**40, 4, 5, 7, 0, 4]
CHUNKS = [None, 1, 3, 4, 64]


def rows(count, seed):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def labels(request):
    return torch.tensor(request.param)


def dense_masks(labels, ref_labels=None, own=None):
    """Return which pairs are positive and which negative, from loops."""
    own = range(len(labels)) if ref_labels is None else own
    ref_labels = labels if ref_labels is None else ref_labels
    pos, neg = np.zeros((2, len(labels), len(ref_labels)), dtype=bool)
    for i, j in itertools.product(range(len(labels)), range(len(ref_labels))):
        same = labels[i].item() == ref_labels[j].item()
        pos[i, j] = same and (own is None or int(own[i]) != j)
        neg[i, j] = not same
    return pos, neg


def mined_masks(sim, pos, neg, epsilon):
    """Return what the paper's mining leaves, from loops."""
    kept_pos, kept_neg = np.zeros_like(pos), np.zeros_like(neg)
    for i in range(len(sim)):
        if pos[i].any() and neg[i].any():
            hardest_pos, hardest_neg = sim[i][pos[i]].min(), sim[i][neg[i]].max()
            kept_pos[i] = pos[i] & (sim[i] - epsilon < hardest_neg)
            kept_neg[i] = neg[i] & (sim[i] + epsilon > hardest_pos)
    return kept_pos, kept_neg


def reference(x, labels, refs, ref_labels, own, epsilon, normalize, alpha, beta, base, negative_base, upstream):
    """Value of each sample and gradients by embeddings and references, in numpy."""
    y = x if refs is None else refs
    xn, yn = (np.linalg.norm(a, axis=1, keepdims=True) if normalize else 1.0 for a in (x, y))
    xu, yu = x / xn, y / yn
    sim = xu @ yu.T
    pos, neg = dense_masks(labels, ref_labels, own)
    if epsilon is not None:
        pos, neg = mined_masks(sim, pos, neg, epsilon)
    p, n = np.where(pos, -alpha * (sim - base), -np.inf), np.where(neg, beta * (sim - negative_base), -np.inf)
    of_pos, of_neg = (np.logaddexp(0, np.logaddexp.reduce(a, 1)) for a in (p, n))
    value = of_pos / alpha + of_neg / beta
    by_sim = upstream[:, None] * (np.exp(n - of_neg[:, None]) - np.exp(p - of_pos[:, None]))
    by_x, by_y = by_sim @ yu, by_sim.T @ xu
    if normalize:
        by_x = (by_x - (by_x * xu).sum(1, keepdims=True) * xu) / xn
        by_y = (by_y - (by_y * yu).sum(1, keepdims=True) * yu) / yn
    return (value, by_x + by_y, None) if refs is None else (value, by_x, by_y)


def check(actual, expected, tol):
    assert np.linalg.norm(actual.detach().double().numpy() - expected) <= tol * np.linalg.norm(expected) + 1e-14


@pytest.mark.parametrize("against", ["itself", "references", "a memory"])
@pytest.mark.parametrize(
    ("normalize", "alpha", "beta", "epsilon", "dtype", "tol"),
    [
        (True, 2.0, 9.0, None, torch.float64, 1e-12),
        (True, 2.0, 9.0, 0.1, torch.float64, 1e-12),
        (False, 2.0, 9.0, None, torch.float64, 1e-12),
        (False, 2.0, 9.0, 0.1, torch.float64, 1e-12),
        (True, 300.0, 900.0, None, torch.float64, 1e-12),
        (True, 300.0, 900.0, 0.1, torch.float64, 1e-12),
        (True, 2.0, 9.0, None, torch.float32, 2e-6),
    ],
    ids=["cosine", "cosine mined", "dot", "dot mined", "largest subtracted", "largest subtracted, mined", "float32"],
)
def test_matches_reference(labels, against, normalize, alpha, beta, epsilon, dtype, tol):
    """Tiles of one pair, of odd sizes, and one for all; exponents of up to thousands take the other way."""
    x, refs, ref_labels, own = rows(len(labels), 0).to(dtype), None, None, None
    if against != "itself":
        refs, ref_labels = rows(len(REF_LABELS) + len(labels), 1).to(dtype), torch.tensor(REF_LABELS)
        own = torch.arange(len(labels)).flip(0) + len(REF_LABELS)
        refs[own], ref_labels = x, torch.cat([ref_labels, labels.flip(0)])
        own = own if against == "a memory" else None
    upstream = torch.linspace(-1, 2, len(labels), dtype=torch.float64)
    settings = {"alpha": alpha, "beta": beta, "base": 0.4, "negative_base": -0.1 if alpha > 2 else 0.3}
    numbers = [None if a is None else a.double().numpy() for a in (x, refs)]
    value, by_x, by_refs = reference(
        numbers[0], labels, numbers[1], ref_labels, own, epsilon, normalize, **settings, upstream=upstream.numpy()
    )
    assert (value > 0).any() or len(labels) == 1 or epsilon is not None
    settings |= {"own": own, "epsilon": epsilon, "normalize": normalize}
    for chunk_size in CHUNKS:
        x, refs = (None if a is None else a.detach().clone().requires_grad_() for a in (x, refs))
        actual = multi_similarity_loss(x, labels, refs, ref_labels, **settings, chunk_size=chunk_size)
        assert actual.dtype == dtype
        check(actual, value, tol)
        actual.backward(upstream.to(dtype))
        check(x.grad, by_x, tol)
        if refs is not None:
            check(refs.grad, by_refs, tol)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("scales", [(3.0, 3.0), (-2.0, 9.0), (-700.0, 900.0)])
def test_all_sums(labels, chunk_size, with_refs, scales):
    """Log-sum-exps, sums of similarities and counts; -inf where an anchor has no pairs, and no NaN in gradients."""
    x = rows(len(labels), 0).requires_grad_()
    refs = rows(len(REF_LABELS), 1).requires_grad_() if with_refs else None
    ref_labels = torch.tensor(REF_LABELS) if with_refs else None
    sums = pair_sums(Pairs(x, labels, refs, ref_labels), *scales, chunk_size=chunk_size)
    unit = torch.nn.functional.normalize(x)
    sim = unit @ (unit if refs is None else torch.nn.functional.normalize(refs)).T
    pos, neg = map(torch.from_numpy, dense_masks(labels, ref_labels))
    assert torch.equal(sums.number, pos.sum(1))
    expected = [
        (scale * sim).masked_fill(~mask, -torch.inf).logsumexp(1)
        for scale, mask in zip(scales, (pos, neg), strict=True)
    ] + [(sim * pos).sum(1)]
    leaves = [x] if refs is None else [x, refs]
    for actual, e in zip(sums, expected, strict=False):
        some = e > -torch.inf
        torch.testing.assert_close(actual, e, rtol=1e-12, atol=1e-12)
        if not some.any():
            continue
        a_grads = torch.autograd.grad(actual[some].sum(), leaves, retain_graph=True)
        e_grads = torch.autograd.grad(e[some].sum(), leaves, retain_graph=True)
        for a, b in zip(a_grads, e_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 2, 3])
@pytest.mark.parametrize("epsilon", [0.125, 0.0, -0.25, 3.0])
def test_mines_as_the_miner_with_ties(chunk_size, epsilon):
    """Dot products of integers, of which many are equal, and differ by epsilon exactly."""
    rng, mined = torch.Generator().manual_seed(0), 0
    for _ in range(30):
        x = torch.randint(-2, 3, (12, 3), generator=rng).double() / 4
        labels = torch.randint(3, (12,), generator=rng)
        sim = x @ x.T
        a1, p, a2, n = MultiSimilarityMiner(epsilon, distance=DotProductSimilarity(normalize_embeddings=False))(
            x, labels
        )
        pos, neg = torch.zeros(2, 12, 12, dtype=torch.bool)
        pos[a1, p] = True
        neg[a2, n] = True
        mined += len(p) + len(n)
        sums = pair_sums(Pairs(x, labels, normalize=False), 2.0, 4.0, epsilon, chunk_size)
        for actual, scale, mask in ((sums.positive, 2.0, pos), (sums.negative, 4.0, neg)):
            expected = (scale * sim).masked_fill(~mask, -torch.inf).logsumexp(1)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert 0 < mined < 30 * 12 * 11 or epsilon == 3.0


def test_gradcheck():
    labels, ref_labels = torch.tensor(BATCHES["random"]), torch.tensor(REF_LABELS)

    def loss(x, refs, normalize):
        return multi_similarity_loss(x, labels, refs, ref_labels, normalize=normalize, beta=5.0, chunk_size=3)

    for normalize in (True, False):
        inputs = rows(len(labels), 0).requires_grad_(), rows(len(REF_LABELS), 1).requires_grad_(), normalize
        assert torch.autograd.gradcheck(loss, inputs)
    x = rows(len(labels), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: multi_similarity_loss(x, labels, beta=5.0, chunk_size=3), x)


def test_second_derivatives_are_refused():
    x, labels = rows(6, 0).requires_grad_(), torch.arange(6) // 2
    (grad,) = torch.autograd.grad(multi_similarity_loss(x, labels).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="Multi-Similarity is streamed and has no second derivatives"):
        torch.autograd.grad(grad.sum(), x)


def test_two_backwards_through_one_graph():
    x, labels = rows(6, 0).requires_grad_(), torch.arange(6) // 2
    loss = multi_similarity_loss(x, labels, chunk_size=4).sum()
    once, twice = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert once.any()
    assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_references_get_half_gradients(dtype):
    """They are raised a chunk at a time; the value is that of the raised ones."""
    x, refs = rows(6, 0).to(dtype).requires_grad_(), rows(8, 1).to(dtype).requires_grad_()
    labels, ref_labels = torch.arange(6) // 2, torch.arange(8) // 3
    actual = multi_similarity_loss(x, labels, refs, ref_labels, chunk_size=3)
    wide = [a.detach().float().requires_grad_() for a in (x, refs)]
    expected = multi_similarity_loss(wide[0], labels, wide[1], ref_labels)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual.sum(), (x, refs))
    for grad, e in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert grad.dtype == dtype
        assert e.any()
        torch.testing.assert_close(grad.float(), e, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("num_refs", [None, 1500])
def test_no_tensor_is_as_large_as_all_pairs(epsilon, num_refs):
    x, labels = torch.randn(1200, 16).requires_grad_(), torch.arange(1200) // 4
    refs = None if num_refs is None else torch.randn(num_refs, 16).requires_grad_()
    ref_labels = None if num_refs is None else torch.arange(num_refs) // 4
    with LargestTensor() as largest:
        multi_similarity_loss(x, labels, refs, ref_labels, epsilon=epsilon, chunk_size=128).sum().backward()
    assert x.grad.any()
    assert 0 < largest.numel <= 1500 * 16


@pytest.mark.parametrize(("batch", "num_refs"), [(0, None), (0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_samples_or_no_references(batch, num_refs, epsilon, normalize, chunk_size):
    """Each sample there is has no pairs and loss 0; gradients are 0 and not None."""
    x, labels = rows(batch, 0).requires_grad_(), torch.arange(batch)
    refs = None if num_refs is None else rows(num_refs, 1).requires_grad_()
    ref_labels = None if num_refs is None else torch.arange(num_refs)
    settings = {"epsilon": epsilon, "normalize": normalize, "chunk_size": chunk_size}
    losses = multi_similarity_loss(x, labels, refs, ref_labels, **settings)
    assert torch.equal(losses, torch.zeros(batch, dtype=torch.float64))
    hinges = pair_hinges(Pairs(x, labels, refs, ref_labels, None, normalize), 0.0, 1.0, 1, chunk_size)
    assert not any(hinges)
    leaves = [x] if refs is None else [x, refs]
    for value in (losses.sum(), hinges.positive + hinges.negative):
        for grad, leaf in zip(torch.autograd.grad(value, leaves), leaves, strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_similarities_of_a_list(with_refs, normalize, monkeypatch):
    """In chunks of a few pairs, some of which are named twice."""
    monkeypatch.setattr("pml_ext.streaming.pair_list.auto_block", lambda device: 15)
    x, refs = rows(6, 0).requires_grad_(), rows(8, 1).requires_grad_() if with_refs else None
    anchors, others = torch.tensor([0, 0, 5, 2, 2, 3, 0]), torch.tensor([1, 4, 5, 1, 1, 0, 1])
    leaves = [x] if refs is None else [x, refs]
    sim = [torch.nn.functional.normalize(a) if normalize else a for a in leaves]
    expected = (sim[0] @ sim[-1].T)[anchors, others]
    actual = list_similarities(x, refs, anchors, others, normalize, "a list")
    torch.testing.assert_close(actual, expected)
    upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(value, leaves, upstream) for value in (actual, expected)), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha must be > 0 and finite, got 0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon must be finite, got nan"),
        ({"epsilon": "0.1"}, TypeError, "epsilon must be a number"),
        ({"base": torch.ones(1, requires_grad=True)}, TypeError, "base must be a number here"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or an integer >= 1, got 0"),
        ({"own": torch.arange(6)}, ValueError, "own must come with ref_emb, got own alone"),
        ({"ref_emb": torch.ones(4, 5)}, ValueError, "ref_labels must come with ref_emb"),
        (
            {"ref_emb": torch.ones(4, 5), "ref_labels": torch.ones(4).long(), "own": torch.arange(6)},
            ValueError,
            "own must lie in 0 to 3, got 0 to 5",
        ),
        (
            {"ref_emb": torch.ones(4, 5), "ref_labels": torch.ones(4).long(), "own": torch.arange(2)},
            ValueError,
            r"own must have the shape of labels, \(6,\), got \(2,\)",
        ),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        multi_similarity_loss(rows(6, 0), torch.arange(6) // 2, **change)
