"""What works with what: docs/compatibility.md, made by running it (python -m tests.contract.compatibility --write)."""

import argparse
import contextlib
import copy
import functools
import io
import re
import warnings
from pathlib import Path

import pytorch_metric_learning
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, trainers
from pytorch_metric_learning.utils import distributed as pml_dist
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

import pml_ext.distributed
from pml_ext.losses import CrossBatchMemory, HybridLoss, MultiSimilarityLoss, SelfSupervisedLoss
from tests.contract.cases import CASES, LABELS, NUM_CLASSES, SIZE, Case, embeddings, grads_of, make, mean_of, trained
from tests.contract.clusters import IN_FEATURES, clusters

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
VERSIONS = f"torch {'.'.join(torch.__version__.split('.')[:2])} and PML {pytorch_metric_learning.__version__}"
COMMAND = "python -m tests.contract.compatibility --write"
HEAD = f"""\
# Compatibility

Which loss works with which part of pytorch-metric-learning (PML) and PyTorch. Each cell is the result of a check that
runs the combination; what it checks is below the table. Numbers point to the reasons at the end, which `in this font`
are the messages of the errors that are raised. "Our" classes are those of this package.

This page was written with {VERSIONS} by `{COMMAND}`;
a test compares it with what the checks find. The distributed wrappers run here in one process, and in several, also
with `efficient=True`, in `tests/distributed` and `tests/contract/test_distributed.py`.
"""
ROWS = CASES | {
    "CrossBatchMemory of HybridLoss": Case(
        lambda **kw: CrossBatchMemory(HybridLoss(NUM_CLASSES, SIZE, **kw), SIZE, memory_size=64), False, False
    ),
    "SelfSupervisedLoss of MultiSimilarityLoss": Case(
        lambda **kw: SelfSupervisedLoss(MultiSimilarityLoss(**kw)), False, False
    ),
}
ALREADY_REDUCED = "No effect: the losses inside have reduced already. Give the reducer to them."
NOT_MINED = "No effect: what is mined is ignored, since samples are not compared with each other."
NO_DISTANCE = "No effect: the loss does not use `distance`."
GRAPH_BREAKS = "Refused: there are graph breaks."
WORLD_SIZE_TIMES = (
    "In several processes value and gradients of the loss's parameters are world size times too large: use ours."
)


def takes_views(loss_func):
    return isinstance(getattr(loss_func, "_orig_mod", loss_func), SelfSupervisedLoss)  # also where compiled


def evaluate(loss_func, emb, **kwargs):
    """Return the loss of the contract's batch; of two views where that is what the loss takes."""
    if takes_views(loss_func):
        return loss_func(emb, **({"ref_emb": embeddings(emb.dtype, seed=1).detach()} | kwargs))
    return loss_func(emb, LABELS, **kwargs)


def is_memory(loss_func):
    return isinstance(loss_func, CrossBatchMemory)


def plain(case, emb):
    return evaluate(make(case), emb)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def check_trains(loss, *inputs):
    """Check for a value that is finite and not zero, with a gradient for each input."""
    assert loss.shape == ()
    assert loss.isfinite()
    assert loss != 0
    for grad in grads_of(loss, *inputs):
        assert grad is not None
        assert grad.isfinite().all()
        assert grad.any()


# Miners and reducers


def _mining(case, miner, arity):
    emb = embeddings()
    indices_tuple = miner(emb, LABELS)
    assert len(indices_tuple) == arity
    if is_memory(make(case)):
        mined = evaluate(make(case, miner=miner), emb)
    else:
        mined = evaluate(make(case), emb, indices_tuple=indices_tuple)
    check_trains(mined, emb)
    everything = None
    if case.refs and arity == 4:  # all triplets leave out anchors without a positive
        everything = lmu.get_all_pairs_indices(LABELS)
    elif not case.refs and case.without_pairs is None and not is_memory(make(case)):  # each sample's share counts
        everything = (torch.arange(len(LABELS)),) * arity
    if everything is not None:
        close(evaluate(make(case), emb, indices_tuple=everything), plain(case, emb))
    return NOT_MINED if mined == plain(case, emb) else None


def triplet_miner(case):
    """`BatchHardMiner` changes the value (in a memory: as its miner); a tuple of equal shares does not."""
    return _mining(case, miners.BatchHardMiner(), 3)


def pair_miner(case):
    """`MultiSimilarityMiner` changes the value (in a memory: as its miner); a tuple of all pairs does not."""
    return _mining(case, miners.MultiSimilarityMiner(epsilon=0.01), 4)


