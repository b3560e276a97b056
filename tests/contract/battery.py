"""The properties of a loss: those with a column are shown in docs/compatibility.md, and test_battery.py runs all.

A property is a function of a case (and of a device, where it takes one). A wrong value is an ``AssertionError``; a
combination that the library refuses raises, or returns the reason.
"""

import contextlib
import copy
import functools
import inspect
import io
import logging
import pickle
import random
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers, testers, trainers
from pytorch_metric_learning.utils import logging_presets
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel

import pml_ext.distributed
from pml_ext.losses import CrossBatchMemory, SelfSupervisedLoss
from tests.contract.cases import LABELS, NUM_CLASSES, SIZE, embeddings, grads_of, make, mean_of, trained
from tests.contract.clusters import IN_FEATURES, clusters
from tests.pml_internals import c_f, lmu, pml_dist

ALREADY_REDUCED = "No effect: the losses inside have reduced already. Give the reducer to them."
NOT_MINED = "No effect: what is mined is ignored, since samples are not compared with each other."
NO_DISTANCE = "No effect: the loss does not use `distance`."
GRAPH_BREAKS = "Refused: there are graph breaks."
WORLD_SIZE_TIMES = (
    "In several processes value and gradients of the loss's parameters are world size times too large: use ours."
)
HALVES = (torch.float16, torch.bfloat16)
ORDER = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
EMPTY = torch.empty(0, dtype=torch.long)
MINERS = {
    name: cls
    for name, cls in inspect.getmembers(miners, inspect.isclass)
    if issubclass(cls, miners.BaseMiner)
    and name not in ("BaseMiner", "EmbeddingsAlreadyPackagedAsTriplets")  # the latter needs one triplet after another
}


class Property(NamedTuple):
    """A check, and where the page shows it."""

    check: Callable[..., str | None]
    table: str | None  # None: not shown, and no case may refuse it
    explanation: str | None
    marks: tuple[str, ...]  # of pytest
    varies: bool  # what it refuses, and in which words, depends on the version of torch


PROPERTIES: dict[str, Property] = {}


def shown(table, columns, *marks, varies=False):
    """Let a function be the property that columns show, each with its second argument; its docstring explains them."""

    def register(check):
        for name, argument in columns.items():
            bound = check if argument is None else functools.partial(check, argument)
            PROPERTIES[name] = Property(bound, table, check.__doc__, marks, varies)
        return check

    return register


def hidden(check):
    """Let a function be a property that every loss has."""
    PROPERTIES[check.__name__.replace("_", " ")] = Property(check, None, check.__doc__, (), False)
    return check


def outcome(name, case, **kwargs):
    """Return None where a case has a property, else the reason: the library's message, or what the check returns."""
    check, table, *_ = PROPERTIES[name]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (PML's samplers draw from it)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return check(case, **kwargs)
        except AssertionError:
            raise
        except Exception as error:
            refused = isinstance(error, TypeError | ValueError) or type(error) is Exception  # as PML's wrappers raise
            if table is None or not refused:
                raise
            return describe(error, case)


def describe(error, case):
    """Return an error's type and the first line of its message, with the case's own name left out."""
    message = re.sub(
        rf"\b{type(make(case)).__name__}$|^{type(make(case)).__name__}(?= has)",
        "<this loss>",
        str(error).splitlines()[0],
    )
    return f"`{type(error).__name__}: {message}`".replace("|", "\\|")


def takes_views(loss_func):
    return isinstance(getattr(loss_func, "_orig_mod", loss_func), SelfSupervisedLoss)  # also where compiled


def is_memory(loss_func):
    return isinstance(loss_func, CrossBatchMemory)


def unwrapped(loss_func):
    return loss_func.loss if takes_views(loss_func) or is_memory(loss_func) else loss_func


def evaluate(loss_func, emb, **kwargs):
    """Return the loss of the contract's batch; of two views where that is what the loss takes."""
    if takes_views(loss_func):
        return loss_func(emb, **({"ref_emb": embeddings(emb.dtype, seed=1).detach()} | kwargs))
    return loss_func(emb, LABELS.to(emb.device), **kwargs)


def plain(case, emb):
    return evaluate(make(case), emb)


def close(actual, expected, rtol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6)


def check_trains(loss, *inputs):
    """Check for a value that is finite and not zero, with a gradient for each input."""
    assert loss.shape == ()
    assert loss.isfinite()
    assert loss != 0
    for grad in grads_of(loss, *inputs):
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.any()


# Values and batches


@hidden
def forward_has_the_arguments_of_pml(case):
    names = list(inspect.signature(make(case).forward).parameters)
    assert names == ["embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels"]


@hidden
def positive_scalar_with_a_gradient_for_each_sample(case, device):
    emb = embeddings()
    loss = make(case).to(device)(emb.to(device), LABELS)
    assert loss.shape == ()
    assert loss > 0
    (grad,) = grads_of(loss, emb)
    assert grad.isfinite().all()
    assert grad.abs().sum(1).gt(0).all()


@hidden
def finite_with_one_class_one_sample_or_none(case):
    for rows, labels in (
        (slice(None), torch.zeros(12, dtype=torch.long)),
        (slice(0, 1), torch.tensor([2])),
        (slice(0, 5), torch.arange(5)),
        (slice(0, 0), EMPTY),
    ):
        emb, loss_func = embeddings(), make(case)
        loss = loss_func(emb[rows], labels)
        loss.backward()
        assert loss.isfinite()
        assert emb.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(loss_func).values())


