"""What the public functions of streaming are given: the same errors as those of the losses."""

import pytest
import torch

from pml_ext.streaming import ClassMargins, margin_softmax_loss, proxy_anchor_loss

EMB, PROXIES = (torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (6, 5))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
BOTH = pytest.mark.parametrize("walk", [margin_softmax_loss, proxy_anchor_loss])
TABLE, DESCRIBED = torch.rand(5, 3), torch.ones(5, dtype=torch.bool)


def flat(x):
    return torch.cat([part.reshape(-1) for part in (x if isinstance(x, tuple) else (x,))])


@BOTH
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((EMB, PROXIES, LABELS + 1), ValueError, "labels must be < num_classes = 5, got 5 at position 1"),
        ((EMB, PROXIES, LABELS - 1), ValueError, "labels must be >= 0, got -1 at position 0"),
        ((EMB, PROXIES, LABELS[:4]), ValueError, r"labels must have shape .* \(6,\), got \(4,\)"),
        ((EMB, PROXIES, LABELS.float()), TypeError, "labels must have an integer dtype"),
        ((EMB, PROXIES, None), TypeError, r"labels must be a torch\.Tensor, got NoneType"),
        ((EMB[:, :3], PROXIES, LABELS), ValueError, r"embeddings must have shape .* \(6, 4\), got \(6, 3\)"),
        ((EMB / 0, PROXIES, LABELS), ValueError, "embeddings must be finite"),
        ((EMB, PROXIES.long(), LABELS), TypeError, "proxies must have a floating point dtype"),
        ((EMB, PROXIES[0], LABELS), ValueError, "proxies must have shape"),
        ((EMB, PROXIES.to("meta"), LABELS), ValueError, "proxies must be on the device of embeddings, cpu, got meta"),
        ((EMB, PROXIES, LABELS, -1.0), ValueError, "(scale|alpha) must be > 0 and finite"),
        ((EMB, PROXIES, LABELS, "32"), TypeError, "(scale|alpha) must be a number or a tensor of one number, got '32'"),
        ((EMB, PROXIES, LABELS, 2.0, float("nan")), ValueError, "margin must be finite"),
    ],
)
def test_bad_input(walk, args, error, message):
    with pytest.raises(error, match=message):
        walk(*args)


@BOTH
@pytest.mark.parametrize("name", ["scale", "margin"])
def test_settings_that_are_learned_are_refused(walk, name):
    """They would get no gradient: the losses, which have a dense form, give it."""
    name = "alpha" if walk is proxy_anchor_loss and name == "scale" else name
    with pytest.raises(TypeError, match=f"{name} must be a number here, got a tensor that requires a gradient"):
        walk(EMB, PROXIES, LABELS, **{name: torch.nn.Parameter(torch.tensor(0.5))})
    fixed = walk(EMB, PROXIES, LABELS, **{name: torch.tensor([0.5])})
    torch.testing.assert_close(flat(fixed), flat(walk(EMB, PROXIES, LABELS, **{name: 0.5})))


@BOTH
def test_labels_of_any_integer_dtype(walk):
    expected = flat(walk(EMB, PROXIES, LABELS))
    for dtype in (torch.int32, torch.uint8, torch.int16):
        torch.testing.assert_close(flat(walk(EMB, PROXIES, LABELS.to(dtype))), expected)


@pytest.mark.parametrize(
    ("walk", "kwargs", "shape"),
    [
        (margin_softmax_loss, {}, (0,)),
        (proxy_anchor_loss, {}, (2,)),
        (proxy_anchor_loss, {"per_class": True}, (10,)),
        (proxy_anchor_loss, {"chunk_size": 2, "normalize": False}, (2,)),
    ],
)
def test_no_sample(walk, kwargs, shape):
    emb, proxies = EMB[:0].clone().requires_grad_(), PROXIES.clone().requires_grad_()
    losses = flat(walk(emb, proxies, LABELS[:0], **kwargs))
    assert losses.shape == shape
    assert not losses.any()
    losses.sum().backward()
    assert emb.grad.shape == emb.shape
    assert not proxies.grad.any()


@pytest.mark.parametrize(
    ("margins", "error", "message"),
    [
        (ClassMargins(TABLE[:4], DESCRIBED, "squared", 0.0, 0.3), ValueError, r"table must have shape \(5, 3\), got"),
        (ClassMargins(TABLE, DESCRIBED[:4], "euclidean", 0.0, 0.3), ValueError, r"described must have shape \(5,\)"),
        (
            ClassMargins(TABLE, DESCRIBED, "table", 0.0, 0.3),
            ValueError,
            r"table must have shape \(5, 5\), got \(5, 3\)",
        ),
        (
            ClassMargins(TABLE.clone().requires_grad_(), DESCRIBED, "squared", 0.0, 0.3),
            TypeError,
            "class_margins.table must not require a gradient",
        ),
        (
            ClassMargins(TABLE, DESCRIBED, "squared", 0.0, torch.nn.Parameter(torch.tensor(0.3))),
            TypeError,
            "class_margins.slope must be a number here",
        ),
    ],
)
def test_bad_class_margins(margins, error, message):
    with pytest.raises(error, match=message):
        margin_softmax_loss(EMB, PROXIES, LABELS, class_margins=margins)