def _each(case, emb):
    return evaluate(make(case, reducer=reducers.DoNothingReducer()), emb)


def do_nothing(case):
    """Gives every sub-loss, one number or one for each sample or class."""
    emb = embeddings()
    each = _each(case, emb)
    assert each
    for entry in each.values():
        if entry["reduction_type"] == "already_reduced":
            assert entry["losses"].ndim == 0
        else:
            assert entry["losses"].shape == entry["indices"].shape
    check_trains(sum(entry["losses"].sum() for entry in each.values()), emb)


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


def simple_reducers(case):
    """`MeanReducer`, `SumReducer`, `AvgNonZeroReducer` and `DivisorReducer` give what a reduction by hand gives."""
    found = {
        _reduced_by(case, reducers.MeanReducer(), lambda entry: entry["losses"].mean()),
        _reduced_by(case, reducers.SumReducer(), lambda entry: entry["losses"].sum()),
        _reduced_by(case, reducers.AvgNonZeroReducer(), lambda entry: mean_of(entry["losses"][entry["losses"] > 0])),
        _reduced_by(case, reducers.DivisorReducer(), lambda entry: entry["losses"].sum() / entry["divisor"]),
    }
    assert len(found) == 1
    return found.pop()


def threshold(case):
    """`ThresholdReducer` gives the mean of the losses in its range."""
    each = torch.cat([entry["losses"].flatten() for entry in _each(case, embeddings()).values()])
    middle = each.median().item()
    assert not each.gt(middle).all()  # something to leave out

    def by_hand(entry):
        return mean_of(entry["losses"][entry["losses"] > middle])

    return _reduced_by(case, reducers.ThresholdReducer(low=middle), by_hand)


def class_weighted(case):
    """`ClassWeightedReducer` weighs each loss by the class of its sample or proxy."""
    weights = torch.arange(1.0, len(LABELS) + 1)
    if takes_views(make(case)):
        classes = torch.arange(len(LABELS)).repeat(2)
    else:
        classes = torch.arange(NUM_CLASSES) if case.per_class else LABELS
    return _reduced_by(
        case, reducers.ClassWeightedReducer(weights), lambda entry: (entry["losses"] * weights[classes]).mean()
    )


def per_anchor(case):
    """`PerAnchorReducer` gives the mean, since each loss has an anchor of its own."""
    return _reduced_by(case, reducers.PerAnchorReducer(), lambda entry: entry["losses"].mean())


# Regularizers, distances and references


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


def weight_regularizer(case):
    """`LpRegularizer` and `RegularFaceRegularizer` of the proxies or classifier add their value."""
    for regularizer in (regularizers.LpRegularizer(), regularizers.RegularFaceRegularizer()):
        emb = embeddings()
        loss_func = make(case, weight_regularizer=regularizer, weight_reg_weight=2.0)
        loss = evaluate(loss_func, emb)
        (proxies,) = (p for p in loss_func.parameters() if p.ndim == 2)
        scale = getattr(getattr(loss_func, "loss", loss_func), "proxy_weight", 1.0)
        added = scale * 2 * regularizer(proxies)
        assert added != 0
        close(loss, plain(case, emb) + added)
        assert grads_of(loss - added, proxies)[0].any()
        check_trains(evaluate(make(case, weight_regularizer=regularizer), emb), emb)


def other_distance(case):
    """`LpDistance` gives another value; `DotProductSimilarity` of unit vectors gives the cosine's."""
    emb = embeddings()
    loss = evaluate(make(case, distance=distances.LpDistance()), emb)
    check_trains(loss, emb)
    if torch.equal(loss, plain(case, emb)):
        return NO_DISTANCE
    dot, cosine = make(case, distance=distances.DotProductSimilarity()), make(case)
    with torch.no_grad():
        for loss_func in (dot, cosine):
            for p in trained(loss_func).values():
                p.copy_(torch.nn.functional.normalize(p) if p.ndim == 2 else p)
    unit, view = (torch.nn.functional.normalize(x) for x in (emb, embeddings(seed=1)))
    views = {"ref_emb": view} if takes_views(dot) else {}
    close(evaluate(dot, unit, **views), evaluate(cosine, emb, **views))
    return None


def ref_emb(case):
    """References get gradients; where they are the batch, its pairs give the batch's value."""
    emb, ref = embeddings(), embeddings(seed=1)
    check_trains(evaluate(make(case), emb, ref_emb=ref, ref_labels=LABELS), emb, ref)
    pairs = lmu.get_all_pairs_indices(LABELS)  # which leaves out each sample with itself
    close(
        evaluate(make(case), emb, indices_tuple=pairs, ref_emb=emb.clone(), ref_labels=LABELS.clone()), plain(case, emb)
    )


