import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from pml_ext.trunks import IntraBatchRefiner, rename_ibc_weights
from pml_ext.trunks.intra_batch_refiner import _IBC_NAMES

B, D, HEADS = 7, 8, 2
EMB = torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EVERYONE = torch.cartesian_prod(torch.arange(B), torch.arange(B)).T


def make(**kwargs):
    torch.manual_seed(0)
    refiner = IntraBatchRefiner(D, **{"heads": HEADS, "dropout": 0.0, **kwargs}).double()
    with torch.no_grad():
        for name, p in refiner.named_parameters():  # biases and norms that do something
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif "query" in name or "key" in name:
                p.mul_(2)
    return refiner


def affine(linear, x):
    return x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()


def layer_norm(norm, x):
    mean, var = x.mean(), ((x - x.mean()) ** 2).mean()
    return (x - mean) / np.sqrt(var + 1e-5) * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def reference_layer(layer, x, null_message, senders=None):
    """One layer with loops, from the equations; uses torch for nothing but the parameters."""
    d = D // HEADS
    query, key, value = (affine(linear, x) for linear in (layer.attend.query, layer.attend.key, layer.attend.value))
    out = []
    for i in range(len(x)):
        message = np.zeros(D)
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            who = range(len(x)) if senders is None else senders[i]
            weights = {j: math.exp(query[i, part] @ key[j, part] / math.sqrt(d)) for j in who}
            total = sum(weights.values()) + (1.0 if null_message else 0.0)
            for j, weight in weights.items():
                message[part] += weight / total * value[j, part]
        y = layer_norm(layer.norm1, x[i] + affine(layer.out, message))
        out.append(layer_norm(layer.norm2, y + affine(layer.linear2, np.maximum(affine(layer.linear1, y), 0))))
    return np.stack(out)


@pytest.mark.parametrize("null_message", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("input_projection", [True, False])
def test_matches_reference(null_message, num_layers, input_projection, device):
    refiner = make(null_message=null_message, num_layers=num_layers, input_projection=input_projection)
    x = affine(refiner.input, EMB.numpy()) if input_projection else EMB.numpy()
    for layer in refiner.layers:
        x = reference_layer(layer, x, null_message)
    refiner.to(device)
    for edge_index in (None, EVERYONE.to(device)):
        refined = refiner(EMB.to(device), edge_index)
        np.testing.assert_allclose(refined.detach().cpu().numpy(), x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("null_message", [True, False])
def test_graph_matches_reference(null_message):
    """Some samples with many senders, some with one, some with none."""
    senders = {0: [1, 2, 3], 1: [1], 2: [], 3: [6, 0], 4: [], 5: [5, 4, 3, 2, 1, 0], 6: [2]}
    edge_index = torch.tensor([[j, i] for i, who in senders.items() for j in who]).T
    refiner = make(null_message=null_message, input_projection=False)
    expected = reference_layer(refiner.layers[0], EMB.numpy(), null_message, senders)
    np.testing.assert_allclose(refiner(EMB, edge_index).detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    shuffled = edge_index[:, torch.randperm(edge_index.shape[1])]
    torch.testing.assert_close(refiner(EMB, shuffled), refiner(EMB, edge_index))


@pytest.mark.parametrize("null_message", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_is_sparse(null_message, dtype):
    """Values and gradients, of embeddings and parameters, also where scores are large."""
    refiner = make(null_message=null_message, num_layers=2).to(dtype)
    tol = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    for factor in (1,) if dtype == torch.float32 else (1, 30):
        results = []
        for edge_index in (None, EVERYONE):
            emb = (factor * EMB).to(dtype).requires_grad_()
            out = refiner(emb, edge_index)
            refiner.zero_grad()
            out[:, ::3].sum().backward()
            results.append([out, emb.grad, *(p.grad for p in refiner.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, **tol)
        assert results[0][1].any()


def test_null_message_takes_weight():
    """With zero queries all scores are 0: each of B senders and the null message get 1 / (B + 1)."""
    refiner = make()
    nn.init.zeros_(refiner.layers[0].attend.query.weight)
    nn.init.zeros_(refiner.layers[0].attend.query.bias)
    weights = refiner.attention_weights(EMB)
    assert weights.shape == (1, HEADS, B, B)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / (B + 1)))
    without = make(null_message=False).attention_weights(EMB)
    torch.testing.assert_close(without.sum(3), torch.ones_like(without.sum(3)))


def test_attention_weights_are_those_used():
    refiner = make(num_layers=2).train()
    x = refiner.input(EMB)
    for layer, weights in zip(refiner.layers, refiner.attention_weights(EMB), strict=True):
        value = layer.attend.value(x).view(B, HEADS, -1).transpose(0, 1)
        torch.testing.assert_close((weights @ value).transpose(0, 1).flatten(1), layer.attend.dense(x))
        x = layer(x, None, None)
    assert refiner.training


def test_permuting_the_batch_permutes_the_output():
    refiner, order = make(num_layers=2), torch.randperm(B)
    torch.testing.assert_close(refiner(EMB[order]), refiner(EMB)[order])
    assert not torch.allclose(refiner(EMB[:3]), refiner(EMB)[:3])  # others matter


def test_without_edges_a_sample_is_alone():
    refiner, nothing = make(), torch.empty(2, 0, dtype=torch.long)
    alone = refiner(EMB, nothing)
    torch.testing.assert_close(refiner(EMB[2:3], nothing), alone[2:3])
    other = EMB.clone()
    other[0] += 1
    assert torch.equal(refiner(other, nothing)[1:], alone[1:])
    x = refiner.input(EMB)
    layer = refiner.layers[0]
    y = layer.norm1(x + layer.out(torch.zeros(D, dtype=torch.float64)))
    torch.testing.assert_close(alone, layer.norm2(y + layer.linear2(layer.linear1(y).relu())))


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 4, 1)])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [0, 7, 10**9]])
def test_mini_batches_do_not_see_each_other(sizes, numbers):
    refiner = make(num_layers=2)
    emb = torch.randn(sum(sizes), D, dtype=torch.float64)
    batch = torch.tensor(numbers).repeat_interleave(torch.tensor(sizes))
    expected = torch.cat([refiner(part) for part in emb.split(sizes)])
    torch.testing.assert_close(refiner(emb, batch=batch), expected)
    within = (batch[:, None] == batch).nonzero().T  # the complete graph of each mini-batch
    torch.testing.assert_close(refiner(emb, within), expected)


