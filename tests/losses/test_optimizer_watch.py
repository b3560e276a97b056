import copy
import pickle
import warnings

import pytest
import torch
from pytorch_metric_learning import losses, trainers
from pytorch_metric_learning.distances import CosineSimilarity

from pml_ext.distributed import DistributedLossWrapper
from pml_ext.losses import (
    CrossBatchMemory,
    EnsembleLoss,
    HybridLoss,
    MultiSimilarityLoss,
    ProxyAnchorLoss,
    SelfSupervisedLoss,
    optimizer_watch,
)

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
MESSAGE = r"has parameters that 10 batches have not changed: give loss_func.parameters\(\) to an optimizer"


def train(loss_func, batches, optimizer=None, zero_first=True):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(batches):
            if optimizer is not None and zero_first:
                optimizer.zero_grad()
            loss = loss_func(X.clone().requires_grad_(), Y)
            if optimizer is not None and not zero_first:
                optimizer.zero_grad()
            loss.backward()
            if optimizer is not None:
                optimizer.step()
    return [str(entry.message) for entry in caught if "have not changed" in str(entry.message)]


@pytest.mark.parametrize(
    "loss_func",
    [ProxyAnchorLoss(3, 4), HybridLoss(3, 4), EnsembleLoss(lambda: ProxyAnchorLoss(3, 2), 2)],
    ids=lambda loss_func: type(loss_func).__name__,
)
def test_parameters_without_optimizer_are_noticed_once(loss_func):
    assert not train(loss_func, 10)
    (message,) = train(loss_func, 20)
    assert message.startswith(type(loss_func).__name__) and 'optimizers["metric_loss_optimizer"]' in message


def cleared(loss_func, batches, set_to_none=True, first=True):
    """Train nothing, and clear the gradients of all parameters before or behind each batch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(batches):
            if first:
                loss_func.zero_grad(set_to_none)
            loss_func(X.clone().requires_grad_(), Y).backward()
            if not first:
                loss_func.zero_grad(set_to_none)
    return [str(entry.message) for entry in caught if "have not changed" in str(entry.message)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_whose_gradients_are_cleared_are_noticed(set_to_none, first):
    """As ``model.zero_grad()`` does in a loop whose optimizer lacks them."""
    loss_func = HybridLoss(3, 4)
    assert not cleared(loss_func, 10, set_to_none, first)
    (message,) = cleared(copy.deepcopy(loss_func), 11, set_to_none, first)  # which begins anew
    assert "unchanged: " in message
    assert len(cleared(loss_func, 1, set_to_none, first)) == 1


def test_silence_without_backward():
    """Where a loss is computed for the eye only, with gradients on."""
    loss_func = ProxyAnchorLoss(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(33):
            loss_func(X, Y)
    assert len(loss_func.proxies._post_accumulate_grad_hooks) == 1  # not one more with each look


@pytest.mark.parametrize("zero_first", [True, False])
def test_silence_with_an_optimizer(zero_first):
    loss_func = ProxyAnchorLoss(3, 4)
    assert not train(loss_func, 13, torch.optim.SGD(loss_func.parameters(), lr=0.1), zero_first)
    assert not train(loss_func, 13)  # whoever stops to train them later knows it


def test_silence_where_nothing_can_be_trained():
    assert not train(MultiSimilarityLoss(), 13)
    frozen = ProxyAnchorLoss(3, 4).requires_grad_(False)
    assert not train(frozen, 13)
    in_evaluation = ProxyAnchorLoss(3, 4)
    train(in_evaluation, 2)
    assert not train(in_evaluation.eval(), 13)


def test_within_other_losses():
    assert train(losses.MultipleLosses([ProxyAnchorLoss(3, 4)]), 13)
    assert train(DistributedLossWrapper(ProxyAnchorLoss(3, 4)), 13)
    (message,) = train(CrossBatchMemory(HybridLoss(3, 4), 4), 13)
    assert message.startswith("CrossBatchMemory has parameters")
    both = copy.deepcopy(pickle.loads(pickle.dumps(HybridLoss(3, 4))))
    assert len(train(both, 13)) == 1


class Scaled(CosineSimilarity):
    """A distance with a parameter: losses of two views have no other."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def compute_mat(self, query_emb, ref_emb):
        return self.scale * super().compute_mat(query_emb, ref_emb)