@hidden
def finite_gradients_of_zeros_of_equal_rows_and_of_large_halves(case):
    zeros = torch.zeros(12, SIZE, requires_grad=True)
    equal = embeddings().detach()[:1].repeat(4, 1).requires_grad_()
    large = (1000 * embeddings()).half().detach().requires_grad_()
    for emb in (zeros, equal, large):
        (grad,) = grads_of(make(case)(emb, LABELS[: len(emb)]), emb)
        assert grad.isfinite().all()


@hidden
def order_of_the_batch_does_not_matter(case):
    emb = embeddings(torch.float64)
    torch.testing.assert_close(make(case).double()(emb[ORDER], LABELS[ORDER]), make(case).double()(emb, LABELS))


@hidden
def inputs_are_not_changed(case):
    emb, labels = embeddings(), LABELS.clone()
    indices_tuple = miners.MultiSimilarityMiner()(emb, labels)
    copies = emb.detach().clone(), tuple(x.clone() for x in indices_tuple)
    make(case)(emb, labels, indices_tuple).backward()
    assert torch.equal(emb, copies[0])
    assert torch.equal(labels, LABELS)
    assert all(torch.equal(a, b) for a, b in zip(indices_tuple, copies[1], strict=True))


@hidden
def value_can_be_scaled_in_place(case):
    """Trainers do ``losses[name] *= weight`` on the returned tensor."""
    for kwargs in ({}, {"reducer": reducers.SumReducer()}):
        emb = embeddings()
        (once,) = grads_of(make(case, **kwargs)(emb, LABELS), emb)
        loss = make(case, **kwargs)(emb, LABELS)
        loss *= 2
        torch.testing.assert_close(grads_of(loss, emb)[0], 2 * once)


@hidden
def eval_computes_a_loss(case):
    loss_func = make(case).eval()
    loss = loss_func(embeddings(), LABELS)
    assert loss > 0
    assert torch.equal(loss_func(embeddings(), LABELS), loss)
    if not case.batch_norm:
        torch.testing.assert_close(make(case)(embeddings(), LABELS), loss)


@hidden
def labels_are_required(case):
    if case.uses_labels:
        with pytest.raises(ValueError, match="labels"):
            make(case)(embeddings())
    else:
        torch.testing.assert_close(make(case)(embeddings()), make(case)(embeddings(), LABELS))


@hidden
def unknown_arguments_are_refused(case):
    with pytest.raises(TypeError):
        make(case, no_such_argument=1)


def cloned(_, args, kwargs):
    """Replace all tensors, as hooks that run before a module may."""
    args = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
    return args, {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}


