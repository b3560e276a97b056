import copy
import math

import numpy as np
import pytest
import torch

from pml_ext.trunks import SOLAR_NAMES, SecondOrderAttention
from tests.largest_tensor import LargestTensor

FEATURES = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))
STYLES = ["printed", "solar", "normalized"]


def make(style, reduction=2, dtype=torch.float64, **kwargs):
    """A block whose every parameter, and every statistic, is random."""
    torch.manual_seed(1)
    block = SecondOrderAttention(8, reduction, style, **kwargs).to(dtype)
    with torch.no_grad():
        for name, x in block.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "running_var" in name else torch.randn_like(x) / 3)
    return block


def reference(block, features, scale):
    """Eqs. 1 and 2 with loops over positions; shares no code with the package and uses no torch."""
    weights = {name: x.double().numpy() for name, x in block.state_dict().items()}

    def pointwise(name, x):
        matrix, bias = weights[f"{name}.weight"][:, :, 0, 0], weights.get(f"{name}.bias", 0)
        return matrix @ x + bias

    def query_or_key(name, x):
        if block.style == "printed":
            return pointwise(name, x)
        return np.maximum(batch_norm(f"{name}.1", pointwise(f"{name}.0", x)), 0)

    def batch_norm(name, x):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return (x - mean) / np.sqrt(var + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    images = features.double().numpy()
    result, maps = np.zeros_like(images), []
    for b, image in enumerate(images):
        positions = [image[:, i, j] for i in range(image.shape[1]) for j in range(image.shape[2])]
        queries, keys, values = (
            [f(n, x) for x in positions]
            for f, n in ((query_or_key, "query"), (query_or_key, "key"), (pointwise, "value"))
        )
        attention = np.zeros((len(positions), len(positions)))
        for p, q in enumerate(queries):
            scores = np.exp([scale * (q @ k) for k in keys])
            attention[p] = scores / scores.sum()
            gathered = sum(a * v for a, v in zip(attention[p], values, strict=True))
            i, j = divmod(p, image.shape[2])
            added = pointwise("out", gathered)
            if block.style == "normalized":
                added = batch_norm("norm", added)
            result[b, :, i, j] = positions[p] + added
        maps.append(attention)
    return result, np.stack(maps)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reduction", [1, 4])
@pytest.mark.parametrize("attention_scale", [None, 0.4])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_matches_reference(style, reduction, attention_scale, dtype, tol, device):
    block = make(style, reduction, dtype, attention_scale=attention_scale).eval()
    scale = attention_scale or (1.0 if style == "printed" else (8 / reduction) ** -0.5)
    expected, maps = reference(block, FEATURES, scale)
    block, features = block.to(device), FEATURES.to(device, dtype)
    actual = block(features).detach().cpu().numpy()
    assert np.abs(expected - FEATURES.numpy()).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=tol, atol=tol)
    np.testing.assert_allclose(block.attention_map(features).detach().cpu().numpy(), maps, atol=1e-6)


def test_hand_computed():
    """Two positions, one channel, all maps the identity: position 0 sees e^0 and e^0, position 1 e^0 and e^1."""
    block = SecondOrderAttention(1)
    for name, x in block.named_parameters():
        torch.nn.init.constant_(x, float("weight" in name))
    share = math.e / (1 + math.e)
    actual = block(torch.tensor([[[[0.0, 1.0]]]]))
    torch.testing.assert_close(actual, torch.tensor([[[[0.5, 1 + share]]]]))


def test_starts_as_the_identity():
    assert torch.equal(SecondOrderAttention(8, 2, "solar")(FEATURES), FEATURES)
    assert torch.equal(SecondOrderAttention(8, 2, "normalized")(FEATURES), FEATURES)
    assert not torch.equal(SecondOrderAttention(8, 2, "printed")(FEATURES), FEATURES)


