import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, CosFaceLoss

from pml_ext.learners import learner_similarity, split_learners
from pml_ext.losses import DivergenceLoss
from pml_ext.regularizers import DivergenceRegularizer

M, D = 4, 3
EMB = torch.randn(7, M * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EMB[1, D : 2 * D] = EMB[1, :D]  # identical learners
EMB[2] = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]].flatten()  # orthogonal ones
EMB[3, D : 2 * D] = -2 * EMB[3, :D]  # opposite ones
LABELS = torch.arange(7) // 2


def reference(emb, margin):
    """The formula with loops; shares no code with the package and uses no torch."""
    losses = []
    for row in emb.reshape(len(emb), M, D):
        unit = [b / np.linalg.norm(b) for b in row]
        hinges = [max(0.0, margin - np.sum((unit[p] - unit[q]) ** 2)) for q in range(M) for p in range(q)]
        losses.append(np.sum(hinges))
    return np.mean(losses)


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.5])
@pytest.mark.parametrize("make", [DivergenceLoss, DivergenceRegularizer])
def test_matches_reference(make, margin, device):
    expected = reference(EMB.numpy(), margin)
    assert expected > 0
    actual = make(M, margin).to(device)(EMB.to(device))
    assert actual.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([2.0, 0.0], 1.0),  # identical: the whole margin
        ([0.8, 0.6], 1 - 0.4),  # cosine 0.8, inside
        ([0.5, 0.75**0.5], 0.0),  # on the border
        ([0.0, 3.0], 0.0),  # orthogonal, outside
        ([0.0, 0.0], 0.0),  # no direction
    ],
)
def test_hand_computed(second, expected):
    emb = torch.tensor([[1.0, 0.0, *second]])
    assert DivergenceLoss(num_learners=2)(emb).item() == pytest.approx(expected, abs=1e-6)


def test_gradcheck():
    emb = torch.cat([EMB[:1], EMB[2:]]).requires_grad_()  # the hinge has a kink nowhere near
    loss_func = DivergenceLoss(M, margin=1.9)
    assert torch.autograd.grad(loss_func(emb), emb)[0].any()
    assert torch.autograd.gradcheck(loss_func, emb)
    assert torch.autograd.gradgradcheck(loss_func, emb)


def test_gradient_drives_learners_apart():
    emb = torch.randn(16, 8, requires_grad=True)
    with torch.no_grad():
        emb[:, 4:] = emb[:, :4] + 0.1 * emb[:, 4:]
    optimizer = torch.optim.SGD([emb], lr=1.0)
    before = learner_similarity(emb, 2)
    for _ in range(200):
        optimizer.zero_grad()
        DivergenceLoss(2)(emb).backward()
        optimizer.step()
    assert before > 0.9
    assert 0.3 < learner_similarity(emb, 2) < 0.52  # the hinge ends at 0.5


def test_labels_and_indices_are_ignored():
    loss_func = DivergenceLoss(M)
    indices_tuple = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
    assert loss_func(EMB) == loss_func(EMB, LABELS) == loss_func(EMB, LABELS, indices_tuple) > 0
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        loss_func(EMB, LABELS, ref_emb=EMB + 1, ref_labels=LABELS)


@pytest.mark.parametrize("make", [DivergenceLoss, DivergenceRegularizer])
def test_slices_of_zeros_get_no_gradient(make):
    emb = EMB.clone()
    emb[0, :D] = 0
    emb.requires_grad_()
    make(M, margin=3.0)(emb).backward()
    assert not emb.grad[0, :D].any()
    assert emb.grad[0, D:].any()
    assert emb.grad.abs().max() < 100


def test_one_learner_has_no_pair():
    emb = EMB.clone().requires_grad_()
    loss = DivergenceLoss(1)(emb)
    assert loss == 0
    loss.backward()
    assert not emb.grad.any()