class Through(torch.nn.Module):
    """Hands on what it is given, as wrappers do."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args):
        return self.inside(*args)


@hidden
def hooks_and_wrappers_do_not_change_the_value(case):
    """Samples are not compared with themselves, whatever becomes of the objects on their way into a loss."""
    emb = embeddings()
    expected = plain(case, emb)
    (expected_grad,) = grads_of(expected, emb)

    def hooked(add):
        loss_func = make(case)
        for part in loss_func.modules():
            if isinstance(part, losses.BaseMetricLossFunction):
                add(part)
        return loss_func

    def outside():
        wrapper = Through(make(case))
        wrapper.register_full_backward_hook(lambda *_: None)
        return wrapper

    for loss_func in (
        hooked(lambda part: part.register_full_backward_hook(lambda *_: None)),
        hooked(lambda part: part.register_forward_pre_hook(cloned, with_kwargs=True)),
        outside(),
        lambda *args: torch.func.functional_call(make(case), dict(make(case).named_parameters()), args),
    ):
        for refs in ((), (None, emb, LABELS)):  # as PML has it, one object for both is the batch itself
            loss = loss_func(emb, LABELS, *refs)
            close(loss, expected)
            (grad,) = grads_of(loss, emb)
            assert grad.any()
            close(grad, expected_grad)


@hidden
def settings_learn_or_are_refused(case):
    """The gradient by a scale, margin or temperature that is a parameter is that of finite differences."""
    emb = embeddings(torch.float64)

    def value(path, name, setting):
        loss_func = make(case).double().train(not case.batch_norm)
        setattr(loss_func.get_submodule(path), name, setting)
        return loss_func(emb, LABELS)

    numbers = {  # one of each kind: learners are alike
        (type(part), name): (path, name, float(getattr(part, name)))
        for path, part in make(case).named_modules()
        if isinstance(part, losses.BaseMetricLossFunction)
        for name in getattr(part, "_record_these", [])
        if not name.startswith("num_") and not name.endswith("_size")
    }
    assert numbers
    for path, name, start in numbers.values():
        learned = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
        try:
            loss = value(path, name, learned)
        except TypeError as error:
            assert f"{name} must be a number here, got a tensor that requires a gradient" in str(error)  # noqa: PT017
            continue
        close(loss, value(path, name, start))
        step = 1e-6 * max(1.0, abs(start))
        slope = (value(path, name, start + step) - value(path, name, start - step)) / (2 * step)
        (grad,) = grads_of(loss, learned)
        assert grad is not None, name
        close(grad.squeeze(), slope.detach())


def _state(loss_func):
    """Return what a call must leave alone where it is refused."""
    kinds = c_f.list_of_recordable_attributes_list_names()
    tensors = {name: x.clone() for name, x in loss_func.state_dict().items()}
    numbers = {
        (path, name): getattr(part, name)
        for path, part in loss_func.named_modules()
        for kind in kinds
        for name in getattr(part, kind, [])
    }
    watched = {path: dict(vars(part._optimizer_watch)) for path, part in loss_func.named_modules() if is_ours(part)}
    return tensors, numbers, watched


def is_ours(part):
    return hasattr(part, "_optimizer_watch")


@hidden
def refused_calls_change_nothing(case):
    """Buffers, running norms, settings, statistics and counters are those of before."""
    with mock.patch.object(c_f, "COLLECT_STATS", True):
        loss_func = make(case)
    emb = embeddings()
    loss_func(emb, LABELS)
    tensors, numbers, watched = _state(loss_func)
    far = (torch.tensor([0, 99]),) * 3
    failing = mock.Mock(side_effect=RuntimeError("out of memory"))
    reduces = mock.patch.object(loss_func.reducer, "forward", failing)  # the last that happens
    for args, context in (
        ((emb / 0, LABELS), contextlib.nullcontext()),
        ((emb, LABELS[:5]), contextlib.nullcontext()),
        ((emb, LABELS, far), contextlib.nullcontext()),
        ((emb, None if case.uses_labels else LABELS.float()), contextlib.nullcontext()),
        ((emb * 2, LABELS), reduces),
    ):
        with context, pytest.raises((TypeError, ValueError, RuntimeError)):
            loss_func(*args)
        after = _state(loss_func)
        assert after[1:] == (numbers, watched)
        assert all(torch.equal(x, tensors[name]) for name, x in after[0].items())


@hidden
def docstring_has_all_sections(case):
    doc = inspect.getdoc(type(make(case)))
    for section in ("Args:", "Shape:", "Raises:", "Examples:", "Source:"):
        assert section in doc


# Miners and reducers


@hidden
def every_miner(case, device):
    emb, loss_func = embeddings(), make(case).to(device)
    for name, miner in MINERS.items():
        torch.manual_seed(0)
        indices_tuple = miner()(emb.to(device), LABELS.to(device))
        assert any(len(x) for x in indices_tuple), name
        loss = loss_func(emb.to(device), LABELS, indices_tuple)
        (grad,) = grads_of(loss, emb)
        assert loss.isfinite(), name
        assert grad.isfinite().all(), name
        assert grad.any(), name
    labels = torch.tensor([0, 0, 1] * 4)
    packaged = miners.EmbeddingsAlreadyPackagedAsTriplets()(emb, labels)
    assert make(case)(emb, labels, packaged) > 0


@hidden
def repeated_pairs_count_once(case):
    """Or of losses that are those of pairs, as often as they are named."""
    emb = embeddings()
    pairs = miners.MultiSimilarityMiner()(emb, LABELS)
    repeated = tuple(x.repeat(3) for x in pairs)
    if case.per_pair:
        each = [make(case, reducer=reducers.DoNothingReducer())(emb, LABELS, x) for x in (pairs, repeated)]
        assert [[3 * len(x["losses"]) for x in once.values()] for once in each[:1]] == [
            [len(x["losses"]) for x in thrice.values()] for thrice in each[1:]
        ]
        return
    torch.testing.assert_close(make(case)(emb, LABELS, repeated), make(case)(emb, LABELS, pairs))


@hidden
def empty_tuples(case):
    """A pair loss of no pairs is 0, with a graph; a proxy loss counts every sample."""
    emb = embeddings()
    for empty in (EMPTY, torch.tensor([])):
        for length in (3, 4):
            loss_func = make(case)
            loss = loss_func(emb, LABELS, (empty,) * length)
            (grad,) = grads_of(loss, emb)
            if case.without_pairs is not None:
                expected = case.without_pairs(loss_func, emb)
            elif list(loss_func.parameters()) or not case.uses_labels:
                expected = loss_func(emb, LABELS)
            else:
                expected = torch.tensor(0.0)
            torch.testing.assert_close(loss, expected)
            assert grad.any() == expected.any()


@shown(
    "Miners and reducers",
    {"triplet miners": miners.BatchHardMiner(), "pair miners": miners.MultiSimilarityMiner(epsilon=0.01)},
)
def mining(miner, case):
    """What `BatchHardMiner` and `MultiSimilarityMiner` give (in a memory: as its miner) changes the value.

    A tuple of equal shares, or of all pairs, does not.
    """
    arity = 3 if isinstance(miner, miners.BatchHardMiner) else 4
    emb = embeddings()
    indices_tuple = miner(emb, LABELS)
    assert len(indices_tuple) == arity
    if is_memory(make(case)):
        mined = evaluate(make(case, miner=miner), emb)
    else:
        mined = evaluate(make(case), emb, indices_tuple=indices_tuple)
    check_trains(mined, emb)
    if case.refs and arity == 3:  # a triplet is a positive and a negative pair
        pairs = lmu.convert_to_pairs(indices_tuple, LABELS)
        close(mined, evaluate(make(case), emb, indices_tuple=pairs))
    everything = None
    if case.refs and arity == 4:  # all triplets leave out anchors without a positive
        everything = lmu.get_all_pairs_indices(LABELS)
    elif not case.refs and case.without_pairs is None and not is_memory(make(case)):  # each sample's share counts
        everything = (torch.arange(len(LABELS)),) * arity
    if everything is not None:
        close(evaluate(make(case), emb, indices_tuple=everything), plain(case, emb))
    return NOT_MINED if mined == plain(case, emb) else None


def _each(case, emb):
    return evaluate(make(case, reducer=reducers.DoNothingReducer()), emb)


def per_anchor(entry):
    """Return the mean over samples of the mean loss of each one's pairs, 0 for one without."""
    if entry["reduction_type"] == "element":  # each loss has its own anchor
        return entry["losses"].mean()
    anchors = entry["indices"][0]
    return sum(mean_of(entry["losses"][anchors == i]) for i in range(len(LABELS))) / len(LABELS)


