"""Every loss has every property of the battery, or says why not, as the page on compatibility tells."""

import inspect
import itertools

import pytest
import torch
from pytorch_metric_learning import losses, reducers

import pml_ext.losses
from pml_ext.losses import MultiSimilarityLoss, ProxyAnchorLoss
from tests.contract.battery import GRAPH_BREAKS, NO_DISTANCE, NOT_MINED, PROPERTIES, outcome
from tests.contract.cases import CASES, NUM_CLASSES, SIZE, Case
from tests.contract.page import COMMAND, PAGE, ROWS, VERSIONS, parse, render

TEXT = PAGE.read_text(encoding="utf-8")
CELLS, PAGE_VERSIONS = parse(TEXT)
COLUMNS = [name for name, declared in PROPERTIES.items() if declared.table]
OF_OLD_TORCH = {  # torch 2.5 does not trace context managers of contextlib, which these rows enter in compute_loss
    (row, "fullgraph=True"): GRAPH_BREAKS
    for row in ("EnsembleLoss", "EnsembleLoss of AdaptiveAdditiveMarginLoss", "IntraBatchLoss")
}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def marks_of(name, row):
    """Return the marks of a property; what is compiled for one column is kept for the other, by the same worker."""
    group = [pytest.mark.xdist_group(f"{row} compiled")] if "compiles" in PROPERTIES[name].marks else []
    return [getattr(pytest.mark, mark) for mark in PROPERTIES[name].marks] + group


def runs():
    """Return each row with each property; on each device where the property takes one."""
    for name, declared in PROPERTIES.items():
        on_devices = "device" in inspect.signature(declared.check).parameters
        for row, device in itertools.product(ROWS if declared.table else CASES, DEVICES[: 1 + on_devices]):
            kwargs = {"device": device} if on_devices else {}
            yield pytest.param(
                row, name, kwargs, marks=marks_of(name, row), id=", ".join([row, name, *kwargs.values()])
            )


@pytest.mark.parametrize(("row", "name", "kwargs"), list(runs()))
def test_battery(row, name, kwargs):
    reason = outcome(name, ROWS[row], **kwargs)
    if PROPERTIES[name].table is None:
        assert reason is None
    elif VERSIONS == PAGE_VERSIONS or not PROPERTIES[name].varies:
        assert (reason is not None) == (name in ROWS[row].refuses), f"{row}, {name}: {reason}"
        assert reason == CELLS.get((row, name), "no cell"), f"{PAGE.name} is old, run: {COMMAND}"
    elif name not in ROWS[row].refuses:
        assert reason in (None, OF_OLD_TORCH.get((row, name)))


def test_page_is_made_of_its_cells():
    assert set(CELLS) == set(itertools.product(ROWS, COLUMNS)), f"run: {COMMAND}"
    assert render(CELLS, PAGE_VERSIONS) == TEXT, f"run: {COMMAND}"


def test_what_is_refused_is_a_column():
    assert set().union(*(case.refuses for case in ROWS.values())) <= set(COLUMNS)


def test_every_exported_loss_has_a_case():
    exported = [getattr(pml_ext.losses, name) for name in pml_ext.losses.__all__]
    ours = {cls.__name__ for cls in exported if issubclass(cls, losses.BaseMetricLossFunction)}
    assert ours == {name.split()[0] for name in CASES}
    assert {cls.__name__ for cls in exported} - ours == {"CrossBatchMemory", "SelfSupervisedLoss"}


# Losses that are wrong on purpose, and the properties that they lack


def altered(name, alter):
    """Return a mixin that changes the entries of a loss by a function."""

    def compute_loss(self, *args):
        entries = super(cls, self).compute_loss(*args)
        return {name: entry | alter(entry, *args) for name, entry in entries.items()}

    cls = type(name, (), {"compute_loss": compute_loss})
    return cls


def position(entry, *_):
    return {"losses": entry["losses"] * torch.arange(1, 1 + len(entry["losses"]))}


def per_pair(entry, emb, labels, indices_tuple, *_):
    return {} if indices_tuple is None else {"losses": entry["losses"] + 1 + len(indices_tuple[0])}


def per_other_class(entry, emb, labels, *_):
    return {"losses": entry["losses"] / (labels != labels[:1]).sum()}


def overwriting(entry, emb, *_):
    emb.data.mul_(2)
    return {}


def of_pairs_alone(entry, emb, labels, indices_tuple, *_):
    return {"losses": entry["losses"] * (indices_tuple is None or len(indices_tuple) == 4)}


