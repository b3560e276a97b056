"""DistributedLossWrapper and DistributedMinerWrapper on two and three gloo processes, against one process."""

import copy
import datetime
import gc
import inspect
import os
import time
import warnings

import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pml_ext import set_validation
from pml_ext.distributed import DistributedLossWrapper, DistributedMinerWrapper
from pml_ext.distributed.collectives import shared_random_state
from pml_ext.losses import CrossBatchMemory, HybridLoss, IntraBatchLoss, MultiSimilarityLoss, ProxyAnchorLoss
from pml_ext.trunks import IntraBatchRefiner
from tests.contract.battery import cloned
from tests.contract.cases import CASES, LABELS, NUM_CLASSES, SIZE, embeddings, make
from tests.pml_internals import pml_dist
from tests.processes import start

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("wrappers")]  # they share a fixture

SIZES = {2: [5, 7], 3: [3, 4, 5]}  # rows of each rank
DATA = embeddings(torch.float64).detach()
SEED = 11  # of the main generator in each worker
SIZED = {"num_classes": NUM_CLASSES, "embedding_size": SIZE}
MORE_ARGUMENTS = {  # of losses that cannot be made from their defaults, or from these sizes
    "ArcFaceLoss": SIZED,
    "CosFaceLoss": SIZED,
    "LargeMarginSoftmaxLoss": SIZED,
    "P2SGradLoss": {"descriptors_dim": SIZE, "num_classes": NUM_CLASSES},
    "RankedListLoss": {"margin": 0.4, "Tn": 10},
    "SphereFaceLoss": SIZED,
    "SubCenterArcFaceLoss": SIZED,
}
NOT_HERE = {
    "BaseMetricLossFunction": "no loss",
    "GenericPairLoss": "no loss",
    "ManifoldLoss": "wants no labels",
    "SmoothAPLoss": "wants classes of one size",
    "ThresholdConsistentMarginLoss": "regularizes other losses",
    "VICRegLoss": "wants two views and no labels",
}


def pml_losses():
    """Return a maker for each loss of PML."""
    makers = {}
    for name, cls in inspect.getmembers(losses, inspect.isclass):
        if issubclass(cls, losses.BaseMetricLossFunction) and name not in NOT_HERE:
            known = inspect.signature(cls.__init__).parameters
            arguments = MORE_ARGUMENTS.get(name, {key: x for key, x in SIZED.items() if key in known})
            makers[f"PML {name}"] = lambda cls=cls, arguments=arguments: cls(**arguments)
    return makers


def build(make_loss, seed=3):
    torch.manual_seed(seed)
    return torch.nn.Linear(SIZE, SIZE).double(), make_loss().double()


def first_draw():
    """Return the seed that ranks agree on in the first call after the generator was set to SEED."""
    torch.manual_seed(SEED)
    return int(torch.randint(2**31, ()))


def grads(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters() if p.requires_grad]


def together(make_loss, rows, **kwargs):
    """Return value and gradients under the wrapper, and those of one process that has the whole batch."""
    model, loss_func = build(make_loss)
    whole_model, whole_loss = copy.deepcopy(model), copy.deepcopy(loss_func)
    wrapped = DistributedLossWrapper(loss_func, **kwargs)
    torch.manual_seed(SEED)
    ddp = DistributedDataParallel(model)  # its hooks live as long as it does
    loss = wrapped(ddp(DATA[rows]), LABELS[rows])
    loss.backward()
    with shared_random_state(first_draw(), torch.device("cpu")):  # the state of the wrapper's call
        expected = whole_loss(whole_model(DATA), LABELS)
    expected.backward()
    return {
        "loss": (loss.detach(), expected.detach()),
        "model": (grads(model), grads(whole_model)),
        "loss_func": (grads(loss_func), grads(whole_loss)),
    }