@shown("Miners and reducers", {"DoNothingReducer": None})
def do_nothing(case):
    """Gives every sub-loss, one number or one for each sample, class or pair."""
    emb = embeddings()
    each = _each(case, emb)
    assert set(each) == set(unwrapped(make(case)).sub_loss_names())
    for entry in each.values():
        if entry["reduction_type"] == "already_reduced":
            assert entry["losses"].ndim == 0
        elif case.per_pair:
            assert entry["reduction_type"] in ("pos_pair", "neg_pair")
            assert len(entry["losses"]) == len(entry["indices"][0]) == len(entry["indices"][1]) == entry["divisor"]
        else:
            assert entry["reduction_type"] == "element"
            length = NUM_CLASSES if case.per_class else len(LABELS) * (1 + takes_views(make(case)))
            assert entry["losses"].shape == entry["indices"].shape == (length,)
            assert "divisor" in entry
    check_trains(sum(entry["losses"].sum() for entry in each.values()), emb)
    later = make(case, embedding_regularizer=regularizers.LpRegularizer())
    unwrapped(later).set_reducer(reducers.DoNothingReducer())
    assert set(evaluate(later, emb)) == set(unwrapped(later).sub_loss_names()) == {*each, "embedding_reg_loss"}


def _reduced_by(case, reducer, by_hand):
    """Compare with a reduction by hand, and say so where a reducer has nothing to do."""
    emb = embeddings()
    entries = list(_each(case, emb).values())
    loss = evaluate(make(case, reducer=reducer), emb)
    check_trains(loss, emb)
    if all(entry["reduction_type"] == "already_reduced" for entry in entries):
        close(loss, sum(entry["losses"] for entry in entries))
        return ALREADY_REDUCED
    close(loss, sum(by_hand(entry) for entry in entries))
    return None


@shown(
    "Miners and reducers",
    {
        "Mean-, Sum-, AvgNonZero-, DivisorReducer": {
            reducers.MeanReducer(): lambda entry: entry["losses"].mean(),
            reducers.SumReducer(): lambda entry: entry["losses"].sum(),
            reducers.AvgNonZeroReducer(): lambda entry: mean_of(entry["losses"][entry["losses"] > 0]),
            reducers.DivisorReducer(): lambda entry: entry["losses"].sum() / entry["divisor"],
        },
        "PerAnchorReducer": {reducers.PerAnchorReducer(): lambda entry: per_anchor(entry)},
    },
)
def simple_reducers(by_hand, case):
    """They give what a reduction by hand gives; `PerAnchorReducer` the mean of the means of anchors."""
    reasons = {_reduced_by(case, reducer, function) for reducer, function in by_hand.items()}
    assert len(reasons) == 1
    return reasons.pop()


@shown("Miners and reducers", {"ThresholdReducer": None})
def threshold(case):
    """`ThresholdReducer` gives the mean of the losses in its range."""
    each = torch.cat([entry["losses"].flatten() for entry in _each(case, embeddings()).values()])
    middle = each.median().item()
    assert not each.gt(middle).all()  # something to leave out

    def by_hand(entry, low=0.1, high=20.0):
        return mean_of(entry["losses"][(entry["losses"] > low) & (entry["losses"] < high)])

    if (reason := _reduced_by(case, reducers.ThresholdReducer(low=0.1, high=20.0), by_hand)) is not None:
        return reason
    return _reduced_by(case, reducers.ThresholdReducer(low=middle), lambda entry: by_hand(entry, middle, torch.inf))