def test_outputs():
    last, cat = (make(num_layers=3, output=output) for output in ("last", "cat"))
    x, layers = last.input(EMB), []
    for layer in last.layers:
        x = layer(x, None, None)
        layers.append(x)
    assert torch.equal(cat(EMB), torch.cat(layers, 1))
    assert torch.equal(last(EMB), layers[-1])
    assert [refiner.out_features for refiner in (last, cat)] == [D, 3 * D]


@pytest.mark.parametrize("kwargs", [{}, {"null_message": False}], ids=str)
def test_gradcheck(kwargs):
    refiner = make(**kwargs)
    assert torch.autograd.gradcheck(refiner, EMB[:4].clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: refiner(x, EVERYONE), EMB.clone().requires_grad_())


def test_gradient_reaches_every_parameter():
    refiner = make(num_layers=2)
    refiner(EMB)[:, ::3].sum().backward()
    for name, p in refiner.named_parameters():
        if not name.endswith("key.bias"):  # the same for all senders but the null message
            assert p.grad.any(), name


def test_dropout_acts_in_training_only():
    refiner = make(dropout=0.5)
    for edge_index in (None, EVERYONE):
        refiner.train()
        assert not torch.allclose(refiner(EMB, edge_index), refiner(EMB, edge_index))
        refiner.eval()
        assert torch.equal(refiner(EMB, edge_index), refiner(EMB, edge_index))
        torch.testing.assert_close(refiner(EMB, edge_index), make().eval()(EMB, edge_index))


def test_every_dropout_of_a_layer():
    """Of the messages, inside the feed-forward part and behind it."""
    refiner = make(dropout=0.5).train()
    widths = []
    refiner.layers[0].dropout.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    refiner(EMB)
    assert widths == [D, 4 * D, D]


@pytest.mark.slow
def test_dropout_of_attention_is_the_same_on_average():
    refiner = make(dropout=0.3).train()
    attend = refiner.layers[0].attend
    expected = attend.eval().dense(EMB)
    attend.train()
    for run in (lambda: attend.dense(EMB), lambda: attend(EMB, EVERYONE)):
        mean = torch.stack([run() for _ in range(4000)]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.06)
        assert not torch.allclose(run(), expected, atol=0.1)


def test_initialization_and_reset():
    refiner = IntraBatchRefiner(64, heads=4, num_layers=2)
    layer = refiner.layers[1]
    bound = math.sqrt(6 / 128)
    for linear in (layer.attend.query, layer.attend.key, layer.attend.value, layer.out):
        assert 0.95 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    before = {name: p.clone() for name, p in refiner.named_parameters()}
    refiner.reset_parameters()
    for name, p in refiner.named_parameters():
        assert torch.equal(p, before[name]) == (
            p.ndim == 1 and not name.endswith(("linear1.bias", "linear2.bias", "input.bias"))
        )
    assert 0.95 * bound < layer.out.weight.abs().max() <= bound


def test_state_dict_copy_and_pickle():
    refiner = make().eval()
    loaded = IntraBatchRefiner(D, heads=HEADS).double().eval()
    loaded.load_state_dict(refiner.state_dict())
    for other in (loaded, copy.deepcopy(refiner), pickle.loads(pickle.dumps(refiner))):
        assert torch.equal(other(EMB), refiner(EMB))