def sums(case, rows, splits):
    """Return value and gradients with efficient=True, and the sums over ranks computed in one process."""
    model, loss_func = build(lambda: make(case))
    whole_model, whole_loss = copy.deepcopy(model), copy.deepcopy(loss_func)
    ddp = DistributedDataParallel(model)
    loss = DistributedLossWrapper(loss_func, efficient=True)(ddp(DATA[rows]), LABELS[rows])
    loss.backward()
    total = 0
    for own in splits:
        emb = whole_model(DATA)
        others = [i for i in range(len(DATA)) if i not in own]
        ref = torch.cat([emb[own], emb[others].detach()])
        ref_labels = torch.cat([LABELS[own], LABELS[others]])
        indices_tuple = pml_dist.get_indices_tuple(LABELS[own], ref_labels)
        total = total + whole_loss(emb[own], LABELS[own], indices_tuple, ref, ref_labels)
    total.backward()
    return {
        "loss": (loss.detach(), total.detach()),
        "model": (grads(model), grads(whole_model)),
        "loss_func": (grads(loss_func), grads(whole_loss)),
    }


def error_of(call):
    try:
        call()
    except Exception as error:  # what is raised is the result
        return f"{type(error).__name__}: {error}"
    return "no error"


def out_of_memory(*_):
    raise RuntimeError("out of memory")


def differ(wrapped, key):
    """Let one rank have another setting."""
    loss_func = wrapped.loss
    if key == "weight":
        loss_func.proxy_weight = 0.3
    elif key == "mode":
        loss_func.proxy_loss.eval()
    elif key == "reducer":
        loss_func.pair_loss.set_reducer(reducers.ThresholdReducer(low=0.1))
    elif key == "parameters":
        with torch.no_grad():
            loss_func.proxy_loss.proxies[0, 0] += 1
    elif key == "order":
        with torch.no_grad():
            loss_func.proxy_loss.proxies.copy_(loss_func.proxy_loss.proxies.flip(0))
    elif key == "frozen":
        loss_func.proxy_loss.proxies.requires_grad_(False)
    elif key == "tensor":
        loss_func.pair_loss.alpha = torch.tensor(3.0)
    else:
        wrapped.efficient = True