@shown("Miners and reducers", {"ClassWeightedReducer": None})
def class_weighted(case):
    """`ClassWeightedReducer` weighs each loss by the class of its sample, anchor or proxy."""
    weights = torch.arange(1.0, len(LABELS) + 1)
    reducer = reducers.ClassWeightedReducer(weights)
    loss_func = make(case, reducer=reducer)
    if takes_views(loss_func):
        classes = torch.arange(len(LABELS)).repeat(2)
    else:
        classes = torch.arange(NUM_CLASSES) if case.per_class else LABELS
        if not is_memory(loss_func):
            close(loss_func(embeddings()[ORDER], LABELS[ORDER]), evaluate(loss_func, embeddings()))

    def by_hand(entry):
        of_losses = classes[entry["indices"][0]] if case.per_pair else classes
        return (entry["losses"] * weights[of_losses]).mean()

    return _reduced_by(case, reducer, by_hand)


@hidden
def reducers_of_single_sub_losses(case):
    emb = embeddings()
    first = make(case).sub_loss_names()[0]
    by_name = reducers.MultipleReducers({first: reducers.SumReducer()}, default_reducer=reducers.MeanReducer())
    each = _each(case, emb)
    expected = sum(e["losses"].sum() if name == first else e["losses"].mean() for name, e in each.items())
    torch.testing.assert_close(make(case, reducer=by_name)(emb, LABELS), expected)
    with pytest.raises(ValueError, match=r"reducer must have keys among the sub-losses .*, got typo"):
        make(case, reducer=reducers.MultipleReducers({"typo": reducers.SumReducer()}))


# Regularizers, distances and references


@shown("Regularizers, distances and references", {"embedding regularizers": None})
def embedding_regularizer(case):
    """`LpRegularizer`, `ZeroMeanRegularizer` and others add their value."""
    for regularizer in (
        regularizers.LpRegularizer(),
        regularizers.ZeroMeanRegularizer(),
        regularizers.CenterInvariantRegularizer(),
        regularizers.RegularFaceRegularizer(),
    ):
        emb = embeddings()
        loss = evaluate(make(case, embedding_regularizer=regularizer, embedding_reg_weight=0.5), emb)
        check_trains(loss, emb)
        both = torch.cat([emb, embeddings(seed=1)]) if takes_views(make(case)) else emb
        assert regularizer(both) != 0
        check_trains(plain(case, emb), emb)  # not by the regularizer alone
        close(loss, plain(case, emb) + 0.5 * regularizer(both))


@shown("Regularizers, distances and references", {"weight regularizers": None})
def weight_regularizer(case):
    """`LpRegularizer`, `RegularFaceRegularizer` and `SparseCentersRegularizer` of proxies or classifier add theirs."""
    for regularizer in (
        regularizers.LpRegularizer(),
        regularizers.RegularFaceRegularizer(),
        regularizers.SparseCentersRegularizer(num_classes=1, centers_per_class=NUM_CLASSES),
    ):
        emb = embeddings()
        loss_func = make(case, weight_regularizer=regularizer, weight_reg_weight=2.0)
        loss = evaluate(loss_func, emb)
        (proxies,) = (p for p in loss_func.parameters() if p.ndim == 2)
        added = getattr(unwrapped(loss_func), "proxy_weight", 1.0) * 2 * regularizer(proxies)
        assert added != 0
        close(loss, plain(case, emb) + added)
        assert grads_of(loss - added, proxies)[0].any()
        check_trains(evaluate(make(case, weight_regularizer=regularizer), emb), emb)


@shown("Regularizers, distances and references", {"other distances": None})
def other_distance(case):
    """`LpDistance` or `CosineSimilarity` gives another value; `DotProductSimilarity` of unit vectors the cosine's."""
    emb = embeddings()
    values = [evaluate(make(case, distance=x), emb) for x in (distances.LpDistance(), distances.CosineSimilarity())]
    for loss in values:
        check_trains(loss, emb)
    if torch.equal(*values):
        return NO_DISTANCE
    dot, cosine = (make(case, distance=x) for x in (distances.DotProductSimilarity(), distances.CosineSimilarity()))
    with torch.no_grad():
        for loss_func in (dot, cosine):
            for p in trained(loss_func).values():
                p.copy_(torch.nn.functional.normalize(p) if p.ndim == 2 else p)
    unit, view = (torch.nn.functional.normalize(x) for x in (emb, embeddings(seed=1)))
    views = {"ref_emb": view} if takes_views(dot) else {}
    close(evaluate(dot, unit, **views), evaluate(cosine, emb, **views))
    return None


