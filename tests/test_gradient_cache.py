import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.gradient_cache import cached_backward
from pml_ext.losses import CrossBatchMemory, MultiSimilarityLoss, ProxyAnchorLoss
from pml_ext.recipes import RECIPES, recipe
from pml_ext.trunks import freeze_batch_norm
from tests.contract.cases import CASES, LABELS, NUM_CLASSES, SIZE, make
from tests.largest_tensor import LargestTensor
from tests.processes import start

IMAGES = torch.randn(12, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SEED = 5


def network(*layers):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(7, 16), *layers, nn.Tanh(), nn.Linear(16, SIZE)).double()


def in_one_graph(trunk, loss_func, images, labels, chunk_size, miner=None):
    """Do what the cache must equal, with all activations: the chunks one by one, their loss, one backward."""
    embeddings = torch.cat([trunk(chunk) for chunk in images.split(chunk_size)])
    mined = () if miner is None else (miner(embeddings, labels),)
    loss = loss_func(embeddings, labels, *mined)
    loss.backward()
    return loss.detach()


def states_of(*modules):
    """Return gradients and buffers of modules by name."""
    gradients = {f"{i} {name}": p.grad for i, m in enumerate(modules) for name, p in m.named_parameters()}
    return gradients | {f"{i} {name}": x for i, m in enumerate(modules) for name, x in m.named_buffers()}


def both(trunk, loss_func, chunk_size, images=IMAGES, labels=LABELS, largest=None, **kwargs):
    """Check that loss, gradients, buffers and the random state are those of one graph; return the gradients."""
    one, cached = (copy.deepcopy((trunk, loss_func)) for _ in range(2))
    torch.manual_seed(SEED)
    expected = in_one_graph(*one, images, labels, largest or chunk_size, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    loss = cached_backward(*cached, images, labels, chunk_size, **kwargs)
    assert expected != 0 and not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    states = states_of(*cached)
    torch.testing.assert_close(states, states_of(*one), rtol=1e-10, atol=1e-12)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cached[0].parameters())
    return states


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_the_plain_step(name):
    for chunk_size in (1, 5, 12, 50):
        both(network(), make(CASES[name]).double(), chunk_size, largest=12)


def test_mined_pairs_are_those_of_the_whole_batch():
    miner = MultiSimilarityMiner(0.3)
    mined = both(network(), MultiSimilarityLoss(), 5, miner=miner, largest=12)
    all_pairs = both(network(), MultiSimilarityLoss(), 5, largest=12)
    assert (mined["0 0.weight"] - all_pairs["0 0.weight"]).abs().max() > 1e-3


def test_a_memory_gets_the_batch_once():
    memory = CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=64).double()
    trunk = network()
    for step in range(2):
        cached_backward(trunk, memory, IMAGES, LABELS, 5)
        assert memory.queue_idx == 12 * (step + 1)
    assert torch.equal(memory.label_memory[:24], LABELS.repeat(2))


class OtherGenerators(nn.Module):
    """Noise from the generators of NumPy and Python."""

    def forward(self, x):
        return x * np.random.rand() + random.random()  # noqa: NPY002


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1), OtherGenerators())])
def test_dropout_has_the_same_masks_in_both_passes(layer):
    def seeded():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002

    one, cached = network(layer), network(layer)
    torch.manual_seed(SEED)
    seeded()
    in_one_graph(one, ContrastiveLoss(), IMAGES, LABELS, 5)
    behind = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    torch.manual_seed(SEED)
    seeded()
    cached_backward(cached, ContrastiveLoss(), IMAGES, LABELS, 5)
    torch.testing.assert_close(states_of(cached), states_of(one), rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), behind[0])
    assert (random.getstate(), str(np.random.get_state())) == behind[1:]  # noqa: NPY002


def test_a_loss_that_draws_draws_once():
    def loss_func(embeddings, labels):
        return MultiSimilarityLoss()(nn.functional.dropout(embeddings, 0.3), labels)

    both(network(nn.Dropout(0.5)), loss_func_module(loss_func), 5)