def others(rank, world, rows, splits):
    """Return what does not fit the two comparisons above."""
    observed = {}

    # every rank draws its own parameters; those of the first rank hold
    torch.manual_seed(100 + rank)
    loss_func = IntraBatchLoss(NUM_CLASSES, SIZE)
    loss_func.norm.running_mean.normal_()
    DistributedLossWrapper(loss_func)
    observed["broadcast"] = {name: x.clone() for name, x in loss_func.state_dict().items()}
    torch.manual_seed(100)
    observed["first rank's"] = IntraBatchLoss(NUM_CLASSES, SIZE).state_dict()

    # miners, ours and PML's, in both modes
    for name, miner in (("hard", miners.BatchHardMiner()), ("random", miners.UniformHistogramMiner())):
        model, loss_func = build(MultiSimilarityLoss)
        torch.manual_seed(SEED)
        ddp = DistributedDataParallel(model)
        emb = ddp(DATA[rows])
        mined = DistributedMinerWrapper(miner)(emb, LABELS[rows])
        loss = DistributedLossWrapper(loss_func)(emb, LABELS[rows], mined)
        loss.backward()
        whole = build(MultiSimilarityLoss)[0]
        with shared_random_state(first_draw(), torch.device("cpu")):
            mined = miner(whole(DATA), LABELS)
        expected = MultiSimilarityLoss()(whole(DATA), LABELS, mined)
        expected.backward()
        observed["miner", name] = {
            "loss": (loss.detach(), expected.detach()),
            "model": (grads(model), grads(whole)),
        }
    equal = torch.arange(world * 4) // 2 % 3  # PML's wrappers need equal numbers of rows
    part = slice(4 * rank, 4 * rank + 4)
    data = torch.randn(world * 4, SIZE, generator=torch.Generator().manual_seed(1))
    for efficient in (False, True):
        for kind in (pml_dist.DistributedMinerWrapper, DistributedMinerWrapper):
            mined = kind(miners.MultiSimilarityMiner(), efficient=efficient)(data[part], equal[part])
            loss = DistributedLossWrapper(losses.ContrastiveLoss(), efficient=efficient)(data[part], equal[part], mined)
            observed["mined", efficient, kind.__module__] = loss
    observed["mined", False, "expected"] = losses.ContrastiveLoss()(
        data, equal, miners.MultiSimilarityMiner()(data, equal)
    )

    # references: two views of each sample, with the labels as one object and as two
    for same in (True, False):
        model, loss_func = build(losses.ContrastiveLoss)
        labels = LABELS[rows]
        ddp = DistributedDataParallel(model)
        emb = ddp(DATA[rows])
        loss = DistributedLossWrapper(loss_func)(emb, labels, None, emb * 2 + 1, labels if same else labels.clone())
        loss.backward()
        whole = build(losses.ContrastiveLoss)[0]
        emb = whole(DATA)
        expected = loss_func(emb, LABELS, None, emb * 2 + 1, LABELS if same else LABELS.clone())
        expected.backward()
        observed["refs", same] = {"loss": (loss.detach(), expected.detach()), "model": (grads(model), grads(whole))}

    # a memory, over several batches
    for kind in (CrossBatchMemory, losses.CrossBatchMemory):
        inner = losses.ContrastiveLoss() if kind is losses.CrossBatchMemory else HybridLoss(NUM_CLASSES, SIZE)
        memory = kind(inner, SIZE, memory_size=30)
        single = copy.deepcopy(memory)
        wrapped = DistributedLossWrapper(memory)
        values = []
        for seed in range(4):
            emb = embeddings(seed=seed).detach()
            mask = torch.arange(len(emb)) % 2 == 0 if seed > 1 else None
            own = None if mask is None else mask[rows]
            values.append(
                (wrapped(emb[rows], LABELS[rows], enqueue_mask=own).detach(), single(emb, LABELS, None, mask).detach())
            )
        observed["memory", kind.__module__] = values
        observed["memory rows", kind.__module__] = (memory.embedding_memory.clone(), single.embedding_memory.clone())
    observed["memory, tuple"] = error_of(lambda: wrapped(emb[rows], LABELS[rows], (torch.tensor([0]),) * 3))

    # gradients of several batches add up
    model, loss_func = build(lambda: make(CASES["HybridLoss"]))
    ddp, wrapped = DistributedDataParallel(model), DistributedLossWrapper(loss_func)
    with ddp.no_sync():
        wrapped(ddp(DATA[rows]), LABELS[rows]).backward()
    wrapped(ddp(DATA[rows] + 1), LABELS[rows]).backward()
    whole_model, whole_loss = build(lambda: make(CASES["HybridLoss"]))
    (whole_loss(whole_model(DATA), LABELS) + whole_loss(whole_model(DATA + 1), LABELS)).backward()
    observed["accumulated"] = {
        "model": (grads(model), grads(whole_model)),
        "loss_func": (grads(loss_func), grads(whole_loss)),
    }

    # DDP around the wrapper as well, several steps of an optimizer
    model, loss_func = build(lambda: make(CASES["HybridLoss"]))
    whole_model, whole_loss = copy.deepcopy(model), copy.deepcopy(loss_func)
    ddp, wrapped = DistributedDataParallel(model), DistributedDataParallel(DistributedLossWrapper(loss_func))
    steps = []
    for net, loss, part in ((ddp, wrapped, rows), (whole_model, whole_loss, slice(None))):
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            loss(net(DATA[part] + step), LABELS[part]).backward()
            optimizer.step()
        steps.append([p.detach().clone() for p in (*net.parameters(), *loss.parameters())])
    observed["trained"] = tuple(steps)

    # half precision, gradient checkpointing
    model, loss_func = build(lambda: make(CASES["HybridLoss"]))
    model.float(), loss_func.float()
    ddp, wrapped = DistributedDataParallel(model), DistributedLossWrapper(loss_func)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        emb = torch.utils.checkpoint.checkpoint(ddp, DATA[rows].float(), use_reentrant=False)
        loss = wrapped(emb, LABELS[rows])
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_func(model(DATA.float()), LABELS)
    observed["half"] = (
        emb.dtype,
        loss.dtype,
        loss.detach(),
        expected.detach(),
        [p.dtype for p in loss_func.parameters()],
    )

    # the user's generators are left alone
    torch.manual_seed(5)
    DistributedLossWrapper(IntraBatchLoss(NUM_CLASSES, SIZE, IntraBatchRefiner(SIZE, dropout=0.5)))(
        DATA[rows].float(), LABELS[rows]
    )
    after = torch.rand(3)
    torch.manual_seed(5)
    IntraBatchLoss(NUM_CLASSES, SIZE, IntraBatchRefiner(SIZE, dropout=0.5))
    torch.randint(2**31, ())  # the one number that a call takes
    observed["generator"] = (after, torch.rand(3))

    # the loss itself inside a checkpoint: both runs must draw the same dropout
    noisy = DistributedLossWrapper(IntraBatchLoss(NUM_CLASSES, SIZE, IntraBatchRefiner(SIZE, dropout=0.5)).double())
    two = []
    for again in (False, True):
        emb = DATA[rows].clone().requires_grad_()
        torch.manual_seed(8)

        def run(x):
            return noisy(x, LABELS[rows])

        loss = torch.utils.checkpoint.checkpoint(run, emb, use_reentrant=False) if again else run(emb)
        loss.backward()
        two.append(emb.grad)
    observed["checkpointed loss"] = tuple(two)

    # a rank without rows, in both modes
    sparse = DistributedLossWrapper(HybridLoss(NUM_CLASSES, SIZE).double(), efficient=True)
    loss = sparse((DATA if rank == 0 else DATA[:0]).clone().requires_grad_(), LABELS if rank == 0 else LABELS[:0])
    loss.backward()
    observed["empty rank, efficient"] = loss.detach()
    wrapped = DistributedLossWrapper(build(lambda: make(CASES["HybridLoss"]))[1])
    own = DATA if rank == 0 else DATA[:0]
    labels = LABELS if rank == 0 else LABELS[:0]
    loss = wrapped(own.clone().requires_grad_(), labels)
    loss.backward()
    observed["empty rank"] = (loss.detach(), build(lambda: make(CASES["HybridLoss"]))[1](DATA, LABELS).detach())

    # a compiled loss compares no row with itself either
    values = []
    for compiled in (True, False):
        loss_func = MultiSimilarityLoss()
        if compiled:
            loss_func.compile(backend="eager")
        emb = DATA[rows].clone().requires_grad_()
        loss = DistributedLossWrapper(loss_func, efficient=True)(emb, LABELS[rows])
        loss.backward()
        values.append((loss.detach(), emb.grad))
    observed["efficient, compiled"] = tuple(values)

    # one object for batch and references, told ahead of hooks
    copying = DistributedLossWrapper(MultiSimilarityLoss())
    copying.register_forward_pre_hook(cloned, with_kwargs=True)
    own = DATA[rows], LABELS[rows]
    observed["itself, hooks"] = copying(*own, None, *own), MultiSimilarityLoss()(DATA, LABELS)
    mining = DistributedMinerWrapper(miners.PairMarginMiner(pos_margin=-1.0, neg_margin=3.0))
    mining.register_forward_pre_hook(cloned, with_kwargs=True)
    observed["itself, mined"] = mining(*own, *own), mining(*own)

    # a rank that fails inside the loss, after it has changed
    memory = DistributedLossWrapper(CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=30))
    memory(DATA[rows], LABELS[rows])
    before = memory.loss.embedding_memory.clone(), memory.loss.queue_idx
    hook = memory.loss.loss.register_forward_hook(out_of_memory) if rank == 1 else None
    observed["failed inside"] = error_of(lambda: memory(DATA[rows] + 1, LABELS[rows]))
    observed["memory after"] = (memory.loss.embedding_memory.clone(), memory.loss.queue_idx), before
    if hook is not None:
        hook.remove()
    observed["memory goes on"] = error_of(lambda: memory(DATA[rows] + 1, LABELS[rows]))

    # what differs between ranks, once, at the first call
    def weighted():
        return DistributedLossWrapper(HybridLoss(NUM_CLASSES, SIZE, proxy_weight=0.03).double())

    for key in ("weight", "mode", "reducer", "parameters", "order", "frozen", "tensor", "efficient"):
        wrapped = weighted()
        wrapped.loss.pair_loss.alpha = torch.tensor(2.0)
        if rank == 1:
            differ(wrapped, key)
        observed["differs", key] = error_of(lambda w=wrapped: w(DATA[rows], LABELS[rows]))
    wrapped = weighted()
    wrapped(DATA[rows], LABELS[rows])
    wrapped.loss.proxy_weight = 0.1 + rank  # later it is not looked at
    observed["differs", "later"] = error_of(lambda: wrapped(DATA[rows], LABELS[rows]))
    miner = DistributedMinerWrapper(miners.MultiSimilarityMiner(epsilon=0.1 + rank))
    observed["differs", "miner"] = error_of(lambda: miner(DATA[rows], LABELS[rows]))

    memory = DistributedLossWrapper(CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=30))
    memory.loss.has_been_filled = rank == 1
    observed["differs", "filled"] = error_of(lambda: memory(DATA[rows], LABELS[rows]))

    # a miner that fails on one rank, or gives what cannot be
    for efficient in (False, True):
        mining = DistributedMinerWrapper(miners.BatchHardMiner(collect_stats=True), efficient=efficient)
        mining(DATA[rows], LABELS[rows])
        statistics = mining.miner.hardest_pos_pair
        found = mining.miner.mine
        for key, broken in (("fails", out_of_memory), ("far", lambda *_: (torch.tensor([99]),) * 3)):
            mining.miner.mine = broken if rank == 1 and not (efficient and key == "far") else found
            observed["miner", key, efficient] = error_of(lambda m=mining: m(DATA[rows] * 2, LABELS[rows]))
        observed["miner", "statistics", efficient] = mining.miner.hardest_pos_pair, statistics
        mining.miner.mine = found
        observed["miner", "goes on", efficient] = error_of(lambda m=mining: m(DATA[rows], LABELS[rows]))

    # bad input on one rank
    wrapped = DistributedLossWrapper(ProxyAnchorLoss(NUM_CLASSES, SIZE).double())
    bad = LABELS[rows] + (10 if rank == 1 else 0)
    observed["bad labels"] = error_of(lambda: wrapped(DATA[rows], bad))
    observed["no tensor"] = error_of(lambda: wrapped(None if rank == 1 else DATA[rows], LABELS[rows]))
    pairs = DistributedLossWrapper(MultiSimilarityLoss())
    observed["width"] = error_of(lambda: pairs(DATA[rows, : SIZE - (rank == 1)], LABELS[rows]))
    observed["dtype"] = error_of(lambda: pairs(DATA[rows].float() if rank == 1 else DATA[rows], LABELS[rows]))
    some = tuple(torch.tensor([0, 1]) for _ in range(3))
    observed["tuple on one"] = error_of(lambda: pairs(DATA[rows], LABELS[rows], some if rank == 1 else None))
    far = tuple(torch.tensor([0, 99]) for _ in range(3))
    for efficient in (False, True):
        wrapped = DistributedLossWrapper(MultiSimilarityLoss(), efficient=efficient)
        good = None if efficient else some
        mined = far if rank == 1 else good
        observed["far index", efficient] = error_of(lambda w=wrapped, mined=mined: w(DATA[rows], LABELS[rows], mined))
    memory = DistributedLossWrapper(CrossBatchMemory(MultiSimilarityLoss(), SIZE, memory_size=30))
    mask = torch.ones(len(rows) + 1, dtype=torch.bool)
    own = mask if rank == 1 else mask[1:]
    observed["mask on one"] = error_of(
        lambda: memory(DATA[rows], LABELS[rows], enqueue_mask=mask[1:] if rank == 1 else None)
    )
    observed["mask too long"] = error_of(lambda: memory(DATA[rows], LABELS[rows], enqueue_mask=own))
    observed["memory, refs"] = error_of(lambda: memory(DATA[rows], LABELS[rows], ref_emb=DATA if rank == 1 else None))
    mining = DistributedMinerWrapper(miners.BatchHardMiner())
    observed["miner"] = error_of(lambda: mining(DATA[rows][0] if rank == 1 else DATA[rows], LABELS[rows]))
    observed["classes"] = error_of(lambda: DistributedLossWrapper(ProxyAnchorLoss(NUM_CLASSES + rank, SIZE)))
    observed["negative labels"] = error_of(
        lambda: DistributedLossWrapper(losses.ContrastiveLoss())(DATA[rows], LABELS[rows] - 1)
    )
    observed["uint64"] = error_of(lambda: pairs(DATA[rows], LABELS[rows].to(torch.uint64)))
    observed["complex"] = error_of(lambda: pairs(DATA[rows], LABELS[rows] * (1j if rank == 1 else 1)))
    refs = DATA[rows] + 1, LABELS[rows]
    observed["one object"] = error_of(
        lambda: pairs(DATA[rows], refs[1], None, refs[0], refs[1].clone() if rank == 1 else refs[1])
    )
    set_validation(False)
    observed["shape"] = error_of(lambda: pairs(DATA[rows][0] if rank == 1 else DATA[rows], LABELS[rows]))
    set_validation(True)
    differing = tuple(torch.tensor([0, 1 + rank]) for _ in range(3))
    observed["tuples differ"] = error_of(lambda: pairs(DATA[rows], LABELS[rows], differing))
    return observed