def test_regularizer_of_pml_losses():
    regularizer = DivergenceRegularizer(M)
    for make in (ContrastiveLoss, lambda **kw: CosFaceLoss(5, M * D, **kw)):
        torch.manual_seed(0)
        plain = make()(EMB.float(), LABELS)
        torch.manual_seed(0)
        both = make(embedding_regularizer=regularizer, embedding_reg_weight=0.5)(EMB.float(), LABELS)
        torch.testing.assert_close(both - plain, 0.5 * DivergenceLoss(M)(EMB.float()), rtol=1e-4, atol=1e-5)
    assert regularizer(EMB[:0].clone().requires_grad_()) == 0


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_regularizer_in_half_precision(half):
    emb = EMB.to(half).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = DivergenceRegularizer(M)(emb)
    loss.backward()
    assert loss.dtype == torch.float32
    assert emb.grad.dtype == half
    torch.testing.assert_close(loss, DivergenceRegularizer(M)(emb.float()))


@pytest.mark.parametrize("make", [DivergenceLoss, DivergenceRegularizer])
def test_statistics(make):
    loss_func = make(M, collect_stats=True)
    loss_func(EMB)
    unit = EMB.reshape(7, M, D) / EMB.reshape(7, M, D).norm(dim=2, keepdim=True)
    cosines = [(unit[:, p] * unit[:, q]).sum(1) for q in range(M) for p in range(q)]
    assert loss_func.learner_similarity == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-14)
    assert learner_similarity(EMB[:0], M) == learner_similarity(EMB, 1) == 0


def test_learners_are_compared_in_one_product():
    with torch.profiler.profile() as profile:
        DivergenceLoss(M)(EMB)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::bmm") == 1


@pytest.mark.parametrize("make", [DivergenceLoss, DivergenceRegularizer])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_learners": 0}, "num_learners must be an integer >= 1, got 0"),
        ({"num_learners": 2.0}, r"num_learners must be an integer >= 1, got 2\.0"),
        ({"margin": 0.0}, r"margin must be > 0 and finite, got 0\.0"),
        ({"margin": float("nan")}, "margin must be > 0 and finite, got nan"),
    ],
)
def test_bad_arguments(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**({"num_learners": 2} | kwargs))


@pytest.mark.parametrize("make", [DivergenceLoss, DivergenceRegularizer])
def test_width_must_be_divisible(make):
    message = r"embeddings must have a width that num_learners = 5 divides, got shape \(7, 12\)"
    with pytest.raises(ValueError, match=message):
        make(5)(EMB)


@pytest.mark.parametrize("length", [1e-22, 3e-13, 2e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_shorter_than_the_smallest_norm(length, dtype):
    slices = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slices[:, 0] = torch.nn.functional.normalize(slices[:, 0]) * length
    emb = slices.flatten(1).to(dtype).requires_grad_()
    wide = emb.detach().double().requires_grad_()
    unit = torch.nn.functional.normalize(wide.view(3, 2, 4), dim=2)
    expected = (4 - 2 + 2 * (unit[:, 0] * unit[:, 1]).sum(1)).relu().mean()
    loss = DivergenceLoss(2, margin=4.0)(emb)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(x, y)[0].double().view(3, 2, 4) for x, y in ((loss, emb), (expected, wide)))
    for actual, by_autograd in zip(*grads, strict=True):
        scale = by_autograd.abs().amax(1, keepdim=True)
        torch.testing.assert_close(actual / scale, by_autograd / scale, rtol=1e-4, atol=1e-5)


def test_what_is_no_embedding():
    with pytest.raises(TypeError, match=r"embeddings must be a torch\.Tensor, got ndarray"):
        learner_similarity(np.ones((2, 4)), 2)
    with pytest.raises(TypeError, match=r"refs must be a torch\.Tensor, got list"):
        split_learners([[1.0, 2.0]], 2, "refs")
    with pytest.raises(ValueError, match="embeddings must hold numbers, got a tensor on the meta device"):
        learner_similarity(torch.ones(2, 4, device="meta"), 2)


@pytest.mark.parametrize("emb", [torch.ones(3, 4).long(), torch.full((3, 4), torch.nan), torch.ones(3, 4).to_sparse()])
def test_the_regularizer_checks_too(emb):
    """Integers would be cut to zeros and give no divergence."""
    with pytest.raises((TypeError, ValueError), match="embeddings must"):
        DivergenceRegularizer(2)(emb)