@pytest.mark.parametrize("style", ["solar", "normalized"])
def test_starts_to_learn(style):
    """A block that is the identity must not stay so."""
    torch.manual_seed(0)
    block = SecondOrderAttention(8, 2, style)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        block(FEATURES).square().sum().backward()
        optimizer.step()
    assert (block(FEATURES) - FEATURES).abs().max() > 1e-3
    assert block.query[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("size", [1, 1000])
def test_batch_norm_bounds_what_normalized_adds(size):
    """Whatever the maps, mean and spread over batch and positions are those that BatchNorm gives."""
    block, features = make("normalized"), size * FEATURES.double()
    with torch.no_grad():
        for x in (block.value.weight, block.out.weight):
            x.mul_(size)
    added = block(features) - features
    torch.testing.assert_close(added.mean((0, 2, 3)), block.norm.bias)
    torch.testing.assert_close(added.std((0, 2, 3), correction=0), block.norm.weight.abs(), rtol=0.01, atol=0)
    assert block.out.bias is None


def test_names_of_the_parameters():
    """State dicts that were saved stay loadable."""
    names = {style: list(SecondOrderAttention(8, 2, style).state_dict()) for style in STYLES}
    parts = [f"{name}.{x}" for name in ("query", "key", "value", "out") for x in ("weight", "bias")]
    assert names["printed"] == parts
    assert names["solar"][-4:] == parts[-4:] and names["solar"][0] == "query.0.weight"
    last = [f"norm.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert names["normalized"] == [name for name in names["solar"] if name != "out.bias"] + last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_half_precision(style, dtype):
    expected = make(style).eval()(FEATURES.double())
    actual = make(style).to(dtype).eval()(FEATURES.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("style", STYLES)
def test_order_of_positions(style):
    """Permuting the positions permutes the output."""
    block, order = make(style), torch.randperm(20)
    features = FEATURES.double()
    permuted = features.flatten(2)[..., order].view_as(features)
    expected = block(features).flatten(2)[..., order].view_as(features)
    torch.testing.assert_close(block(permuted), expected)


@pytest.mark.parametrize("style", STYLES)
def test_gradients(style):
    block = make(style).eval()  # in training batch norm takes away what a bias before it adds
    features = FEATURES.double().requires_grad_()
    block(features).square().mean().backward()
    for name, x in [*block.named_parameters(), ("features", features)]:
        assert x.grad.isfinite().all(), name
        # a bias of the keys shifts all scores of a query alike: softmax does not see it
        assert x.grad.abs().max() > (0 if name == "key.bias" else 1e-6), name
    assert torch.autograd.gradcheck(make(style).eval(), FEATURES[:1, :, :2, :2].double().requires_grad_())


@pytest.mark.parametrize("style", STYLES)
def test_batch_of_one_and_eval(style):
    block = make(style)
    assert block(FEATURES[:1].double()).isfinite().all()
    block.eval()
    both = block(FEATURES.double())
    torch.testing.assert_close(block(FEATURES[1:2].double()), both[1:2])
    assert torch.equal(block(FEATURES.double()), both)


@pytest.mark.parametrize("style", STYLES)
def test_state_dict_and_copy(style):
    block = make(style).eval()
    other = SecondOrderAttention(8, 2, style).double().eval()
    other.load_state_dict(block.state_dict())
    for twin in (other, copy.deepcopy(block)):
        assert torch.equal(twin(FEATURES.double()), block(FEATURES.double()))


def test_weights_named_as_in_solar():
    """Random weights under SOLAR's names: f and g with batch norm, h, v."""
    rng = torch.Generator().manual_seed(4)
    theirs = {}
    for name in ("f", "g"):
        theirs |= {
            f"{name}.0.weight": torch.randn(4, 8, 1, 1, generator=rng),
            f"{name}.0.bias": torch.randn(4, generator=rng),
        }
        theirs |= {
            f"{name}.1.{x}": torch.rand(4, generator=rng) for x in ("weight", "bias", "running_mean", "running_var")
        }
        theirs[f"{name}.1.num_batches_tracked"] = torch.tensor(7)
    theirs |= {"h.weight": torch.randn(4, 8, 1, 1, generator=rng), "h.bias": torch.randn(4, generator=rng)}
    theirs |= {"v.weight": torch.randn(8, 4, 1, 1, generator=rng), "v.bias": torch.randn(8, generator=rng)}
    block = SecondOrderAttention(8, 2, "solar").eval()
    block.load_state_dict({f"{SOLAR_NAMES[name[0]]}{name[1:]}": x for name, x in theirs.items()})
    features = FEATURES.flatten(2)  # (B, C, N)

    def branch(name):
        x = (
            torch.einsum("oc,bcn->bon", theirs[f"{name}.0.weight"][..., 0, 0], features)
            + theirs[f"{name}.0.bias"][:, None]
        )
        mean, var, weight, bias = (theirs[f"{name}.1.{x}"] for x in ("running_mean", "running_var", "weight", "bias"))
        return ((x - mean[:, None]) / (var[:, None] + 1e-5).sqrt() * weight[:, None] + bias[:, None]).relu()

    attention = (branch("f").transpose(1, 2) @ branch("g") * 4**-0.5).softmax(-1)
    value = torch.einsum("oc,bcn->bon", theirs["h.weight"][..., 0, 0], features) + theirs["h.bias"][:, None]
    out = torch.einsum("oc,bcn->bon", theirs["v.weight"][..., 0, 0], value @ attention.transpose(1, 2))
    expected = (features + out + theirs["v.bias"][:, None]).view_as(FEATURES)
    torch.testing.assert_close(block(FEATURES), expected, rtol=1e-4, atol=1e-4)


def test_matrix_of_positions_is_not_stored():
    block, features = SecondOrderAttention(16), torch.randn(2, 16, 40, 40, requires_grad=True)
    with LargestTensor() as largest:
        block(features).sum().backward()
    assert 0 < largest.numel < 2 * 1600 * 1600 / 4
    with LargestTensor() as largest:
        block.attention_map(features)
    assert largest.numel == 2 * 1600 * 1600


def test_statistics():
    block = make("printed", collect_stats=True)
    assert block.attention_entropy == 0
    block(FEATURES.double())
    attention = block.attention_map(FEATURES.double())
    expected = -(attention * attention.log()).sum(2).mean().item() / math.log(20)
    assert block.attention_entropy == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1
    for x in (block.query, block.key):
        torch.nn.init.zeros_(x.weight)
        torch.nn.init.zeros_(x.bias)
    block(FEATURES.double())
    assert block.attention_entropy == pytest.approx(1)
    block(FEATURES[:, :, :1, :1].double())
    assert block.attention_entropy == 0
    assert not hasattr(make("printed"), "attention_entropy")
    assert {"in_features", "reduction", "attention_scale"} <= set(block._record_these)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"style": "new"}, "style must be one of printed, solar, normalized, got 'new'"),
        ({"reduction": 3}, "reduction must divide in_features = 8, got 3"),
        ({"reduction": 0}, "reduction must be an integer >= 1, got 0"),
        ({"attention_scale": math.inf}, "attention_scale must be > 0 and finite, got inf"),
        ({"attention_scale": -1.0}, r"attention_scale must be > 0 and finite, got -1\.0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SecondOrderAttention(8, **kwargs)


def test_bad_features():
    for shape in ((2, 8, 5), (2, 7, 4, 4)):
        with pytest.raises(ValueError, match=r"features must have shape \(B, 8, H, W\), got"):
            SecondOrderAttention(8)(torch.zeros(shape))


def test_a_scale_that_would_learn_is_refused():
    with pytest.raises(TypeError, match="attention_scale must be a number here, got a tensor that requires a gradient"):
        SecondOrderAttention(8, attention_scale=torch.nn.Parameter(torch.tensor(1.0)))
    features = torch.randn(2, 8, 3, 3)
    block = SecondOrderAttention(8, attention_scale=torch.tensor([0.5]))
    torch.testing.assert_close(block(features), with_number(block, 0.5)(features))


def with_number(block, scale):
    other = SecondOrderAttention(8, attention_scale=scale)
    other.load_state_dict(block.state_dict())
    return other
