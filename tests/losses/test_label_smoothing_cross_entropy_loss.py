import copy
import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning import miners

from pml_ext.losses import LabelSmoothingCrossEntropyLoss
from tests.pml_internals import c_f, lmu

NUM_CLASSES, SIZE = 5, 6
EMB = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([4, 4, 2, 2, 2, 0, 0, 1, 3])


def make(**kwargs):
    torch.manual_seed(0)
    loss_func = LabelSmoothingCrossEntropyLoss(NUM_CLASSES, SIZE, **kwargs).double()
    if loss_func.bias is not None:
        torch.nn.init.normal_(loss_func.bias)
    return loss_func


def reference(x, y, weight, bias, temperature, smoothing):
    """The formula with loops; shares no code with the package and uses no torch."""
    losses = []
    for xi, yi in zip(x, y, strict=True):
        logits = [(w @ xi + b) / temperature for w, b in zip(weight, bias, strict=True)]
        log_total = math.log(sum(math.exp(z) for z in logits))
        targets = [(1 - smoothing) * (c == yi) + smoothing / len(logits) for c in range(len(logits))]
        losses.append(-sum(t * (z - log_total) for t, z in zip(targets, logits, strict=True)))
    return losses


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (0.2, 0.1), (0.5, 0.9)])
def test_matches_reference(bias, temperature, smoothing, device):
    loss_func = make(temperature=temperature, label_smoothing=smoothing, bias=bias)
    offsets = loss_func.bias.detach().numpy() if bias else np.zeros(NUM_CLASSES)
    weight = loss_func.weight.detach().numpy()
    expected = np.mean(reference(EMB.numpy(), LABELS.tolist(), weight, offsets, temperature, smoothing))
    assert loss_func.to(device)(EMB.to(device), LABELS).item() == pytest.approx(expected, rel=1e-9)


def test_gradcheck():
    loss_func = make(temperature=0.5)
    parameters = tuple(loss_func.parameters())

    def of_parameters(emb, weight, bias):
        return torch.func.functional_call(loss_func, {"weight": weight, "bias": bias}, (emb, LABELS))

    assert torch.autograd.gradcheck(of_parameters, (EMB.clone().requires_grad_(), *parameters))


def test_miners_weigh_samples():
    loss_func = make()
    indices_tuple = miners.BatchHardMiner()(EMB, LABELS)
    weights = lmu.convert_to_weights(indices_tuple, LABELS, dtype=torch.float64)
    each = reference(
        EMB.numpy(), LABELS.tolist(), loss_func.weight.detach().numpy(), loss_func.bias.detach().numpy(), 1.0, 0.1
    )
    expected = (torch.tensor(each) * weights).mean().item()
    assert loss_func(EMB, LABELS, indices_tuple).item() == pytest.approx(expected, rel=1e-9)
    assert len(weights.unique()) > 1


def test_logits():
    loss_func = make(temperature=0.5)
    expected = (EMB @ loss_func.weight.T + loss_func.bias) / 0.5
    torch.testing.assert_close(loss_func.get_logits(EMB), expected)
    cross_entropy = torch.nn.functional.cross_entropy(expected, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(loss_func(EMB, LABELS), cross_entropy)
    with pytest.raises(ValueError, match=r"embeddings must have shape .* got \(9, 2\)"):
        loss_func.get_logits(EMB[:, :2])


def test_initialization():
    loss_func = LabelSmoothingCrossEntropyLoss(100, 64)
    assert loss_func.weight.abs().max() <= 1 / 8  # as torch.nn.Linear
    assert loss_func.weight.abs().max() > 0.12
    assert not loss_func.bias.any()
    small = c_f.TorchInitWrapper(torch.nn.init.normal_, std=0.001)
    loss_func = LabelSmoothingCrossEntropyLoss(100, 64, bias=False, weight_init_func=small)
    assert loss_func.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert [name for name, _ in loss_func.named_parameters()] == ["weight"]
    before = loss_func.weight.clone()
    loss_func.reset_parameters()
    assert not torch.equal(loss_func.weight, before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"embedding_size": 2.5}, r"embedding_size must be an integer >= 1, got 2\.5"),
        ({"temperature": 0}, "temperature must be > 0 and finite, got 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in 0 to 1, 1 excluded, got 1\.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in 0 to 1, 1 excluded, got -0\.1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LabelSmoothingCrossEntropyLoss(**({"num_classes": 3, "embedding_size": 4} | kwargs))


def test_bad_labels():
    with pytest.raises(ValueError, match="labels must be < num_classes = 5, got 6"):
        make()(EMB, LABELS + 2)
    with pytest.raises(ValueError, match="labels must be >= 0, got -100"):
        make()(EMB, torch.full((9,), -100))


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_all_logits_have_in_common_costs_no_digits(part, smoothing):
    """Logits near 3e6 in float32, whose own steps are a quarter there."""
    loss_func, emb = make(label_smoothing=smoothing).float(), EMB.float()
    with torch.no_grad():
        if part == "bias":
            loss_func.bias += 3e6
        else:
            loss_func.weight[:, 0], emb[:, 0] = 1.0, 3e6
    emb.requires_grad_()
    exact = copy.deepcopy(loss_func).double()
    assert exact.get_logits(emb.double()).min() > 2.9e6
    loss, expected = loss_func(emb, LABELS), exact(emb.double(), LABELS)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    grads, exact_grads = (
        torch.autograd.grad(x, f.weight)[0].double() for x, f in ((loss, loss_func), (expected, exact))
    )
    torch.testing.assert_close(grads, exact_grads, rtol=1e-5, atol=1e-5 * exact_grads.abs().max().item())