def test_released_names():
    """Random weights under the authors' names."""
    layer = "gnn_model.node_model.layers.1."
    theirs = {
        "dim_red.weight": "input.weight",
        "dim_red.bias": "input.bias",
        layer + "att.q_linear.weight": "layers.1.attend.query.weight",
        layer + "att.k_linear.weight": "layers.1.attend.key.weight",
        layer + "att.v_linear.bias": "layers.1.attend.value.bias",
        layer + "att.out.weight": "layers.1.out.weight",
        layer + "linear1.weight": "layers.1.linear1.weight",
        layer + "linear2.bias": "layers.1.linear2.bias",
        layer + "norm1.weight": "layers.1.norm1.weight",
        layer + "norm2.bias": "layers.1.norm2.bias",
    }
    renamed = rename_ibc_weights({name: torch.zeros(1) for name in theirs})
    assert dict(zip(theirs, renamed, strict=True)) == theirs
    refiner, released = make(num_layers=2), {}
    for name, x in refiner.state_dict().items():
        for there, here in _IBC_NAMES.items():
            name = name.replace(here, there)
        released[name] = x
    assert set(theirs) <= set(released)
    released |= {"bottleneck.0.weight": torch.ones(D), "fc.0.weight": torch.ones(3, D)}
    other = IntraBatchRefiner(D, num_layers=2, heads=HEADS).double().eval()
    other.load_state_dict(rename_ibc_weights(released))
    torch.testing.assert_close(other(EMB), refiner.eval()(EMB))


def test_statistics():
    refiner = make(collect_stats=True, num_layers=2)
    refiner(EMB)
    weights = refiner.attention_weights(EMB)[-1]
    assert refiner.self_weight == pytest.approx(weights.diagonal(dim1=1, dim2=2).mean().item())
    assert refiner.null_weight == pytest.approx(1 - weights.sum(2).mean().item())
    assert 0 < refiner.self_weight < 1
    assert 0 < refiner.null_weight < 1
    kept = refiner.self_weight
    refiner(2 * EMB, EVERYONE)  # of graphs and of several batches there are none
    refiner(2 * EMB, batch=torch.arange(B))
    refiner(EMB[:0])
    assert refiner.self_weight == kept


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_integers_of_any_dtype(dtype):
    refiner = make()
    batch = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    torch.testing.assert_close(refiner(EMB, EVERYONE.to(dtype)), refiner(EMB, EVERYONE))
    torch.testing.assert_close(refiner(EMB, batch=batch.to(dtype)), refiner(EMB, batch=batch))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(half):
    refiner = make().float().eval()
    expected = refiner(EMB.float())
    with torch.autocast("cpu", dtype=half):
        refined = refiner(EMB.float())
    torch.testing.assert_close(refined.float(), expected, rtol=0.05, atol=0.05)


def test_one_and_no_sample():
    refiner = make()
    assert refiner(EMB[:1]).isfinite().all()
    assert refiner(EMB[:0]).shape == (0, D)
    assert refiner(EMB[:0], batch=torch.empty(0, dtype=torch.long)).shape == (0, D)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heads": 3}, "heads must divide embedding_size = 8, got 3"),
        ({"heads": 0}, "heads must be an integer >= 1, got 0"),
        ({"heads": 2.0}, r"heads must be an integer >= 1, got 2\.0"),
        ({"num_layers": 0}, "num_layers must be an integer >= 1, got 0"),
        ({"output": "every"}, "output must be one of last, cat, got 'every'"),
        ({"dropout": 1.0}, r"dropout must lie in 0 to 1, 1 excluded, got 1\.0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        IntraBatchRefiner(D, **kwargs)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0],), TypeError, r"embeddings must be a torch\.Tensor, got list"),
        ((EMB.long(),), TypeError, r"embeddings must have a floating point dtype, got torch\.int64"),
        ((EMB[:, :5],), ValueError, r"embeddings must have shape .* = \(7, 8\), got \(7, 5\)"),
        ((EMB, EVERYONE + 1), ValueError, "edge_index must lie in 0 to 6, got 1 to 7"),
        ((EMB, EVERYONE - 1), ValueError, "edge_index must lie in 0 to 6, got -1 to 5"),
        ((EMB, EVERYONE.double()), TypeError, r"edge_index must have an integer dtype, got torch\.float64"),
        ((EMB, EVERYONE.T), ValueError, r"edge_index must have shape \(2, E\), got \(49, 2\)"),
        ((EMB, None, torch.zeros(B)), TypeError, r"batch must have an integer dtype, got torch\.float32"),
        (
            (EMB, None, torch.zeros(3, dtype=torch.long)),
            ValueError,
            r"batch must have shape \(B,\) = \(7,\), got \(3,\)",
        ),
        ((EMB, None, torch.arange(B).flip(0)), ValueError, "batch must be sorted"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        make()(*args)