@shown("Regularizers, distances and references", {"ref_emb": None})
def ref_emb(case):
    """References get gradients; where they are the batch, its pairs give the batch's value."""
    emb, ref, other_labels = embeddings(), embeddings(seed=1), LABELS.flip(0)

    def against(refs, labels, **kwargs):
        return evaluate(make(case), emb, ref_emb=refs, ref_labels=labels, **kwargs)

    check_trains(against(ref, LABELS), emb, ref)
    few = against(ref[:7], other_labels[:7])
    check_trains(few, emb, ref)
    assert few != plain(case, emb)
    close(against(ref[:7].double(), other_labels[:7]).float(), few)
    pairs = lmu.get_all_pairs_indices(LABELS)  # which leaves out each sample with itself
    close(against(emb.clone(), LABELS.clone(), indices_tuple=pairs), plain(case, emb))
    close(against(emb, LABELS), plain(case, emb))
    close(against(emb, other_labels), against(emb + 0, other_labels))  # other labels: not the batch itself


# Wrappers


@shown("Wrappers", {"MultipleLosses": None})
def multiple_losses(case):
    """Twice the loss, the second time with weight 0.5, is 1.5 times the loss."""
    emb = embeddings()
    loss = losses.MultipleLosses([make(case), make(case)], weights=[1, 0.5])(emb, LABELS)
    check_trains(loss, emb)
    close(loss, 1.5 * plain(case, emb))


@shown("Wrappers", {"PML's CrossBatchMemory": losses.CrossBatchMemory, "our CrossBatchMemory": CrossBatchMemory})
def memories(wrapper, case):
    """The second batch gives the loss of the batch against both batches; a queue that is full goes on."""
    emb = embeddings()
    memory = wrapper(make(case), SIZE, memory_size=30)
    close(memory(embeddings(seed=1), LABELS), plain(case, embeddings(seed=1)))  # nothing but the batch in it
    loss = memory(emb, LABELS)
    check_trains(loss, emb)
    refs, ref_labels = torch.cat([embeddings(seed=1), emb]).detach(), LABELS.repeat(2)
    pairs = lmu.get_all_pairs_indices(LABELS, ref_labels)
    pairs = lmu.remove_self_comparisons(pairs, torch.arange(12, 24), 30)
    close(loss, make(case)(emb, LABELS, pairs, refs, ref_labels))
    for seed in (2, 3):  # more than there is room for
        emb = embeddings(seed=seed)
        check_trains(memory(emb, LABELS), emb)
    assert memory.queue_idx == 4 * 12 % 30


@shown(
    "Wrappers", {"PML's SelfSupervisedLoss": losses.SelfSupervisedLoss, "our SelfSupervisedLoss": SelfSupervisedLoss}
)
def views(wrapper, case):
    """Two views give the loss of both with their positions as labels."""
    emb, view = embeddings(), embeddings(seed=1)
    loss = wrapper(make(case))(emb, view)
    check_trains(loss, emb)
    close(loss, make(case)(torch.cat([emb, view]), torch.arange(len(emb)).repeat(2)))
    assert wrapper(make(case), symmetric=False)(emb, view) > 0


@shown(
    "Wrappers",
    {
        "PML's DistributedLossWrapper": pml_dist.DistributedLossWrapper,
        "our DistributedLossWrapper": pml_ext.distributed.DistributedLossWrapper,
    },
)
def distributed(wrapper, case):
    """In a gloo group of one process: value and gradient of the loss itself.

    In two, behind `DistributedDataParallel`, PML's gives the exact gradient of the model and twice the value
    (`tests/contract/test_distributed.py`); with ours all is exact, in two and three (`tests/distributed`).
    """
    loss_func = wrapper(make(case))
    emb = embeddings()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        loss = loss_func(emb, LABELS)
        (grad,) = grads_of(loss, emb)
    finally:
        torch.distributed.destroy_process_group()
    check_trains(plain(case, emb), emb)
    close(loss, plain(case, emb))
    close(grad, grads_of(plain(case, emb), emb)[0])
    return WORLD_SIZE_TIMES if wrapper is pml_dist.DistributedLossWrapper and trained(make(case)) else None


# Training


def precision(model, dataset):
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
    with torch.no_grad():
        return calculator.get_accuracy(model(dataset.tensors[0]), dataset.tensors[1])["precision_at_1"]