def test_two_views():
    loss_func = SelfSupervisedLoss(MultiSimilarityLoss(distance=Scaled()))
    assert len(train(lambda x, _: loss_func(x, X + 1), 13)) == 1


def test_in_a_trainer_of_pml():
    loss_func = ProxyAnchorLoss(3, 4)
    trunk = torch.nn.Linear(4, 4)
    trainer = trainers.MetricLossOnly(
        {"trunk": trunk},
        {"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.01)},
        12,
        {"metric_loss": loss_func},
        torch.utils.data.TensorDataset(X, Y),
        iterations_per_epoch=13,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
    )
    with pytest.warns(UserWarning, match=MESSAGE):
        trainer.train()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_silence_with_a_fused_optimizer(make):
    """Fused steps do not raise the version of a tensor."""
    loss_func = ProxyAnchorLoss(3, 4)
    assert not train(loss_func, 23, make(loss_func.parameters(), lr=0.1, fused=True), zero_first=False)


def test_silence_while_gradients_are_accumulated():
    loss_func = ProxyAnchorLoss(3, 4)
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    assert not train(loss_func, 23)  # 23 backward passes, then the first step
    optimizer.step()
    assert not train(loss_func, 13)


def test_an_optimizer_is_looked_for_once(monkeypatch):
    """All objects of the process are looked through for it, which takes a tenth of a second."""
    loss_func, looks = ProxyAnchorLoss(3, 4), []
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    objects = optimizer_watch.gc.get_objects
    monkeypatch.setattr(optimizer_watch.gc, "get_objects", lambda: looks.append(1) or objects())
    assert not train(loss_func, 43)
    assert len(looks) == 1
    assert optimizer.param_groups


def test_silence_where_some_other_thing_trains():
    """What is no optimizer of PyTorch is known by what it changes."""
    loss_func = ProxyAnchorLoss(3, 4)
    for _ in range(7):
        assert not train(loss_func, 3)
        with torch.no_grad():
            loss_func.proxies -= 0.1 * loss_func.proxies.grad


def test_each_parameter_counts():
    """The first one is trained, the second gets no gradient, and the third is in no optimizer."""
    loss_func = ProxyAnchorLoss(3, 4)
    loss_func.distance = Scaled()
    loss_func.unused = torch.nn.Parameter(torch.ones(2))
    assert [name for name, _ in loss_func.named_parameters()] == ["proxies", "unused", "distance.scale"]
    (message,) = train(loss_func, 13, torch.optim.SGD([loss_func.proxies], lr=0.1))
    assert message.endswith("; unchanged: distance.scale")


def test_rows_without_gradients_are_no_proof():
    """Proxies of classes that do not occur get no gradients here; they stay as they are though they are trained."""
    loss_func = Rows()
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    assert not train(loss_func, 23, optimizer, zero_first=False)
    (message,) = train(Rows(), 23)
    assert message.endswith("; unchanged: rows")


class Rows(MultiSimilarityLoss):
    """Only one of many rows gets a gradient."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.ones(50, 4))

    def compute_loss(self, embeddings, *args):
        return super().compute_loss(embeddings * self.rows[17], *args)


def test_positions_of_the_largest_gradients(monkeypatch):
    for numbers in (0, 1, 3):  # none, or zero
        parameter = torch.nn.Parameter(torch.zeros(numbers))
        assert optimizer_watch._positions(parameter) is None
        parameter.grad = torch.zeros(numbers)
        assert optimizer_watch._positions(parameter) is None
    monkeypatch.setattr(optimizer_watch, "_AT_ONCE", 7)
    parameter = torch.nn.Parameter(torch.zeros(5, 9))
    parameter.grad = torch.randperm(45).view(5, 9) - 20.0
    largest = parameter.grad.flatten().abs().argsort(descending=True)[:8]
    assert set(parameter.grad.flatten()[optimizer_watch._positions(parameter)].abs().tolist()) == set(
        parameter.grad.flatten()[largest].abs().tolist()
    )