def worker(rank, world, init_file, results):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    splits = [part.tolist() for part in torch.arange(len(DATA)).split(SIZES[world])]
    rows, observed = splits[rank], {}
    for name, case in CASES.items():
        observed[name, False] = together(lambda case=case: make(case), rows)
        if case.refs:
            observed[name, True] = sums(case, rows, splits)
    for name, make_loss in pml_losses().items():
        observed[name, False] = together(make_loss, rows)
    observed |= others(rank, world, rows, splits)
    torch.save(observed, f"{results}.{rank}")
    gc.collect()  # with something that holds the group, gloo's threads may abort the process while it exits
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def observed(request, tmp_path_factory):
    """What each rank has observed."""
    folder = tmp_path_factory.mktemp("gloo")
    results = str(folder / "results")
    start(worker, (request.param, str(folder / "rendezvous"), results), request.param)
    return [torch.load(f"{results}.{rank}", weights_only=False) for rank in range(request.param)]


def assert_same(pair, rtol=1e-9, atol=1e-13):
    for a, b in zip(*pair, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [*CASES, *pml_losses()])
def test_value_and_gradients_are_those_of_one_process(observed, name):
    for one in observed:
        result = one[name, False]
        torch.testing.assert_close(*result["loss"], rtol=1e-9, atol=1e-13)
        assert any(g.abs().max() > 1e-6 for g in result["model"][1])
        assert_same(result["model"])
        assert_same(result["loss_func"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refs])