def _train(case, trainer, epochs, miner, folder, models=None, loss_funcs=None):
    """Train with PML's hooks and tester; return how much precision rises. Every parameter moves, and is saved."""
    logging.getLogger("PML").setLevel(logging.ERROR)
    train_set, val_set = clusters(1), clusters(2)
    memory = is_memory(make(case))
    loss_func = make(case, collect_stats=True, **({"miner": miner} if memory else {}))
    torch.manual_seed(0)
    models = {"trunk": torch.nn.Linear(IN_FEATURES, SIZE)} | (models or {})
    modules = models | {"metric_loss": loss_func}
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(module.parameters(), lr=0.02)
        for name, module in modules.items()
        if trained(module)
    }
    before = copy.deepcopy({name: trained(module) for name, module in modules.items()})
    start = precision(models["trunk"], val_set)
    record_keeper, _, _ = logging_presets.get_record_keeper(f"{folder}/csv", f"{folder}/tensorboard")
    hooks = logging_presets.get_hook_container(record_keeper, primary_metric="precision_at_1", log_freq=2)
    tester = testers.GlobalEmbeddingSpaceTester(
        end_of_testing_hook=hooks.end_of_testing_hook,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        accuracy_calculator=AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu")),
    )
    values = []

    def end_of_iteration(run):
        values.append(float(run.losses["metric_loss"]))
        hooks.end_of_iteration_hook(run)

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        trainer(
            models=models,
            optimizers=optimizers,
            batch_size=20,
            loss_funcs={"metric_loss": loss_func} | (loss_funcs or {}),
            dataset=train_set,
            mining_funcs={"tuple_miner": miner} if miner and not memory else None,
            sampler=samplers.MPerClassSampler(train_set.tensors[1], m=4, length_before_new_iter=100),
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
            end_of_iteration_hook=end_of_iteration,
            end_of_epoch_hook=hooks.end_of_epoch_hook(tester, {"val": val_set}, f"{folder}/models"),
        ).train(num_epochs=epochs)
    assert len(values) == 5 * epochs
    assert all(0 < abs(value) < float("inf") for value in values)
    for name, module in modules.items():
        assert all(not torch.equal(p, before[name][key]) for key, p in trained(module).items())
    make(case).load_state_dict(torch.load(f"{folder}/models/metric_loss_{epochs}.pth", weights_only=True))
    assert any(path.stat().st_size for path in Path(folder, "csv").iterdir())
    return precision(models["trunk"], val_set) - start


@shown("Training", {"MetricLossOnly": None}, "trains")
def metric_loss_only(case):
    """`MetricLossOnly`, with and without a miner, with PML's tester and hooks, trains trunk and loss.

    Each parameter of the loss moves, its state is saved, and precision at 1 rises by more than 0.1 where labels count.
    """
    for miner in (None, miners.MultiSimilarityMiner()):
        with tempfile.TemporaryDirectory() as folder:
            gain = _train(case, trainers.MetricLossOnly, 6, miner, folder)
        assert gain > 0.1 or not case.uses_labels


@shown("Training", {"TrainWithClassifier": None}, "trains")
def train_with_classifier(case):
    """`TrainWithClassifier` with a miner, tester and hooks trains trunk, classifier and every parameter of the loss."""
    with tempfile.TemporaryDirectory() as folder:
        _train(
            case,
            trainers.TrainWithClassifier,
            2,
            miners.MultiSimilarityMiner(),
            folder,
            models={"classifier": torch.nn.Linear(SIZE, NUM_CLASSES)},
            loss_funcs={"classifier_loss": torch.nn.CrossEntropyLoss()},
        )


