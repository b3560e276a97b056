"""What this package uses of PML beyond its public face.

PML 2.9 has no public base for networks, and its losses have hooks that PML 3, according to its documentation, does not
have: records of settings and statistics, names of sub-losses, reduction types, regularizers that a base class finds by
    name. What else
differs there are public hooks (``get_default_distance``) and names of wrappers, which stand where they are used.
"""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.losses import mixins as pml_mixins
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    DivisorReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
)
from pytorch_metric_learning.regularizers import BaseRegularizer as PmlRegularizer
from pytorch_metric_learning.utils import module_with_records as pml_records
from torch import Tensor

from pml_ext.types import LossDict
from pml_ext.validation import check_module

PmlCrossBatchMemory: Any = pml_losses.CrossBatchMemory  # PML's own, also where its namespace is patched with ours
PmlSelfSupervisedLoss: Any = pml_losses.SelfSupervisedLoss


class _Records:
    """Settings and statistics that PML's record keeper writes down.

    Attributes:
        instead: What to write in place of an argument that there is not, by its name.
    """

    instead: Mapping[str, str] = MappingProxyType({})

    def __init__(self, **kwargs: Any) -> None:
        try:
            super().__init__(**kwargs)
        except TypeError as error:  # of PML's last base class, about what no class has taken
            name = re.match(r"ModuleWithRecords\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
            if name is None:
                raise
            cure = self.instead.get(name[1], f"it has {', '.join(_arguments(type(self)))}")
            raise TypeError(f"{type(self).__name__} has no argument {name[1]}: {cure}") from None

    def record(self, *settings: str, statistics: Sequence[str] = ()) -> None:
        """Name attributes to be recorded: settings always, statistics (0 at each forward) with ``collect_stats``."""
        recordable: Any = self
        recordable.add_to_recordable_attributes(list_of_names=settings, is_stat=False)
        recordable.add_to_recordable_attributes(list_of_names=statistics, is_stat=True)


def statistics_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the statistics that a module has recorded, by name; empty for one that records none."""
    return {name: getattr(module, name) for name in vars(module).get("_record_these_stats", ())}


def settings_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the recorded settings of a module, by name."""
    return {name: getattr(module, name) for name in getattr(module, "_record_these", ())}


class ModuleWithRecords(_Records, pml_records.ModuleWithRecords):
    """The base of networks: PML's trainers and record keepers know it."""


class Regularizer(_Records, PmlRegularizer):
    """The base of regularizers."""


class LossFunction(_Records, BaseMetricLossFunction):
    """The base of losses: what PML's own base asks of them, in the words of this package.

    Attributes:
        sub_losses: Names of what ``compute_loss`` returns.
    """

    sub_losses: tuple[str, ...] = ("loss",)
    instead = MappingProxyType(
        {"miner": "pass what the miner finds, loss_func(embeddings, labels, indices_tuple)"}
        | dict.fromkeys(("weight_init_func", "weight_regularizer", "weight_reg_weight"), "losses with proxies have it")
    )

    def __init__(self, **kwargs: Any) -> None:
        for name, example in (
            ("distance", "CosineSimilarity()"),
            ("reducer", "MeanReducer()"),
            ("embedding_regularizer", "LpRegularizer()"),
        ):
            check_module(name, kwargs.get(name), example)
        super().__init__(**kwargs)

    def _sub_loss_names(self) -> list[str]:
        return [*self.sub_losses]

    def clear_statistics(self) -> None:
        """Set the statistics to 0, as each forward begins."""
        self.reset_stats()

    def reduce_terms(self, terms: LossDict, embeddings: Tensor, labels: Tensor | None) -> Any:
        """Add the embeddings' regularization to the terms and return what the reducer makes of them.

        Args:
            terms: What ``compute_loss`` has returned.
            embeddings: ``(B, D)``.
            labels: What the indices of the terms count.
        """
        self.add_embedding_regularization_to_loss_dict(terms, embeddings)
        total = self._sum_of_reduced(terms, embeddings.dtype)
        return self.reducer(terms, embeddings, labels) if total is None else total

    def _sum_of_reduced(self, terms: LossDict, dtype: torch.dtype) -> Tensor | None:
        """Return what PML's plain reducers make of terms that are all reduced, by a fraction of their calls.

        None where a reducer is another one or records statistics, or a term is no such number: then they are called.
        """
        reducers = self.reducer.reducers if type(self.reducer) is MultipleReducers else {}
        if terms.keys() != reducers.keys() or self.reducer.collect_stats:
            return None
        if any(type(x) not in (DivisorReducer, MeanReducer) or x.collect_stats for x in reducers.values()):
            return None
        values = [term["losses"] for term in terms.values() if term["reduction_type"] == "already_reduced"]
        if len(values) < len(terms) or not all(
            isinstance(x, Tensor) and not x.ndim and x.dtype == dtype for x in values
        ):
            return None
        return functools.reduce(torch.add, values)

    def reduces_by_sums(self) -> bool:
        """Whether all that the reducers of ``sub_losses`` ask for is in sums and counts: see ``reduce_sum``."""
        reducers = self.reducer.reducers if type(self.reducer) is MultipleReducers else {}
        return all(name in reducers and _is_by_sums(reducers[name]) for name in self.sub_losses)

    def reduce_sum(self, name: str, total: Tensor, active: Tensor, number: Tensor) -> Tensor:
        """Return what the reducer of a sub-loss makes of losses >= 0, given their sum.

        Args:
            name: The sub-loss.
            total: The sum.
            active: How many losses are > 0.
            number: How many there are.
        """
        kind = type(self.reducer.reducers[name])
        if kind is SumReducer:
            return total
        return total / (active if kind is AvgNonZeroReducer else number).clamp_min(1)

    def set_reducer(self, reducer: Any) -> None:
        """Set the reducer as PML does, but refuse a ``MultipleReducers`` with keys that are not sub-losses."""
        if isinstance(reducer, MultipleReducers):
            unknown = sorted(set(reducer.reducers) - set(self.sub_loss_names()))
            if unknown:
                names = ", ".join(self.sub_loss_names())
                raise ValueError(f"reducer must have keys among the sub-losses {names}, got {', '.join(unknown)}")
        super().set_reducer(reducer)

    def extra_repr(self) -> str:
        """Show the recorded settings."""
        return ", ".join(f"{name}={value}" for name, value in settings_of(self).items())


def _arguments(kind: type) -> list[str]:
    """Return the names of a class's arguments, PML's included."""
    names = dict[str, None]()
    for base in kind.__mro__:
        parameters = inspect.signature(vars(base).get("__init__", lambda: None)).parameters.values()
        names |= {p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if base.__name__ == "ModuleWithRecords" and base.__module__ == pml_records.__name__:
            break
    return [name for name in names if name != "self"]


def _is_by_sums(reducer: Any) -> bool:
    """Whether a reducer is PML's own mean, sum, or mean of what is not 0, without statistics."""
    if reducer.collect_stats or type(reducer) not in (AvgNonZeroReducer, MeanReducer, SumReducer):
        return False
    return type(reducer) is not AvgNonZeroReducer or (reducer.low, reducer.high) == (0, None)


class RegularizedWeights(pml_mixins.WeightRegularizerMixin):
    """Weights with an initialization (``weight_init_func``) and a regularizer; comes before ``LossFunction``."""

    def __init__(self, **kwargs: Any) -> None:
        draw = kwargs.get("weight_init_func")
        if draw is not None and not callable(draw):
            raise TypeError(f"weight_init_func must be a function such as torch.nn.init.normal_, got {draw!r}")
        check_module("weight_regularizer", kwargs.get("weight_regularizer"), "LpRegularizer()")
        super().__init__(**kwargs)

    def regularize_weights(self, terms: LossDict, weights: Tensor) -> None:
        """Add the weights' regularization to the terms."""
        self.add_weight_regularization_to_loss_dict(terms, weights)


def element_term(losses: Tensor, divisor: int | None = None) -> dict[str, Any]:
    """Return what reducers take for the losses of samples or classes, ``(N,)``; of none, 0.

    Args:
        losses: One for each sample of the batch, or for each class.
        divisor: What ``DivisorReducer`` divides their sum by. None: their number.
    """
    if not len(losses):  # the mean of nothing would be NaN
        return reduced_term(losses.sum())
    indices = torch.arange(len(losses), device=losses.device)
    return {
        "losses": losses,
        "indices": indices,
        "reduction_type": "element",
        "divisor": len(losses) if divisor is None else divisor,
    }


def pair_term(losses: Tensor, anchors: Tensor, others: Tensor, positive: bool) -> dict[str, Any]:
    """Return what reducers take for the losses of pairs, ``(P,)``; of none, 0.

    Args:
        losses: One for each pair.
        anchors: ``(P,)``, rows of the batch.
        others: ``(P,)``, rows of the references.
        positive: Whether the pairs are positive.
    """
    if not len(losses):
        return reduced_term(losses.sum())
    kind = "pos_pair" if positive else "neg_pair"
    return {"losses": losses, "indices": (anchors, others), "reduction_type": kind, "divisor": len(losses)}


def reduced_term(value: Tensor) -> dict[str, Any]:
    """Return what reducers take for one number."""
    return {"losses": value, "indices": None, "reduction_type": "already_reduced"}


def values_in(reduced: Any) -> list[Tensor]:
    """Return the tensors that a reducer has given: one number, or of ``DoNothingReducer`` those of the terms."""
    return [reduced] if isinstance(reduced, Tensor) else [term["losses"] for term in reduced.values()]


def clear_statistics(module: Any) -> None:
    """Set the statistics of one of PML's modules to 0, as its forward does."""
    module.reset_stats()