def test_efficient_is_the_sum_over_ranks(observed, name):
    for one in observed:
        result = one[name, True]
        torch.testing.assert_close(*result["loss"], rtol=1e-9, atol=1e-13)
        assert_same(result["model"])
        assert_same(result["loss_func"])


def test_ranks_agree(observed):
    for key, result in observed[0].items():
        if isinstance(result, dict) and "loss" in result:
            for other in observed[1:]:
                assert torch.equal(other[key]["loss"][0], result["loss"][0]), key


def test_parameters_and_buffers_are_those_of_the_first_rank(observed):
    for one in observed:
        for name, x in one["broadcast"].items():
            assert torch.equal(x, observed[0]["broadcast"][name])
            if "running_mean" not in name:
                assert torch.equal(x, one["first rank's"][name]), name
    assert observed[0]["broadcast"]["norm.running_mean"].any()


@pytest.mark.parametrize("key", [("miner", "hard"), ("miner", "random"), ("refs", True), ("refs", False)], ids=str)
def test_miners_and_references(observed, key):
    for one in observed:
        torch.testing.assert_close(*one[key]["loss"], rtol=1e-9, atol=1e-13)
        assert_same(one[key]["model"])
    if key[0] == "refs":
        assert observed[0]["refs", True]["loss"][0] != observed[0]["refs", False]["loss"][0]


