"""The page on compatibility says what is true now, and its checks notice what is not."""

import difflib
import itertools

import pytest
import torch
from pytorch_metric_learning.utils import common_functions as c_f

from pml_ext.losses import MultiSimilarityLoss
from tests.contract import compatibility
from tests.contract.cases import CASES, Case

COLUMNS = {name: check for columns in compatibility.TABLES.values() for name, check in columns.items()}

# Refused by this loss, not about gradients, and with a classifier that trains the trunk alone.
WITHOUT_GRADIENT = ("weight regularizers", "state dict", "TrainWithClassifier")


def test_page_is_what_the_checks_find():
    pages = [compatibility.PAGE.read_text(), compatibility.render()]
    if compatibility.VERSIONS not in pages[0]:  # graph breaks, and what torch says, differ between versions
        pages = [page[page.index("\n## ") : page.index("\n## Training")] for page in pages]
    lines = [page.splitlines() for page in pages]
    difference = "\n".join(difflib.unified_diff(*lines, "docs/compatibility.md", "now", lineterm="", n=0))
    assert not difference, f"\n{difference}\nrun: {compatibility.COMMAND}"


class Detached(MultiSimilarityLoss):
    def compute_loss(self, *args):
        found = super().compute_loss(*args)
        found["loss"]["losses"] = found["loss"]["losses"].detach()
        return found


class Deaf(MultiSimilarityLoss):
    """Ignores what is mined, and the references."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        return super().compute_loss(embeddings, labels, None, embeddings, labels)


class Misplaced(MultiSimilarityLoss):
    """Gives each loss to another sample."""

    def compute_loss(self, *args):
        found = super().compute_loss(*args)
        found["loss"]["indices"] = found["loss"]["indices"].flip(0)
        return found


class Restless(MultiSimilarityLoss):
    """Has another value in every call."""

    calls = itertools.count(1)

    def compute_loss(self, *args):
        found = super().compute_loss(*args)
        found["loss"]["losses"] = found["loss"]["losses"] * next(self.calls)
        return found


class Imprecise(MultiSimilarityLoss):
    """Computes in the dtype of the embeddings."""

    def forward(self, embeddings, *args):
        return super().forward(embeddings, *args).to(embeddings.dtype)


class OnceOnly(MultiSimilarityLoss):
    """Has a gradient that autograd takes for a constant."""

    def compute_loss(self, embeddings, *args):
        losses = _Constant.apply(embeddings)
        return {"loss": {"losses": losses, "indices": c_f.torch_arange_from_size(losses), "reduction_type": "element"}}


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(2).sum(1)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0].detach() * grad.detach()[:, None]


def wrong(loss, *columns):
    return [pytest.param(loss, name, id=f"{loss.__name__}, {name}") for name in columns]


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        *wrong(Detached, *(name for name in COLUMNS if name not in WITHOUT_GRADIENT)),
        *wrong(Deaf, "ref_emb"),
        *wrong(Misplaced, "ClassWeightedReducer"),
        *wrong(Restless, "MultipleLosses", "PML's DistributedLossWrapper", "state dict", "embedding regularizers"),
        *wrong(Imprecise, "float16", "bfloat16"),
        *wrong(OnceOnly, "double backward"),
    ],
)
def test_wrong_losses_are_noticed(loss, name):
    loss = type("MultiSimilarityLoss", (loss,), {})  # the name that PML's wrappers admit
    with pytest.raises((AssertionError, RuntimeError)):
        compatibility.outcome(COLUMNS[name], Case(loss, refs=True, wrapper_refs=True))


def test_without_effect_is_no_yes():
    case = Case(Deaf, refs=True, wrapper_refs=True)
    for name in ("triplet miners", "pair miners"):
        assert compatibility.outcome(COLUMNS[name], case) == compatibility.NOT_MINED


@pytest.mark.parametrize("name", CASES)
def test_classes_are_rows(name):
    assert f"\n| {name} | " in compatibility.PAGE.read_text()