def loss_func_module(function):
    module = nn.Module()
    module.forward = function
    return module


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_once_a_chunk(momentum):
    states = both(network(nn.BatchNorm1d(16, momentum=momentum)), MultiSimilarityLoss(), 5)
    assert states["0 1.num_batches_tracked"] == 3  # 5 + 5 + 2
    assert (states["0 1.running_var"] - 1).abs().min() > 1e-3


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.GroupNorm(4, 16)])
def test_norms_of_single_samples_are_exact(norm):
    both(network(norm), MultiSimilarityLoss(), 5, largest=12)


def test_frozen_batch_norms_are_exact():
    trunk = network(nn.BatchNorm1d(16))
    both(trunk, MultiSimilarityLoss(), 12)
    trunk(IMAGES)
    before = trunk[1].running_mean.clone()
    states = both(freeze_batch_norm(trunk).train(), MultiSimilarityLoss(), 5, largest=12)
    assert torch.equal(states["0 1.running_mean"], before) and before.abs().min() > 0


class MovingScale(nn.Module):
    """Divides by a statistic that it moves first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        self.scale = 0.5 * self.scale + 0.5 * x.detach().abs().amax()
        return x / self.scale


@pytest.mark.parametrize("replaced", [spectral_norm, None])
def test_buffers_that_the_network_reads_are_replayed(replaced):
    trunk = network() if replaced else network(MovingScale())
    if replaced:
        torch.manual_seed(0)
        replaced(trunk[0])
    before = {name: x.clone() for name, x in trunk.named_buffers()}
    states = both(trunk, MultiSimilarityLoss(), 5)
    assert before and all((states[f"0 {name}"] - x).abs().max() > 1e-6 for name, x in before.items())


@pytest.mark.parametrize("name", RECIPES)
def test_networks_and_losses_of_all_recipes(name):
    rows = torch.randn(4, 5)
    made = recipe(name, 4, 12, class_embeddings=rows, in_channels=1, image_size=28, width=4)
    images, labels = torch.randn(12, 1, 28, 28, dtype=torch.float64), torch.arange(12) % 4
    for p in made.trunk.parameters():  # attention that begins at zero gives none to what lies ahead of it
        p.data += 0.01 * torch.randn_like(p)
    both(made.trunk.double().train(), made.loss.double(), 5, images, labels)


def test_gradients_are_added_to_those_that_are_there():
    trunk, loss_func = network(), ProxyAnchorLoss(NUM_CLASSES, SIZE).double()
    cached_backward(trunk, loss_func, IMAGES, LABELS, 5)
    once = {name: x.clone() for name, x in states_of(trunk, loss_func).items()}
    cached_backward(trunk, loss_func, IMAGES, LABELS, 4)
    twice = states_of(trunk, loss_func)
    torch.testing.assert_close(twice, {name: 2 * x for name, x in once.items()}, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [5, 12])
def test_a_scaler_scales_gradients_but_not_the_loss(chunk_size):
    trunk, scaled = network().float(), network().float()
    loss_func, other = (make(CASES["ProxyAnchorLoss"]) for _ in range(2))
    images = IMAGES.float()
    expected = cached_backward(trunk, loss_func, images, LABELS, chunk_size)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert cached_backward(scaled, other, images, LABELS, chunk_size, scaler=scaler) == expected
    assert scaler.get_scale() == 8
    plain, eightfold = states_of(trunk, loss_func), states_of(scaled, other)
    torch.testing.assert_close(eightfold, {name: 8 * x for name, x in plain.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype, inside):
    """As argument, or around the call: weights cast in the first pass, which has no graph, are not used again."""
    one, cached = network().float(), network().float()
    with torch.autocast("cpu", dtype):
        embeddings = torch.cat([one(chunk) for chunk in IMAGES.float().split(5)])
        assert embeddings.dtype == dtype
    MultiSimilarityLoss()(embeddings.float(), LABELS).backward()
    if inside:
        with torch.autocast("cpu", dtype):
            cached_backward(cached, MultiSimilarityLoss(), IMAGES.float(), LABELS, 5)
    else:
        loss_func, seen = MultiSimilarityLoss(), []
        loss_func.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
        cached_backward(cached, loss_func, IMAGES.float(), LABELS, 5, autocast=dtype)
        assert seen == [torch.float32]
    for p, q in zip(cached.parameters(), one.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == torch.float32 and q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02 * q.grad.abs().max().item())


def test_an_overflow_is_left_to_the_scaler():
    trunk = network().float()
    with torch.no_grad():
        trunk[-1].weight.mul_(torch.inf)
    cached_backward(trunk, lambda emb, labels: emb.sum(), IMAGES.float(), LABELS, 5)
    assert not trunk[0].weight.grad.isfinite().any()


class Pair(nn.Module):
    """A network of two inputs, from a tuple or a mapping."""

    def __init__(self):
        super().__init__()
        self.inside = network()

    def forward(self, batch):
        x, scale = (batch["x"], batch["scale"]) if isinstance(batch, dict) else batch
        return self.inside(x * scale)


def test_images_of_many_forms():
    reference, scale = network(), torch.rand(12, 1, dtype=torch.float64) + 0.5
    MultiSimilarityLoss()(reference(IMAGES * scale), LABELS).backward()
    scaled = IMAGES * scale
    uneven = list(scaled.split([3, 7, 2]))

    class Counted:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from uneven

    counted = Counted()
    one_input, two_inputs = TensorDataset(scaled), TensorDataset(IMAGES, scale)
    loaders = DataLoader(one_input, 5), DataLoader(two_inputs, 5)  # lists of tensors
    of_two = ((IMAGES, scale), {"x": IMAGES, "scale": scale}, loaders[1])
    for images in (scaled, uneven, [[x] for x in uneven], counted, loaders[0], *of_two):
        trunk = Pair() if any(images is x for x in of_two) else network()
        cached_backward(trunk, MultiSimilarityLoss(), images, LABELS, 4)
        for p, q in zip(trunk.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    assert counted.passes == 2


def test_images_that_are_augmented_anew_are_replayed():
    class Noisy:
        def __iter__(self):
            for chunk in IMAGES.split(5):
                yield chunk + torch.randn_like(chunk) * random.random() * np.random.rand()  # noqa: NPY002

    noisy, trunk = Noisy(), network()
    cached_backward(trunk, MultiSimilarityLoss(), noisy, LABELS, 5)
    assert trunk[0].weight.grad.abs().max() > 0
    assert not torch.equal(next(iter(noisy)), next(iter(noisy)))


def test_images_may_learn():
    images, other = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    trunk = network().requires_grad_(False)
    cached_backward(trunk, MultiSimilarityLoss(), images, LABELS, 5)
    MultiSimilarityLoss()(trunk(other), LABELS).backward()
    torch.testing.assert_close(images.grad, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [5, 12])
def test_a_frozen_network_needs_one_pass(chunk_size):
    trunk, loss_func = network().requires_grad_(False), ProxyAnchorLoss(NUM_CLASSES, SIZE).double()
    calls = []
    trunk.register_forward_hook(lambda *_: calls.append(1))
    cached_backward(trunk, loss_func, IMAGES, LABELS, chunk_size)
    assert loss_func.proxies.grad.abs().max() > 0 and len(calls) == -(-12 // chunk_size)
    with pytest.raises(RuntimeError, match="does not require grad"):  # as the plain step has it
        cached_backward(trunk, MultiSimilarityLoss(), IMAGES, LABELS, chunk_size)


def test_only_a_chunk_is_in_the_network():
    """No tensor has more numbers than those of a chunk's widest layer; the plain step's have those of the batch's."""
    trunk, images, labels = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 4)), torch.randn(64, 4), None
    labels = torch.arange(64) // 4
    with LargestTensor() as plain:
        ProxyAnchorLoss(16, 4)(trunk(images), labels).backward()
    with LargestTensor() as cached:
        cached_backward(trunk, ProxyAnchorLoss(16, 4), images, labels, 8)
    assert (plain.numel, cached.numel) == (64 * 256, 8 * 256)