def test_miner_wrappers_of_both_libraries_fit(observed):
    for one in observed:
        torch.testing.assert_close(
            one["mined", False, "pml_ext.distributed.miner_wrapper"], one["mined", False, "expected"]
        )
        for efficient in (True, False):
            ours = one["mined", efficient, "pml_ext.distributed.miner_wrapper"]
            theirs = one["mined", efficient, "pytorch_metric_learning.utils.distributed"]
            torch.testing.assert_close(ours, theirs)


def test_memory(observed):
    for one in observed:
        for kind in ("pml_ext.losses.cross_batch_memory", "pytorch_metric_learning.losses.cross_batch_memory"):
            for value, expected in one["memory", kind]:
                torch.testing.assert_close(value, expected)
            assert torch.equal(*one["memory rows", kind])
        assert "indices_tuple must not be given with CrossBatchMemory" in one["memory, tuple"]


def test_accumulation_and_training(observed):
    for one in observed:
        assert_same(one["accumulated"]["model"])
        assert_same(one["accumulated"]["loss_func"])
        assert_same(one["trained"])


def test_half_precision_and_checkpointing(observed):
    for one in observed:
        emb_dtype, loss_dtype, loss, expected, dtypes = one["half"]
        assert (emb_dtype, loss_dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
        assert set(dtypes) == {torch.float32}


def test_generators_and_empty_ranks(observed):
    for one in observed:
        assert torch.equal(*one["generator"])
        torch.testing.assert_close(*one["empty rank"])
        assert one["empty rank, efficient"] == observed[0]["empty rank, efficient"] > 0
        assert torch.equal(*one["checkpointed loss"])


def test_efficient_with_a_compiled_loss(observed):
    for one in observed:
        compiled, plain = one["efficient, compiled"]
        assert plain[0] > 0
        torch.testing.assert_close(compiled, plain)


def test_bad_input_raises_on_all_ranks(observed):
    for rank, one in enumerate(observed):
        if rank == 1:
            assert one["bad labels"].startswith("ValueError: labels must be < num_classes = 5")
            assert one["no tensor"].startswith("TypeError: embeddings must be a torch.Tensor, got NoneType")
        else:
            for key in ("bad labels", "no tensor"):
                assert one[key].startswith("ValueError: all ranks must be given a valid batch, got an error on rank 1")
        assert one["negative labels"] == "no error"
        assert "loss must have parameters of the same shapes on all ranks" in one["classes"]
        assert "enqueue_mask must be given on all ranks or on none" in one["mask on one"]
        told = {
            ("far index", False): r"ValueError: indices_tuple[1] must be < the number of rows = 12, got 99",
            ("far index", True): "ValueError: indices_tuple[0] must be <",
            "mask too long": "ValueError: enqueue_mask must be a bool tensor of shape",
            "memory, refs": "ValueError: ref_emb must not be given with CrossBatchMemory",
            "miner": "ValueError: embeddings must have shape",
            "complex": "TypeError: labels must have an integer dtype",
            "shape": "ValueError: not enough values",
        }
        for key, message in told.items():
            expected = (
                message.split("[")[0] if rank == 1 else "ValueError: all ranks must be given a valid batch, got an err"
            )
            assert one[key].startswith(expected), (key, one[key])
        for key in ("width", "dtype"):
            assert one[key].startswith("ValueError: embeddings must have one width and dtype on all ranks"), one[key]
        assert "indices_tuple must be given on all ranks or on none" in one["tuple on one"]
        assert "indices_tuple must be the same on all ranks" in one["tuples differ"]
        assert "ref_labels must be the object labels on all ranks or on none" in one["one object"]
        assert one["uint64"] == "no error"


def test_the_batch_itself(observed):
    for one in observed:
        torch.testing.assert_close(*one["itself, hooks"])
        for a, b in zip(*one["itself, mined"], strict=True):
            assert torch.equal(a, b)
        assert not (one["itself, mined"][0][0] == one["itself, mined"][0][1]).any()
        assert len(one["itself, mined"][0][0])


def test_a_rank_that_fails_inside_of_the_loss_is_an_error_on_all(observed):
    for rank, one in enumerate(observed):
        expected = "RuntimeError: out of memory" if rank == 1 else "ValueError: all ranks must be given a valid batch"
        assert one["failed inside"].startswith(expected)
        (rows, position), (rows_before, position_before) = one["memory after"]
        assert torch.equal(rows, rows_before)
        assert position == position_before == len(DATA)
        assert one["memory goes on"] == "no error"


@pytest.mark.parametrize("efficient", [False, True])
def test_a_rank_whose_miner_fails_is_an_error_on_all(observed, efficient):
    for rank, one in enumerate(observed):
        told = "ValueError: all ranks must be given a valid batch"
        assert one["miner", "fails", efficient].startswith("RuntimeError: out of memory" if rank == 1 else told)
        if not efficient:
            assert one["miner", "far", efficient].startswith("IndexError" if rank == 1 else told)
            after, before = one["miner", "statistics", efficient]
            assert after == before != 0
        assert one["miner", "goes on", efficient] == "no error"


def test_settings_that_differ_are_noticed_at_the_first_call(observed):
    names = {
        "weight": "loss.proxy_weight",
        "mode": "loss.proxy_loss.training",
        "reducer": "loss.pair_loss.reducer",
        "parameters": "loss.proxy_loss.proxies",
        "order": "loss.proxy_loss.proxies",
        "frozen": "loss.proxy_loss.proxies",
        "tensor": "loss.pair_loss.alpha",
        "filled": "loss.extra state",
        "efficient": "efficient",
        "miner": "miner.epsilon",
    }
    for one in observed:
        for key, name in names.items():
            kind = "miner" if key == "miner" else "loss"
            assert one["differs", key].startswith(f"ValueError: {kind} must be the same on all ranks, got {name}")
        assert one["differs", "later"] == "no error"
    weight = observed[0]["differs", "weight"]
    assert weight.endswith("got loss.proxy_weight = 0.03 here, 0.3 on rank 1")


def slow_worker(rank, init_file, results):
    """The second rank does not come to the loss."""
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{init_file}.here", 2)
    store.set(str(rank), "here")
    store.wait(["0", "1"])  # or the first might not wait long enough for the second to start
    timeout = datetime.timedelta(seconds=3)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2, timeout=timeout)
    wrapped = DistributedLossWrapper(MultiSimilarityLoss())
    if rank == 0:
        torch.save(error_of(lambda: wrapped(DATA, LABELS)), results)
    while not os.path.exists(results):
        time.sleep(0.05)
    gc.collect()
    dist.destroy_process_group()


def test_a_rank_that_does_not_come_is_an_error(tmp_path):
    results = str(tmp_path / "results")
    start(slow_worker, (str(tmp_path / "rendezvous"), results), 2)
    error = torch.load(results, weights_only=False)
    assert error.startswith("RuntimeError: all_gather of the sizes of the batches failed, a rank may be slow or dead")
