"""Losses whose classes are split over two and three gloo processes, against one process that has them all."""

import contextlib
import copy
import gc
import warnings
from unittest import mock

import pytest
import torch
from pytorch_metric_learning import distances, miners
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import AdaptiveAdditiveMarginLoss, EnsembleLoss, HybridLoss, ProxyAnchorLoss
from pml_ext.streaming import margin_softmax
from tests.contract.cases import LABELS, SIZE, embeddings
from tests.processes import start

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("sharding")]  # they share a fixture

SIZES = {2: [5, 7], 3: [3, 4, 5]}  # rows of each rank
DATA = embeddings(torch.float64).detach()
NAMES = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
NAMES[3] = 0  # not described
DISTANCES = torch.cdist(NAMES, NAMES)


def proxy_anchor(num_classes=5, **kwargs):
    return lambda group: ProxyAnchorLoss(num_classes, SIZE, process_group=group, **kwargs)


def margin(**kwargs):
    return lambda group: AdaptiveAdditiveMarginLoss(5, SIZE, base_margin=0.1, process_group=group, **kwargs)


MAKERS = {
    "ProxyAnchorLoss": proxy_anchor(),
    "ProxyAnchorLoss, chunks of 1": proxy_anchor(chunk_size=1),
    "ProxyAnchorLoss, large alpha": proxy_anchor(alpha=300.0),
    "ProxyAnchorLoss, dot product": proxy_anchor(distance=distances.DotProductSimilarity(normalize_embeddings=False)),
    "ProxyAnchorLoss, 4 classes": proxy_anchor(4),  # on three ranks the last has none
    "AdaptiveAdditiveMarginLoss": margin(),
    "AdaptiveAdditiveMarginLoss, cosine": margin(class_embeddings=NAMES),
    "AdaptiveAdditiveMarginLoss, euclidean": margin(class_embeddings=NAMES, class_metric="euclidean", chunk_size=2),
    "AdaptiveAdditiveMarginLoss, table": margin(class_distances=DISTANCES, direction="similarity", chunk_size=1),
    "AdaptiveAdditiveMarginLoss, memory": margin(class_embeddings=NAMES, chunk_size=1, memory=10**4),
    "HybridLoss": lambda group: HybridLoss(5, SIZE, proxy_weight=1.0, process_group=group),
    "EnsembleLoss": lambda group: EnsembleLoss(lambda: ProxyAnchorLoss(5, SIZE // 2, process_group=group), 2),
}


def build(make, group):
    """Return a model and a loss; the proxies are the same numbers, split or not."""
    torch.manual_seed(3)
    model, loss_func = torch.nn.Linear(SIZE, SIZE).double(), make(group).double()
    fill(loss_func)
    return model, loss_func


def fill(loss_func):
    """Set all proxies to given numbers."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in loss_func.parameters():
            whole = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if isinstance(p, DTensor):
                local = p.to_local()
                first = dist.get_rank() * -(-len(whole) // dist.get_world_size())
                local.copy_(whole[first : first + len(local)])
            else:
                p.copy_(whole)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def grads(module):
    return [whole(p.grad).clone() for p in module.parameters()]


def together(make, group, rows, labels, mined=None):
    model, loss_func = build(make, group)
    single_model, single_loss = build(make, None)
    ddp = DistributedDataParallel(model)
    emb = ddp(DATA[rows])
    tuples = None
    if mined is not None:  # the same on all ranks, counted with own rows first
        order = [*rows, *(i for i in range(len(DATA)) if i not in rows)]
        tuples = tuple(torch.tensor([order.index(i) for i in x.tolist()]) for x in mined)
    loss = DistributedLossWrapper(loss_func)(emb, labels[rows], tuples)
    loss.backward()
    expected = single_loss(single_model(DATA), labels, mined)
    expected.backward()
    return {
        "loss": (loss.detach(), expected.detach()),
        "model": (grads(model), grads(single_model)),
        "loss_func": (grads(loss_func), grads(single_loss)),
        "rows": [len(p.to_local()) for p in loss_func.parameters() if isinstance(p, DTensor)],
        "buffers": {name: tuple(x.to_local().shape) for name, x in loss_func.named_buffers() if isinstance(x, DTensor)},
    }


FAILING = [
    ("ProxyAnchorLoss", "", "compute_loss"),
    ("ProxyAnchorLoss", "", "reduce_terms"),
    ("AdaptiveAdditiveMarginLoss, cosine", "", "_class_margins"),
    ("AdaptiveAdditiveMarginLoss, cosine", "", "reduce_terms"),
    ("HybridLoss", "pair_loss", "compute_loss"),
    ("HybridLoss", "", "reduce_terms"),
]


def error_of(call):
    try:
        call()
    except Exception as error:  # what is raised is the result
        return f"{type(error).__name__}: {error}"
    return "no error"


def others(rank, world, group, rows, folder):
    observed = {}
    # several steps of an optimizer, whose state is split too
    results = []
    for where, part in ((group, rows), (None, list(range(len(DATA))))):
        model, loss_func = build(MAKERS["HybridLoss"], where)
        net, loss = model, loss_func
        if where is not None:
            net, loss = DistributedDataParallel(model), DistributedLossWrapper(loss_func)
        optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()], lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            loss(net(DATA[part] + step), LABELS[part]).backward()
            optimizer.step()
        results.append([whole(p).detach().clone() for p in (*model.parameters(), *loss_func.parameters())])
        if where is not None:
            state = optimizer.state[loss_func.proxy_loss.proxies]["exp_avg"]
            observed["state rows"] = len(state.to_local())
            observed["model state"] = model.state_dict()
            split, split_optimizer = loss_func, optimizer
    observed["trained"] = tuple(results)

    # the checkpoint of a split loss, and that of an unsplit one
    checkpoint.save({"loss": split.state_dict()}, checkpoint_id=f"{folder}/split{world}")
    fresh = build(MAKERS["HybridLoss"], group)[1]
    state = {"loss": fresh.state_dict()}
    checkpoint.load(state, checkpoint_id=f"{folder}/unsplit")
    fresh.load_state_dict(state["loss"])
    observed["from unsplit"] = whole(fresh.proxy_loss.proxies).detach().clone()
    observed["optimizer keys"] = sorted(split_optimizer.state_dict()["state"])
    plain = torch.optim.AdamW(split.parameters(), lr=0.01)
    DistributedLossWrapper(split)(DATA[rows], LABELS[rows]).backward()
    plain.step()
    state = get_optimizer_state_dict(split, plain)
    checkpoint.save(state, checkpoint_id=f"{folder}/optimizer{world}")
    again = torch.optim.AdamW(fresh.parameters(), lr=0.5)
    DistributedLossWrapper(fresh)(DATA[rows], LABELS[rows]).backward()
    again.step()
    state = get_optimizer_state_dict(fresh, again)
    checkpoint.load(state, checkpoint_id=f"{folder}/optimizer{world}")
    set_optimizer_state_dict(fresh, again, state)
    observed["optimizer"] = tuple(
        whole(optimizer.state[loss.proxy_loss.proxies]["exp_avg"]).clone()
        for optimizer, loss in ((plain, split), (again, fresh))
    )

    # mixed precision with a scaler, and clipping: an optimizer and a list of its own for the split proxies
    norms = []
    for where, part in ((group, rows), (None, list(range(len(DATA))))):
        model, loss_func = build(MAKERS["HybridLoss"], where)
        net, loss = model.float(), loss_func.float()
        if where is not None:
            net, loss = DistributedDataParallel(model), DistributedLossWrapper(loss_func)
        optimizers = [torch.optim.AdamW(module.parameters(), lr=0.01) for module in (model, loss_func)]
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(net(DATA[part].float()), LABELS[part])
        scaler.scale(value).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(loss_func.parameters(), 0.01)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        norms.append([whole(norm).item(), whole(loss_func.proxy_loss.proxies.grad).norm().item()])
    observed["clipped"] = norms

    # other ways to say which ranks, and how proxies start
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(6)
    observed["mesh"] = whole(ProxyAnchorLoss(900, 40, process_group=mesh).proxies).detach().clone()

    torch.manual_seed(6)
    learners = EnsembleLoss(lambda: ProxyAnchorLoss(5, SIZE // 2, process_group=group), 2).losses.values()
    observed["learners"] = [whole(learner.proxies).detach().clone() for learner in learners]
    emb = DATA.clone().requires_grad_()
    net = DistributedLossWrapper(MAKERS["HybridLoss"](group).double())
    (grad,) = torch.autograd.grad(net(emb[rows], LABELS[rows]), emb, create_graph=True)
    observed["penalty"] = error_of(lambda: grad.square().sum().backward())
    alone = [dist.new_group([r]) for r in range(world)][rank]
    other = DistributedLossWrapper(MAKERS["ProxyAnchorLoss"](group).double(), process_group=alone)
    observed["other group"] = error_of(lambda: other(DATA[rows], LABELS[rows]))
    observed["classes"] = error_of(lambda: ProxyAnchorLoss(5 + rank, SIZE, process_group=group))
    observed["margins"] = error_of(lambda: MAKERS["AdaptiveAdditiveMarginLoss, cosine"](group).get_margins(LABELS))
    needy = DATA[rows].clone().requires_grad_(rank == 0)
    observed["gradient on one"] = error_of(lambda: net(needy, LABELS[rows]))
    hybrid = DistributedLossWrapper(MAKERS["HybridLoss"](group).double(), efficient=True)
    observed["efficient"] = error_of(lambda: hybrid(DATA[rows], LABELS[rows]))
    observed["bare"] = error_of(lambda: MAKERS["ProxyAnchorLoss"](group)(DATA.float(), LABELS))
    wrapped = DistributedLossWrapper(MAKERS["ProxyAnchorLoss"](group).double())
    observed["labels"] = error_of(lambda: wrapped(DATA[rows], LABELS[rows] + (3 if rank == 0 else 0)))
    observed["logits"] = error_of(lambda: wrapped.loss.get_logits(DATA))
    observed["distance"] = error_of(lambda: proxy_anchor(distance=distances.LpDistance())(group))
    observed["group"] = error_of(lambda: proxy_anchor()("all"))
    # a rank that fails at different points of a loss
    for name, part, method in FAILING:
        wrapped = DistributedLossWrapper(MAKERS[name](group).double())
        wrapped(DATA[rows], LABELS[rows])
        broken = mock.patch.object(wrapped.loss.get_submodule(part), method, side_effect=RuntimeError("out of memory"))
        with broken if rank == 1 else contextlib.nullcontext():
            observed["fails", name, part, method] = error_of(lambda w=wrapped: w(DATA[rows], LABELS[rows]))
        observed["goes on", name, part, method] = error_of(lambda w=wrapped: w(DATA[rows], LABELS[rows]))
    wrapped = DistributedLossWrapper(MAKERS["AdaptiveAdditiveMarginLoss, cosine"](group).double())
    broken = mock.patch.object(margin_softmax, "_losses", side_effect=RuntimeError("out of memory"))
    with broken if rank == 1 else contextlib.nullcontext():  # between two exchanges
        observed["fails", "walk"] = error_of(lambda: wrapped(DATA[rows], LABELS[rows]))
    copied = copy.deepcopy(wrapped.loss)
    observed["copy"] = torch.equal(whole(copied.proxies), whole(wrapped.loss.proxies)) and (
        copied.proxies.to_local().data_ptr() != wrapped.loss.proxies.to_local().data_ptr()
    )
    return observed


def worker(rank, world, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    group = dist.group.WORLD
    rows = torch.arange(len(DATA)).split(SIZES[world])[rank].tolist()
    observed = {}
    for name, make in MAKERS.items():
        labels = LABELS % 4 if "4 classes" in name else LABELS
        observed[name] = together(make, group, rows, labels)
    mined = miners.BatchHardMiner()(DATA, LABELS)
    for name in ("ProxyAnchorLoss", "AdaptiveAdditiveMarginLoss, cosine", "HybridLoss"):
        observed[f"{name}, mined"] = together(MAKERS[name], group, rows, LABELS, mined)
    observed |= others(rank, world, group, rows, folder)
    torch.save(observed, f"{folder}/results{world}.{rank}")
    del group
    gc.collect()  # with something that holds the group, gloo's threads may abort the process while it exits
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def observed(request, tmp_path_factory):
    """What each rank has observed, and the folder with the checkpoints."""
    folder, world = tmp_path_factory.mktemp("shards"), request.param
    unsplit = build(MAKERS["HybridLoss"], None)[1]
    checkpoint.save({"loss": unsplit.state_dict()}, checkpoint_id=str(folder / "unsplit"), no_dist=True)
    start(worker, (world, str(folder)), world)
    results = [torch.load(folder / f"results{world}.{rank}", weights_only=False) for rank in range(world)]
    return results, folder, unsplit


def assert_same(pair, rtol=1e-9, atol=1e-12):
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


MINED = [f"{name}, mined" for name in ("ProxyAnchorLoss", "AdaptiveAdditiveMarginLoss, cosine", "HybridLoss")]


@pytest.mark.parametrize("name", [*MAKERS, *MINED])
def test_value_and_gradients_are_those_of_one_process(observed, name):
    for one in observed[0]:
        torch.testing.assert_close(*one[name]["loss"], rtol=1e-9, atol=1e-12)
        assert all(g.abs().max() > 1e-6 for g in one[name]["model"][1])
        assert_same(one[name]["model"])
        assert_same(one[name]["loss_func"])


def test_each_rank_has_its_part(observed):
    ranks = len(observed[0])
    rows = {2: [3, 2], 3: [2, 2, 1]}[ranks]
    for rank, one in enumerate(observed[0]):
        assert one["ProxyAnchorLoss"]["rows"] == [rows[rank]]
        assert one["EnsembleLoss"]["rows"] == [rows[rank]] * 2
        assert one["ProxyAnchorLoss, 4 classes"]["rows"] == [{2: [2, 2], 3: [2, 2, 0]}[ranks][rank]]
        assert one["AdaptiveAdditiveMarginLoss, cosine"]["buffers"]["class_embeddings"] == (rows[rank], 4)
        assert one["AdaptiveAdditiveMarginLoss, table"]["buffers"]["class_distances"] == (5, rows[rank])
        assert one["state rows"] == rows[rank]


def test_training(observed):
    for one in observed[0]:
        assert_same(one["trained"], rtol=1e-7, atol=1e-9)


def test_mixed_precision_and_clipping(observed):
    for one in observed[0]:
        split, single = one["clipped"]
        assert split == pytest.approx(single, rel=0.02)
        assert split[1] == pytest.approx(0.01, rel=1e-3)  # clipped


def test_checkpoints(observed):
    """Saved on all ranks, loaded in one process, and the other way round; the optimizer's state too."""
    results, folder, unsplit = observed
    for one in results:
        assert torch.equal(one["from unsplit"], unsplit.proxy_loss.proxies)
        assert torch.equal(*one["optimizer"])
        assert one["optimizer"][0].any()
    single = build(MAKERS["HybridLoss"], None)[1]
    state = {"loss": single.state_dict()}
    checkpoint.load(state, checkpoint_id=str(folder / f"split{len(results)}"), no_dist=True)
    single.load_state_dict(state["loss"])
    torch.testing.assert_close(single.proxy_loss.proxies, results[0]["trained"][0][-1])


def test_proxies_start_as_those_of_an_unsplit_loss(observed):
    """With the deviation for all classes, not for those of a rank, and other numbers on each rank."""
    for one in observed[0]:
        assert one["mesh"].std().item() == pytest.approx((2 / 900) ** 0.5, rel=0.02)
        part = -(-900 // len(observed[0]))
        assert not torch.equal(one["mesh"][:part], one["mesh"][part : 2 * part])
        assert torch.equal(one["mesh"], observed[0][0]["mesh"])


def test_a_rank_that_fails_is_an_error_on_all(observed):
    for rank, one in enumerate(observed[0]):
        expected = "RuntimeError: out of memory" if rank == 1 else "ValueError: all ranks must be given a valid batch"
        for key in (("walk",), *FAILING):
            assert one[("fails", *key)].startswith(expected), key
        for key in FAILING:
            assert one[("goes on", *key)] == "no error"


def test_errors_and_copies(observed):
    for rank, one in enumerate(observed[0]):
        for key in ("bare", "efficient"):
            assert "must be called through pml_ext.distributed.DistributedLossWrapper with efficient=False" in one[key]
        expected = "labels must be < num_classes = 5" if rank == 0 else "got an error on rank 0"
        assert expected in one["labels"]
        assert not torch.equal(*one["learners"])
        assert one["penalty"].startswith("NotImplementedError: ")
        assert "process_group of the loss must lie within that of DistributedLossWrapper" in one["other group"]
        assert "num_classes and embedding_size must be the same on all ranks" in one["classes"]
        assert one["margins"].startswith("NotImplementedError: get_margins needs all classes in one place")
        assert "embeddings must require a gradient on all ranks or on none" in one["gradient on one"]
        assert one["logits"].startswith("NotImplementedError: get_logits needs all proxies in one place")
        assert one["distance"].startswith("ValueError: distance must be a CosineSimilarity")
        assert one["group"].startswith("TypeError: process_group must be a ProcessGroup or a DeviceMesh, got str")
        assert one["copy"]