CALLS = itertools.count(1)
Backwards = altered("Backwards", lambda entry, *_: {"losses": -entry["losses"]})
Columns = altered("Columns", lambda entry, *_: {"losses": entry["losses"][:, None]})
Flat = altered("Flat", lambda entry, *_: {"losses": entry["losses"].detach() + 0 * entry["losses"]})
Misplaced = altered("Misplaced", lambda entry, *_: {"indices": entry["indices"].flip(0)})
OfPairsAlone = altered("OfPairsAlone", of_pairs_alone)
Overwriting, PerOtherClass = altered("Overwriting", overwriting), altered("PerOtherClass", per_other_class)
PerPair, Positioned = altered("PerPair", per_pair), altered("Positioned", position)
Refless = altered("Refless", lambda entry, *args: {"losses": entry["losses"] * (args[3] is None)})
Restless = altered("Restless", lambda entry, *_: {"losses": entry["losses"] * next(CALLS)})
Single = altered("Single", lambda entry, *_: {"losses": entry["losses"].float()})
Silent = altered("Silent", lambda entry, *_: {"losses": 0 * entry["losses"]})
Undivided = altered("Undivided", lambda entry, *_: {"divisor": 0})
Unstable = altered("Unstable", lambda entry, emb, *_: {"losses": entry["losses"] + emb.pow(2).sum(1).sqrt()})


def scaled(name, scale):
    """Return a mixin that multiplies the value of a loss."""

    def forward(self, *args, **kwargs):
        return super(cls, self).forward(*args, **kwargs) * scale()

    cls = type(name, (), {"forward": forward})
    return cls


Compiled = scaled("Compiled", lambda: 1 + torch.compiler.is_compiling())
Grouped = scaled("Grouped", lambda: 1 + torch.distributed.is_initialized())
Transformed = scaled("Transformed", lambda: 1 + torch._C._are_functorch_transforms_active())


class Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(2).sum(1)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0].detach() * grad.detach()[:, None]


OnceOnly = altered(
    "OnceOnly", lambda entry, emb, *_: {"losses": Constant.apply(emb)}
)  # autograd takes its gradient for a constant


class Ascending:
    """Has the right value, and the opposite of its gradient."""

    def forward(self, *args):
        loss = super().forward(*args)
        return 2 * loss.detach() - loss


class Breaking:
    """Leaves the graph."""

    def forward(self, *args):
        torch._dynamo.graph_break()
        return super().forward(*args)


class Deaf:
    """Ignores what is mined, and the references."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        return super().compute_loss(embeddings, labels, None, None, None)


class Fixed:
    """Has a distance of its own."""

    def compute_loss(self, *args):
        self.distance = self.get_default_distance()
        return super().compute_loss(*args)


class Imprecise:
    """Computes in the dtype of the embeddings."""

    def forward(self, embeddings, *args):
        return super().forward(embeddings, *args).to(embeddings.dtype)


class Inclusive:
    """Counts losses on the border of a threshold."""

    def compute_loss(self, *args):
        if getattr(self.reducer, "low", None) is not None:
            self.reducer.low -= 1e-4
        return super().compute_loss(*args)


class InHalf:
    """Does as autocast says."""

    def forward(self, embeddings, *args):
        return super().forward(embeddings, *args) + (embeddings @ embeddings.T).mean()


class Kept:
    """Needs its value for the gradient."""

    def forward(self, *args):
        return super().forward(*args).exp()


class Lenient:
    """Takes whatever it gets."""

    def __init__(self, no_such_argument=None, **kwargs):
        super().__init__(**kwargs)
        self.add_to_recordable_attributes(name="vector", is_stat=False)
        self.vector = [1, 2]

    def forward(self, embeddings, labels=None, *args):
        return super().forward(embeddings, torch.arange(len(embeddings)) // 2 if labels is None else labels, *args)


class Numb:
    """Takes a setting for a plain number."""

    def compute_loss(self, *args):
        if "alpha" in self._parameters:
            self.alpha = self._parameters.pop("alpha").item()
        return super().compute_loss(*args)


class Unforeseen:
    """Tells the batch itself by its object, after hooks."""

    def __call__(self, *args, **kwargs):
        return torch.nn.Module.__call__(self, *args, **kwargs)


class Unsettled:
    """Changes before it looks at what it is given."""

    def forward(self, *args, **kwargs):
        self.base += 1e-3
        return super().forward(*args, **kwargs)


class Permuted:
    """Takes the second half of a tuple for the first."""

    def compute_loss(self, embeddings, labels, indices_tuple, *refs):
        if indices_tuple is not None:
            half = len(indices_tuple) // 2
            indices_tuple = (*indices_tuple[half:], *indices_tuple[:half])
        return super().compute_loss(embeddings, labels, indices_tuple, *refs)


class Shifted:
    """Is off by one row in the references."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        ref_emb = None if ref_emb is None else ref_emb.roll(1, 0)
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


class Signless:
    """Takes every similarity but its own for a distance."""

    def compute_loss(self, *args):
        self.distance.is_inverted = type(self.distance) is type(self.get_default_distance())
        return super().compute_loss(*args)


class Summed:
    """Has reduced its losses already, where they are not asked for."""

    def reduce_terms(self, terms, *args):
        each = isinstance(self.reducer, reducers.DoNothingReducer)
        return super().reduce_terms(terms, *args) if each else sum(term["losses"].sum() for term in terms.values())