@hidden
def what_it_trains_is_searched_by_inference_model(case):
    train_set, test_set = clusters(1), clusters(2)
    loss_func, trunk = make(case), torch.nn.Linear(IN_FEATURES, SIZE)
    optimizer = torch.optim.Adam([*trunk.parameters(), *loss_func.parameters()], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_func(trunk(train_set.tensors[0]), train_set.tensors[1]).backward()
        optimizer.step()
    inference = InferenceModel(trunk, data_device=torch.device("cpu"))
    inference.train_knn(train_set)
    _, indices = inference.get_nearest_neighbors(test_set.tensors[0], k=1)
    classes = train_set.tensors[1][indices.squeeze(1)]
    if case.uses_labels:
        assert (classes == test_set.tensors[1]).float().mean() > 0.5  # chance: 0.2


@shown("Training", {"state dict": None})
def state_dict(case):
    """A state dict, saved and loaded into a new loss (in a memory: amid training), gives the value; a copy does too."""
    loss_func = make(case)
    with torch.no_grad():
        for p in loss_func.parameters():
            p += torch.linspace(0, 1, p.numel()).view_as(p)
    if is_memory(loss_func):
        loss_func(embeddings(seed=2), LABELS)
    file = io.BytesIO()
    torch.save(loss_func.state_dict(), file)
    file.seek(0)
    torch.manual_seed(8)
    loaded = case.make()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = evaluate(copy.deepcopy(loss_func), embeddings())  # a memory is not the same after it
    for duplicate in (lambda _: loaded, copy.deepcopy, lambda _: pickle.loads(pickle.dumps(loss_func))):
        other = duplicate(loss_func)
        close(evaluate(other, embeddings()), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in loss_func.parameters()}
    if list(loss_func.parameters()):
        assert expected != plain(case, embeddings())


@hidden
def statistics_are_collected(case):
    with mock.patch.object(c_f, "COLLECT_STATS", True):
        recording = make(case)
        recording.add_to_recordable_attributes(name="left_over", is_stat=True)
        recording.left_over = 5
        loss = recording(embeddings(), LABELS)
    torch.testing.assert_close(loss, make(case)(embeddings(), LABELS))
    assert recording.distance.collect_stats
    assert recording.left_over == 0  # statistics are reset at each forward
    for module in recording.modules():
        for kind in c_f.list_of_recordable_attributes_list_names():
            for name in getattr(module, kind, []):
                if (type(module), name) == (
                    reducers.AvgNonZeroReducer,
                    "high",
                ):  # PML records the bound that is not set
                    continue
                assert isinstance(getattr(module, name), int | float), f"{type(module).__name__}.{name} is no scalar"


# Precision


@hidden
def moves_with_to(case):
    loss_func = make(case).double()
    emb = embeddings(torch.float64)
    loss = loss_func(emb, LABELS)
    assert loss.dtype == torch.float64
    close(loss.float(), make(case)(emb.float(), LABELS), rtol=1e-4)


@shown("Training", {"float16": torch.float16, "bfloat16": torch.bfloat16})
def half(dtype, case, device="cpu"):
    """Half embeddings: a float32 loss, that of the same numbers in float32, a half gradient, no parameter cast."""
    emb = embeddings(dtype).detach().to(device).requires_grad_()
    loss_func = make(case).to(device)
    loss = evaluate(loss_func, emb)
    assert loss.dtype == torch.float32
    (grad,) = grads_of(loss, emb)
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert grad.any()
    assert all(p.dtype == torch.float32 for p in loss_func.parameters())
    views = {"ref_emb": embeddings(dtype, seed=1).float()} if takes_views(loss_func) else {}
    close(loss, evaluate(make(case).to(device), emb.float(), **views))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert torch.equal(evaluate(make(case).to(device), emb), loss)  # nothing inside is computed in half
    if case.refs:
        ref = embeddings(dtype, seed=1).to(device)
        close(
            evaluate(loss_func, emb, ref_emb=ref, ref_labels=LABELS),
            evaluate(loss_func, emb.float(), ref_emb=ref.float(), ref_labels=LABELS),
        )


@shown("Training", {"autocast": None})
def autocast(case):
    """Under `torch.autocast` in bfloat16 the value is that without it, and parameters stay float32."""
    emb = embeddings()
    loss_func = make(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = evaluate(loss_func, emb)
    check_trains(loss, emb)
    assert torch.equal(loss, plain(case, emb))
    assert all(p.dtype == torch.float32 for p in loss_func.parameters())


@hidden
def trains_under_autocast(case, device):
    """Parameters stay float32 and keep changing."""
    for half in HALVES:
        model, loss_func = torch.nn.Linear(SIZE, SIZE).to(device), make(case).to(device)
        parameters = [*model.parameters(), *trained(loss_func).values()]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        values = []
        for step in range(4):
            before = [p.detach().clone() for p in parameters]
            with torch.autocast(torch.device(device).type, dtype=half, enabled=step != 2):
                loss = loss_func(model(embeddings().detach().to(device)), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
            assert all(p.dtype == torch.float32 for p in parameters)
            assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        assert values[-1] < values[0]


# Compilation and derivatives


@functools.cache
def _compiled(case, fullgraph):
    """Return the error of ``torch.compile``, None where it gives the value and the gradient."""
    torch.compiler.reset()
    emb = embeddings()
    try:
        loss = evaluate(torch.compile(make(case), backend="eager", fullgraph=fullgraph), emb)
    except (AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
        return error
    finally:
        torch.compiler.reset()
    close(loss, plain(case, emb))
    close(grads_of(loss, emb)[0], grads_of(plain(case, emb), emb)[0])
    return None


@shown("Training", {"torch.compile": False, "fullgraph=True": True}, "compiles", varies=True)
def compiles(fullgraph, case):
    """`torch.compile(backend="eager")`, which traces and generates no code, gives the value and the gradient.

    With or without graph breaks; with `fullgraph=True` there is none.
    """
    error = _compiled(case, True)
    if error and not fullgraph:  # what compiles whole needs no second try
        error = _compiled(case, False)
    broken = fullgraph and isinstance(error, torch._dynamo.exc.TorchDynamoException)
    return GRAPH_BREAKS if broken else error and describe(error, case)


@shown("Training", {"double backward": None}, varies=True)
def double_backward(case):
    """`torch.autograd.gradgradcheck` in float64: derivatives of gradients are those of finite differences."""
    torch.manual_seed(0)
    emb = embeddings(torch.float64)

    def loss(x):
        return evaluate(make(case).double(), x)

    check_trains(loss(emb), emb)
    try:
        assert torch.autograd.gradgradcheck(loss, emb, fast_mode=True)
    except RuntimeError as error:
        if "is not implemented" not in str(error) and not isinstance(error, NotImplementedError):
            raise
        return describe(error, case)
    return None


@hidden
def function_transforms(case):
    """Gradients one output at a time and all at once."""
    loss_func, emb = make(case).train(not case.batch_norm), embeddings()  # transforms refuse running statistics
    (expected,) = grads_of(loss_func(emb, LABELS), emb)
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(lambda x: loss_func(x, LABELS))(emb.detach()), expected)