class OwnGenerator(nn.Module):
    """Dropout that nothing can replay."""

    def __init__(self, noise):
        super().__init__()
        self.generator, self.noise = torch.Generator().manual_seed(0), noise

    def forward(self, x):
        return x * (1 + self.noise * torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


@pytest.mark.parametrize("noise", [0.1, 1e-5])
def test_a_second_pass_that_differs_is_refused(noise):
    with pytest.raises(RuntimeError, match="must give the same embeddings in both passes, got others for chunk 0 of 3"):
        cached_backward(network(OwnGenerator(noise)), MultiSimilarityLoss(), IMAGES, LABELS, 5)


def offset(*layers):
    """Embeddings that lie close together, far from zero: their differences are a few percent of them."""
    trunk = network(*layers).float()
    with torch.no_grad():
        trunk[-1].weight.mul_(0.02)
        trunk[-1].bias.fill_(1.0)
    return trunk


def test_embeddings_with_a_common_offset_are_compared_without_it():
    images = IMAGES.float()
    embeddings = offset()(images)
    assert 1e-3 < (embeddings - embeddings.mean(0)).abs().max() < 0.05
    cached_backward(offset(), MultiSimilarityLoss(), images, LABELS, 5)
    with pytest.raises(RuntimeError, match="trunk must give the same embeddings in both passes"):
        cached_backward(offset(OwnGenerator(0.005)), MultiSimilarityLoss(), images, LABELS, 5)


def test_rounding_is_not_refused():
    trunk = network(OwnGenerator(1e-12))
    cached_backward(trunk, MultiSimilarityLoss(), IMAGES, LABELS, 5)
    assert trunk[0].weight.grad.abs().max() > 0
    cached_backward(network(OwnGenerator(1e-5)).bfloat16(), MultiSimilarityLoss(), IMAGES.bfloat16(), LABELS, 5)


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_rounding_of_equal_embeddings_is_not_refused(chunk_size):
    """Of embeddings that have collapsed, nothing is left without their mean."""
    calls = []
    trunk = Returns(lambda x: calls.append(1) or 1 + 0 * x + (2.0**-52 if len(calls) == 2 else 0))
    cached_backward(trunk, MultiSimilarityLoss(), IMAGES, LABELS, chunk_size)
    assert len(calls) == 2 * -(-12 // chunk_size)


class Chunks:
    """Other chunks in each pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


THREE = list(IMAGES.split(4))
OTHERS = "images must be the same in both passes, got others in chunk"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (THREE[:2], "must be the same in both passes, got 2 chunks of 3"),
        ((*THREE, THREE[0]), "must be the same in both passes, got 4 in chunk 3 of the second"),
        (IMAGES.split(3), "must be the same in both passes, got 3 in chunk 0 of the second"),
        ((THREE[1], THREE[0], THREE[2]), f"{OTHERS} 0 of 3"),
        ((*THREE[:2], THREE[2] + 1e-12), f"{OTHERS} 2 of 3"),
        ((*THREE[:2], THREE[2].flip(0)), f"{OTHERS} 2 of 3"),
        ((THREE[0], THREE[1].flip(1), THREE[2]), f"{OTHERS} 1 of 3"),
        ([(x, x) for x in THREE], f"{OTHERS} 0 of 3"),
    ],
)
def test_other_images_in_the_second_pass_are_refused(second, message):
    trunk = Returns(lambda x: x, lambda x: x[0] if isinstance(x, tuple) else x)
    with pytest.raises(RuntimeError, match=message):
        cached_backward(trunk, MultiSimilarityLoss(), Chunks(THREE, second), LABELS, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.bool, torch.complex128])
def test_images_are_compared_by_bits(dtype):
    """Also where the embeddings are the same: one other number of any dtype is found."""
    first = torch.ones(12, 3, 2, dtype=dtype)
    second = first.clone()
    second[7, 1, 0] = 0
    weight = nn.Parameter(torch.arange(24.0).reshape(12, 2))
    trunk = Returns(lambda x: 1 * weight[: len(x)])
    trunk.inside, trunk.weight = nn.Identity(), weight
    cached_backward(trunk, MultiSimilarityLoss(), Chunks([first], [first.clone()]), LABELS, 5)
    with pytest.raises(RuntimeError, match=f"{OTHERS} 1 of 3"):
        cached_backward(trunk, MultiSimilarityLoss(), Chunks([first], [second]), LABELS, 5)


def test_images_may_be_changed_in_place():
    trunk, reference = (nn.Sequential(nn.ReLU(inplace=True), network()) for _ in range(2))
    MultiSimilarityLoss()(reference(IMAGES.clone()), LABELS).backward()
    cached_backward(trunk, MultiSimilarityLoss(), IMAGES.clone(), LABELS, 5)
    torch.testing.assert_close(states_of(trunk), states_of(reference), rtol=1e-10, atol=1e-12)


class Fails(nn.Module):
    """Draws, and raises in a call of its own."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def forward(self, x):
        self.left -= 1
        if not self.left:
            raise ArithmeticError
        return x + torch.rand(()) * np.random.rand() * random.random()  # noqa: NPY002


def test_an_error_in_the_second_pass_leaves_the_random_state_of_the_loss():
    states = []
    for call in (5, 99):
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        with pytest.raises(ArithmeticError) if call == 5 else nullcontext():
            cached_backward(network(Fails(call)), MultiSimilarityLoss(), IMAGES, LABELS, 5)
        states.append((torch.rand(3).tolist(), random.random(), np.random.rand()))  # noqa: NPY002
    assert states[0] == states[1]


@pytest.mark.parametrize("images", [IMAGES, (IMAGES, IMAGES), {"x": IMAGES}, list(IMAGES.split(5))])
def test_labels_are_counted_before_the_network_runs(images):
    calls = []
    trunk = Returns(lambda x: calls.append(x) or x)
    with pytest.raises(ValueError, match="labels must have a row for each image, got 11 for 12"):
        cached_backward(trunk, MultiSimilarityLoss(), images, LABELS[1:], 5)
    assert not calls


class Grows(nn.Module):
    """Keeps all that it has seen, and adds the mean of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, 16, dtype=torch.float64))

    def forward(self, x):
        self.seen = torch.cat([self.seen, x.detach()])
        return x + self.seen.mean(0)


def test_buffers_that_grow_are_replayed():
    assert both(network(Grows()), MultiSimilarityLoss(), 5)["0 1.seen"].shape == (12, 16)


def test_hooks_of_parameters_are_called_once_a_chunk():
    trunk, calls = network(), []
    trunk[0].weight.register_post_accumulate_grad_hook(calls.append)
    cached_backward(trunk, MultiSimilarityLoss(), IMAGES, LABELS, 5)
    assert len(calls) == 3


class Returns(nn.Module):
    def __init__(self, change, before=lambda x: x):
        super().__init__()
        self.inside, self.change, self.before = network(), change, before

    def forward(self, x):
        return self.change(self.inside(self.before(x)))


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "chunk_size must be an integer >= 1, got 0", {"chunk_size": 0}),
        (ValueError, "chunk_size must be an integer >= 1, got 2.5", {"chunk_size": 2.5}),
        (TypeError, "trunk must be a torch.nn.Module, .*, got a function", {"trunk": lambda x: x}),
        (TypeError, "images must be .* iterated over twice, got a generator", {"images": (x for x in THREE)}),
        (TypeError, "images must be .* iterated over twice, got a int", {"images": 3}),
        (TypeError, "images must be tensors .*, got a list", {"images": [[[1, 2]]]}),
        (TypeError, "images must be tensors .*, got a int", {"images": [[1, 2]]}),
        (TypeError, "images must be tensors .*, got none", {"images": [[]]}),
        (TypeError, "images must be tensors .*, got a int", {"images": {"x": IMAGES, "y": 1}}),
        (TypeError, "images must be tensors .*, got none", {"images": ()}),
        (ValueError, r"images must have one length in all tensors .*, got \[12, 4\]", {"images": (IMAGES, THREE[0])}),
        (ValueError, "autocast must be torch.bfloat16, torch.float16 or None, got 'bf16'", {"autocast": "bf16"}),
        (ValueError, "autocast must be .*, got torch.float32", {"autocast": torch.float32}),
        (TypeError, "labels must be a tensor", {"labels": [1, 2]}),
        (ValueError, "labels must have a row for each image, got 11 for 12", {"labels": LABELS[1:]}),
        (ValueError, "labels must have a row for each image, got 12 for 8", {"images": THREE[:2]}),
        (ValueError, "labels must have a row for each image, got 12 for 0", {"images": []}),
        (ValueError, "labels must have a row for each image, got 0 for 0", {"images": [], "labels": LABELS[:0]}),
        (ValueError, "trunk must return a row for each image, got 4 for 5", {"trunk": Returns(lambda x: x[1:])}),
        (TypeError, r"trunk must return one tensor \(n, D\), got a tuple", {"trunk": Returns(lambda x: (x, x))}),
        (TypeError, "loss_func must return .*, got a dict", {"loss_func": ContrastiveLoss(reducer=DoNothingReducer())}),
        (TypeError, r"loss_func must return .*, got shape \(12, 6\)", {"loss_func": lambda emb, labels: emb}),
        (
            ValueError,
            "loss_func must depend on the embeddings",
            {"loss_func": lambda emb, labels: torch.ones((), requires_grad=True)},
        ),
    ],
)
def test_bad_input(error, message, changed):
    given = {"trunk": network(), "loss_func": MultiSimilarityLoss(), "images": IMAGES, "labels": LABELS}
    with pytest.raises(error, match=message):
        cached_backward(**(given | {"chunk_size": 5} | changed))


WAYS = {
    "plain": ({}, (4, 4)),
    "unused parameters": ({"find_unused_parameters": True}, (5, 5)),
    "views": ({"gradient_as_bucket_view": True}, (5, 5)),
    "one chunk": ({}, (12, 12)),
    "one rank has one chunk": ({}, (12, 2)),
}
ROWS = ([0, 1, 2, 4, 5, 7, 8], [3, 6, 9, 10, 11])


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    observed = {}
    for name, (settings, sizes) in WAYS.items():
        trunk, loss_func = network(nn.BatchNorm1d(16).eval()), make(CASES["HybridLoss"]).double()
        wrapped, sent = DistributedLossWrapper(loss_func), []
        ddp = DistributedDataParallel(trunk, **settings)
        if name == "plain":  # counted
            ddp.register_comm_hook(
                None, lambda state, bucket, sent=sent: sent.append(1) or allreduce_hook(state, bucket)
            )
        optimizer, steps = torch.optim.SGD([*trunk.parameters(), *loss_func.parameters()], lr=0.1), []
        for step in range(3):
            optimizer.zero_grad()
            rows, chunk_size = ROWS[rank], sizes[rank]
            loss = cached_backward(ddp, wrapped, IMAGES[rows] + step, LABELS[rows], chunk_size)
            steps.append((loss, {key: x.clone() for key, x in states_of(trunk, loss_func).items()}))
            optimizer.step()
        observed[name] = steps
        assert name != "plain" or len(sent) == 3  # all gradients once a step
    trunk = nn.Sequential(DistributedDataParallel(network(nn.BatchNorm1d(16))), network_behind())
    trunk[1] = DistributedDataParallel(trunk[1])
    for step in range(2):
        with torch.no_grad():
            trunk[0].module[1].running_mean.fill_(float(rank))  # the first rank's is taken
        cached_backward(trunk, DistributedLossWrapper(MultiSimilarityLoss()), IMAGES[rows] + step, LABELS[rows], 5)
        observed["buffers", step] = {name: x.clone() for name, x in trunk[0].module.named_buffers()}
    still = DistributedDataParallel(network(), static_graph=True)
    with pytest.raises(ValueError, match="without static_graph"):
        cached_backward(still, MultiSimilarityLoss(), IMAGES, LABELS, 5)
    torch.save(observed, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def network_behind():
    torch.manual_seed(4)
    return nn.Linear(SIZE, SIZE).double()


@pytest.mark.processes
def test_two_ranks_are_one_process(tmp_path):
    start(work, (str(tmp_path),), 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    order = [*ROWS[0], *ROWS[1]]
    trunk, loss_func = network(nn.BatchNorm1d(16).eval()), make(CASES["HybridLoss"]).double()
    optimizer = torch.optim.SGD([*trunk.parameters(), *loss_func.parameters()], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        expected = in_one_graph(trunk, loss_func, IMAGES[order] + step, LABELS[order], 12)
        for name in WAYS:
            for observed in ranks:
                loss, states = observed[name][step]
                torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(states, states_of(trunk, loss_func), rtol=1e-10, atol=1e-12)
        optimizer.step()
    before = network(nn.BatchNorm1d(16))
    for step in range(2):
        before[1].running_mean.zero_()
        after = [copy.deepcopy(before) for _ in ranks]
        for net, observed, rows in zip(after, ranks, ROWS, strict=True):
            for chunk in (IMAGES[rows] + step).split(5):
                net(chunk)
            torch.testing.assert_close(observed["buffers", step], dict(net.named_buffers()), rtol=1e-10, atol=1e-12)
        before = after[0]
    assert (after[0][1].running_var - after[1][1].running_var).abs().min() > 1e-6