class TrainingOnly:
    """Drops embeddings out."""

    def forward(self, embeddings, *args):
        return super().forward(torch.nn.functional.dropout(embeddings, training=self.training), *args)


NOT_FLAT = {  # properties that a loss with the right value and a gradient of zeros has, or that another base must show
    *("forward has the arguments of pml", "order of the batch does not matter", "eval computes a loss"),
    *("labels are required", "unknown arguments are refused", "docstring has all sections", "moves with to"),
    *("repeated pairs count once", "reducers of single sub losses", "statistics are collected", "state dict"),
    *("weight regularizers", "TrainWithClassifier", "finite with one class one sample or none", "empty tuples"),
    *("finite gradients of zeros of equal rows and of large halves", "inputs are not changed", "function transforms"),
    *("value can be scaled in place", "torch.compile", "fullgraph=True", "refused calls change nothing"),
}
OF_SAMPLES = {"Mean-, Sum-, AvgNonZero-, DivisorReducer", "ThresholdReducer", "PerAnchorReducer"}
WRONG = {
    Ascending: {"trains under autocast"},
    Backwards: {"positive scalar with a gradient for each sample", "what it trains is searched by inference model"},
    Breaking: {"fullgraph=True"},
    Columns: {"DoNothingReducer"},
    Compiled: {"torch.compile", "fullgraph=True"},
    Deaf: {"ref_emb", "docstring has all sections", "triplet miners", "pair miners"},
    Fixed: {"other distances"},
    Flat: set(PROPERTIES) - NOT_FLAT,
    Grouped: {"PML's DistributedLossWrapper", "our DistributedLossWrapper"},
    Imprecise: {"float16", "bfloat16"},
    Inclusive: {"ThresholdReducer"},
    InHalf: {"autocast"},
    Kept: {"value can be scaled in place"},
    Lenient: {
        *("forward has the arguments of pml", "labels are required", "unknown arguments are refused"),
        "statistics are collected",
    },
    Misplaced: {"ClassWeightedReducer"},
    Numb: {"settings learn or are refused"},
    OfPairsAlone: {"every miner", "triplet miners"},
    OnceOnly: {"double backward"},
    Overwriting: {"inputs are not changed"},
    Permuted: {"triplet miners", "pair miners"},
    PerOtherClass: {"finite with one class one sample or none"},
    PerPair: {"empty tuples", "repeated pairs count once"},
    Positioned: {"order of the batch does not matter", "ClassWeightedReducer"},
    Refless: {"ref_emb", "PML's SelfSupervisedLoss", "our SelfSupervisedLoss"},
    Restless: {"MultipleLosses", "state dict", "embedding regularizers", "weight regularizers", *OF_SAMPLES}
    | {"reducers of single sub losses", "PML's SelfSupervisedLoss", "our SelfSupervisedLoss"},
    Shifted: {"ref_emb", "PML's CrossBatchMemory", "our CrossBatchMemory"},
    Signless: {"other distances"},
    Silent: {"TrainWithClassifier", "MetricLossOnly"},
    Single: {"moves with to"},
    Summed: OF_SAMPLES | {"ClassWeightedReducer"},
    TrainingOnly: {"eval computes a loss"},
    Transformed: {"function transforms"},
    Undivided: {"Mean-, Sum-, AvgNonZero-, DivisorReducer"},
    Unforeseen: {"hooks and wrappers do not change the value"},
    Unsettled: {"refused calls change nothing"},
    Unstable: {"finite gradients of zeros of equal rows and of large halves"},
}
RAISED = {  # where this, and no comparison, is the right outcome
    (Kept, "value can be scaled in place"): RuntimeError,  # of autograd
    (Lenient, "labels are required"): pytest.fail.Exception,  # nothing is raised
    (Lenient, "unknown arguments are refused"): pytest.fail.Exception,
    (OnceOnly, "double backward"): RuntimeError,  # the GradcheckError of torch, which is not exported
}


def test_every_property_is_missed_by_a_wrong_loss():
    of_their_own = (names for fault, names in WRONG.items() if fault is not Flat)
    assert set().union(*of_their_own) == set(PROPERTIES)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        pytest.param(fault, name, marks=marks_of(name, fault.__name__), id=f"{fault.__name__}, {name}")
        for fault, names in WRONG.items()
        for name in sorted(names)
    ],
)
def test_wrong_losses_are_noticed(fault, name):
    if name == "weight regularizers":
        wrong = type("ProxyAnchorLoss", (fault, ProxyAnchorLoss), {})
        case = Case(lambda **kw: wrong(NUM_CLASSES, SIZE, **kw))
    else:
        case = Case(type("MultiSimilarityLoss", (fault, MultiSimilarityLoss), {}))  # the name that PML's wrappers admit
    kwargs = {"device": "cpu"} if "device" in inspect.signature(PROPERTIES[name].check).parameters else {}
    with pytest.raises(RAISED.get((fault, name), AssertionError)):
        assert outcome(name, case, **kwargs) not in (NOT_MINED, NO_DISTANCE, GRAPH_BREAKS)  # nor a yes