# Wrappers and trainers


def multiple_losses(case):
    """Twice the loss, the second time with weight 0.5, is 1.5 times the loss."""
    emb = embeddings()
    loss = losses.MultipleLosses([make(case), make(case)], weights=[1, 0.5])(emb, LABELS)
    check_trains(loss, emb)
    close(loss, 1.5 * plain(case, emb))


def _memory(case, wrapper):
    emb = embeddings()
    memory = wrapper(make(case), SIZE, memory_size=30)
    close(memory(embeddings(seed=1), LABELS), plain(case, embeddings(seed=1)))  # nothing but the batch in it
    loss = memory(emb, LABELS)
    check_trains(loss, emb)
    refs, ref_labels = torch.cat([embeddings(seed=1), emb]).detach(), LABELS.repeat(2)
    pairs = lmu.get_all_pairs_indices(LABELS, ref_labels)
    pairs = lmu.remove_self_comparisons(pairs, torch.arange(12, 24), 30)
    close(loss, make(case)(emb, LABELS, pairs, refs, ref_labels))


def pml_memory(case):
    """The second batch gives the loss of the batch against both batches."""
    _memory(case, losses.CrossBatchMemory)


def our_memory(case):
    """The same."""
    _memory(case, CrossBatchMemory)


def _views(case, wrapper):
    emb, view = embeddings(), embeddings(seed=1)
    loss = wrapper(make(case))(emb, view)
    check_trains(loss, emb)
    close(loss, make(case)(torch.cat([emb, view]), torch.arange(len(emb)).repeat(2)))


def pml_views(case):
    """Two views give the loss of both with their positions as labels."""
    _views(case, losses.SelfSupervisedLoss)


def our_views(case):
    """The same."""
    _views(case, SelfSupervisedLoss)


def _train(case, trainer, **kwargs):
    dataset, miner = clusters(1), miners.MultiSimilarityMiner()
    memory = is_memory(make(case))
    loss_func = make(case, miner=miner) if memory else make(case)
    models = {"trunk": torch.nn.Linear(IN_FEATURES, SIZE)} | kwargs.pop("models", {})
    modules = models | {"metric_loss": loss_func}
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(module.parameters(), lr=0.05)
        for name, module in modules.items()
        if trained(module)
    }
    before = copy.deepcopy({name: trained(module) for name, module in modules.items()})
    found = []
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        trainer(
            models=models,
            optimizers=optimizers,
            batch_size=60,
            loss_funcs={"metric_loss": loss_func} | kwargs.pop("loss_funcs", {}),
            dataset=dataset,
            mining_funcs=None if memory else {"tuple_miner": miner},
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
            end_of_iteration_hook=lambda run: found.append(float(run.losses["metric_loss"])),
            **kwargs,
        ).train(num_epochs=2)
    assert len(found) == 4
    assert all(0 < abs(value) < float("inf") for value in found)
    for name, module in modules.items():
        assert all(not torch.equal(p, before[name][key]) for key, p in trained(module).items())


def metric_loss_only(case):
    """`MetricLossOnly` with a miner trains the trunk and every parameter of the loss."""
    _train(case, trainers.MetricLossOnly)


def train_with_classifier(case):
    """`TrainWithClassifier` with a miner trains trunk, classifier and every parameter of the loss."""
    _train(
        case,
        trainers.TrainWithClassifier,
        models={"classifier": torch.nn.Linear(SIZE, NUM_CLASSES)},
        loss_funcs={"classifier_loss": torch.nn.CrossEntropyLoss()},
    )


def _distributed(case, wrapper):
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


def pml_distributed(case):
    """In a gloo group of one process: value and gradient of the loss itself.

    In two, behind `DistributedDataParallel`, the model's gradient is exact (`tests/contract/test_distributed.py`); the
    value is twice as large.
    """
    _distributed(case, pml_dist.DistributedLossWrapper)
    return WORLD_SIZE_TIMES if trained(make(case)) else None


def our_distributed(case):
    """In a gloo group of one process: the same. `tests/distributed/test_wrappers.py` has two and three, all exact."""
    _distributed(case, pml_ext.distributed.DistributedLossWrapper)


# Precision, compilation, derivatives and state


def _half(case, dtype):
    emb = embeddings(dtype)
    loss_func = make(case)
    loss = evaluate(loss_func, emb)
    assert loss.dtype == torch.float32
    (grad,) = grads_of(loss, emb)
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert grad.any()
    assert all(p.dtype == torch.float32 for p in loss_func.parameters())
    views = {"ref_emb": embeddings(dtype, seed=1).float()} if takes_views(loss_func) else {}
    close(loss, evaluate(make(case), emb.float(), **views))


