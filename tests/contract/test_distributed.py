"""Every loss under PML's DistributedLossWrapper, on two gloo processes."""

import copy
import gc
import warnings

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.contract.cases import CASES, LABELS, SIZE, embeddings, make
from tests.pml_internals import pml_dist
from tests.processes import start

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("contract")]  # they share a fixture

WORLD_SIZE = 2


def build(case):
    """Return a model and a loss with the same parameters in every process."""
    torch.manual_seed(3)
    return torch.nn.Linear(SIZE, SIZE).double(), make(case).double()


def gradients(module):
    return [p.grad.clone() for p in module.parameters() if p.requires_grad]


def sum_over_ranks(model, loss_func):
    """PML's ``efficient=True`` in one process: each rank's rows against all rows, the others' detached."""
    half = len(LABELS) // WORLD_SIZE
    total = 0
    for rank in range(WORLD_SIZE):
        emb = model(embeddings(torch.float64).detach())
        own, other = (slice(r * half, (r + 1) * half) for r in (rank, 1 - rank))
        ref, ref_labels = torch.cat([emb[own], emb[other].detach()]), torch.cat([LABELS[own], LABELS[other]])
        indices_tuple = pml_dist.get_indices_tuple(LABELS[own], ref_labels)
        total = total + loss_func(emb[own], LABELS[own], indices_tuple, ref, ref_labels)
    total.backward()


def refusal(loss_func, rows):
    """Return what a loss without references says to ``efficient=True``."""
    try:
        pml_dist.DistributedLossWrapper(loss_func, efficient=True)(embeddings(torch.float64)[rows], LABELS[rows])
    except ValueError as error:
        return str(error)


def worker(rank, init_file, results):
    """Run all losses in both modes; return gradients of model and loss, and what one process gives."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD_SIZE)
    rows = slice(rank * 6, (rank + 1) * 6)
    gathered = {}
    for name, case in CASES.items():
        for efficient in (False, True):
            if efficient and not case.refs:
                gathered[name, efficient] = refusal(build(case)[1], rows)
                continue
            model, loss_func = build(case)
            single_model, single_loss = copy.deepcopy(model), copy.deepcopy(loss_func)
            ddp = DistributedDataParallel(model)
            wrapped = pml_dist.DistributedLossWrapper(loss_func, efficient=efficient)
            loss = wrapped(ddp(embeddings(torch.float64).detach()[rows]), LABELS[rows])
            loss.backward()
            if efficient:
                sum_over_ranks(single_model, single_loss)
            else:
                single_loss(single_model(embeddings(torch.float64).detach()), LABELS).backward()
            gathered[name, efficient] = [gradients(m) for m in (model, single_model, loss_func, single_loss)]
    if rank == 0:
        torch.save(gathered, results)
    del ddp, wrapped
    gc.collect()  # with something that holds the group, gloo's threads may abort the process while it exits
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    args = (str(folder / "rendezvous"), str(folder / "results.pt"))
    start(worker, args, WORLD_SIZE)
    return torch.load(args[1], weights_only=True)


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_model_gradients_are_exact(gathered, name, efficient):
    if efficient and not CASES[name].refs:
        assert "ref_emb is not supported" in gathered[name, efficient]
        return
    model, single, _, _ = gathered[name, efficient]
    assert all(g.abs().max() > 1e-3 for g in single)
    for a, b in zip(model, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if list(make(case).parameters())])
def test_proxy_gradients_are_world_size_times_too_large(gathered, name):
    """PML's wrapper multiplies the loss by the world size, which DDP's mean undoes for the model alone."""
    _, _, loss_func, single = gathered[name, False]
    for a, b in zip(loss_func, single, strict=True):
        assert b.any()
        torch.testing.assert_close(a, WORLD_SIZE * b, rtol=1e-9, atol=1e-15)