def float16(case):
    """Half embeddings: a float32 loss, that of the same numbers in float32, a half gradient, no parameter cast."""
    _half(case, torch.float16)


def bfloat16(case):
    """The same."""
    _half(case, torch.bfloat16)


def autocast(case):
    """Under `torch.autocast` in bfloat16 the value is that without it, and parameters stay float32."""
    emb = embeddings()
    loss_func = make(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = evaluate(loss_func, emb)
    check_trains(loss, emb)
    assert torch.equal(loss, plain(case, emb))
    assert all(p.dtype == torch.float32 for p in loss_func.parameters())


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


def compiles(case):
    """`torch.compile(backend="eager")` gives the value and the gradient, with or without graph breaks.

    That backend traces, and generates no code.
    """
    error = _compiled(case, True) and _compiled(case, False)  # what compiles whole needs no second try
    return error and describe(error, case)


def compiles_whole(case):
    """The same with `fullgraph=True`: there is no graph break."""
    error = _compiled(case, True)
    return (
        GRAPH_BREAKS if isinstance(error, torch._dynamo.exc.TorchDynamoException) else error and describe(error, case)
    )


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


def state_dict(case):
    """A state dict, saved and loaded into a new loss (in a memory: amid training), gives the value."""
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
    expected = evaluate(loss_func, embeddings())
    close(evaluate(loaded, embeddings()), expected)
    if list(loss_func.parameters()):
        assert expected != plain(case, embeddings())


TABLES = {
    "Miners and reducers": {
        "triplet miners": triplet_miner,
        "pair miners": pair_miner,
        "DoNothingReducer": do_nothing,
        "Mean-, Sum-, AvgNonZero-, DivisorReducer": simple_reducers,
        "ThresholdReducer": threshold,
        "ClassWeightedReducer": class_weighted,
        "PerAnchorReducer": per_anchor,
    },
    "Regularizers, distances and references": {
        "embedding regularizers": embedding_regularizer,
        "weight regularizers": weight_regularizer,
        "other distances": other_distance,
        "ref_emb": ref_emb,
    },
    "Wrappers": {
        "MultipleLosses": multiple_losses,
        "PML's CrossBatchMemory": pml_memory,
        "our CrossBatchMemory": our_memory,
        "PML's SelfSupervisedLoss": pml_views,
        "our SelfSupervisedLoss": our_views,
        "PML's DistributedLossWrapper": pml_distributed,
        "our DistributedLossWrapper": our_distributed,
    },
    "Training": {
        "MetricLossOnly": metric_loss_only,
        "TrainWithClassifier": train_with_classifier,
        "state dict": state_dict,
        "float16": float16,
        "bfloat16": bfloat16,
        "autocast": autocast,
        "torch.compile": compiles,
        "fullgraph=True": compiles_whole,
        "double backward": double_backward,
    },
}


def outcome(check, case):
    """Return None where a check passes, else the reason: what the library says, or what the check has found out.

    A wrong value is an ``AssertionError`` and no reason: it is raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return check(case)
        except AssertionError:
            raise
        except Exception as error:
            if (
                not isinstance(error, TypeError | ValueError) and type(error) is not Exception
            ):  # which PML's wrappers raise
                raise
            return describe(error, case)


def describe(error, case):
    """Return an error's type and the first line of its message, with the case's own name left out."""
    message = re.sub(rf"\b{type(make(case)).__name__}$", "<this loss>", str(error).splitlines()[0])
    return f"`{type(error).__name__}: {message}`".replace("|", "\\|")


def render():
    """Return the page."""
    parts, reasons = [HEAD], {}
    for title, columns in TABLES.items():
        rows = [["", *(name if " " in name else f"`{name}`" for name in columns)], ["---"] * (len(columns) + 1)]
        for name, case in ROWS.items():
            cells = []
            for check in columns.values():
                reason = outcome(check, case)
                cells.append("yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
            rows.append([name, *cells])
        parts.append(f"## {title}\n")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
        parts.append(
            "\n".join(f"- {name}: {' '.join(check.__doc__.split())}" for name, check in columns.items()) + "\n"
        )
    parts.append("## Reasons\n")
    parts.append("\n".join(f"{number}. {reason}" for reason, number in reasons.items()) + "\n")
    return "\n".join(parts)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    page = render()
    if parser.parse_args(args).write:
        PAGE.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
