"""Any loss for each learner of an ensemble, plus what keeps the learners different (ABE)."""

import copy
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction, ContrastiveLoss
from torch import Tensor, nn

from pml_ext.learners import split_learners
from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.children import agreed_size, all_leave_out_own, check_child, check_weights, mine
from pml_ext.losses.divergence_loss import DivergenceLoss
from pml_ext.losses.logits import LogitsMixin, logits_of
from pml_ext.pml_internals import reduced_term
from pml_ext.reducers import BatchAverageReducer
from pml_ext.types import Indices, LossDict
from pml_ext.validation import already_valid, check_count, check_miner, check_settings, scalar, shown


class EnsembleLoss(LogitsMixin, BaseLoss):
    r"""Train M learners whose vectors lie side by side in one embedding, and keep them different.

    $$L = \sum_{m} L_m(b_m) + \lambda \, L_\text{div}(b_1, \ldots, b_M)$$

    $b_m$: slice m of the embeddings, as it is: a loss with a cosine or a normalized distance normalizes it.
    $L_\text{div}$: ``DivergenceLoss``, the mean over the batch. Children are called through their own ``forward``:
    their reducers and regularizers act. The sum over learners is not a mean: with M learners, the learner part is about
    M times that of one loss.

    The paper's contrastive loss is PML's with squared distances and the sum over pairs divided by the batch size:

        ContrastiveLoss(
            pos_margin=0, neg_margin=1, distance=LpDistance(power=2), reducer=BatchAverageReducer()
        )

    ``EnsembleLoss.paper`` has it.

    Args:
        loss: What each learner is trained with, any loss of PML or of this package, sized for one slice. Without
            parameters: one loss, which all learners share. With parameters each learner has its own: a list of M
            losses; or a function without arguments that makes one, called M times; or one loss, of which M copies are
            made, their parameters drawn afresh by ``reset_parameters`` or ``weight_init_func`` (PML's losses with
            proxies have the latter). A loss without parameters that keeps something between batches (PML's
            ``DynamicSoftMarginLoss``) is better given as a function.
        num_learners: M >= 1.
        divergence_weight: $\lambda$ >= 0. May be changed during training.
        divergence_margin: ``margin`` of the ``DivergenceLoss``.
        miner: Mines for each learner on its own slice whenever no ``indices_tuple`` is given. An ``indices_tuple``
            (mined on the whole vector) goes to every learner. ``CrossBatchMemory`` takes this miner for its own, which
            sees whole vectors.
        **kwargs: Passed to PML's ``BaseMetricLossFunction``. With ``collect_stats``, ``learner_0_loss``,
            ``learner_1_loss``, ... and ``learner_similarity`` (the mean cosine between two learners of one sample) are
            recorded. ``distance`` is refused: it belongs to ``loss``. Reducers get two numbers that are already
            reduced: Threshold-, ClassWeighted- and PerAnchorReducer have no effect here, but act in a child.

    Attributes:
        losses: The learners' losses, ``learner_0``, ``learner_1``, ..., or the one that all share, ``shared``.
        divergence: The ``DivergenceLoss``.

    Shape:
        - embeddings: ``(B, M * d)``, floating point. labels: ``(B,)``, integers, where ``loss`` needs them.
        - output: scalar. To the reducer: ``learner_loss`` and ``divergence_loss``, weighted, reduction type
          "already_reduced".

    Raises:
        TypeError: If ``loss`` is none of the above, or ``miner`` cannot be called.
        ValueError: If an argument breaks a rule, ``num_learners`` does not divide the width, two learners share
            parameters, the parameters of a single loss cannot be drawn afresh, or ``ref_emb`` is given and ``loss``
            does not support it.

    Examples:
        >>> from pml_ext.losses import HybridLoss, MultiSimilarityLoss
        >>> _ = torch.manual_seed(0)
        >>> emb, labels = torch.randn(8, 64), torch.arange(8) // 2
        >>> bool(EnsembleLoss(MultiSimilarityLoss(), num_learners=4)(emb, labels) > 0)
        True
        >>> loss_func = EnsembleLoss(HybridLoss(num_classes=10, embedding_size=16), num_learners=4)
        >>> bool(loss_func(emb, labels) > 0), len(list(loss_func.parameters()))
        (True, 4)

    Source:
        Kim, Goyal, Chawla, Lee, Kwon: "Attention-based Ensemble for Deep Metric Learning", ECCV 2018: sum over
        learners, weight 1 and margin 1 are the paper's.
    """

    sub_losses = ("learner_loss", "divergence_loss")
    needs_labels = False  # or the learners' loss asks for them
    takes_refs = True
    instead = MappingProxyType(
        {**BaseLoss.instead, "divergence": "it makes its DivergenceLoss, with divergence_weight and divergence_margin"}
    )

    def __init__(
        self,
        loss: BaseMetricLossFunction | Sequence[BaseMetricLossFunction] | Callable[[], BaseMetricLossFunction],
        num_learners: int,
        divergence_weight: float = 1.0,
        divergence_margin: float = 1.0,
        miner: Callable[..., Indices] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(num_learners, nn.Module):
            raise TypeError(
                f"num_learners must be an integer, got {shown(num_learners)}: EnsembleLoss(loss, num_learners)"
            )
        check_count("num_learners", num_learners)
        check_settings({"divergence_margin": divergence_margin})
        check_weights(divergence_weight=divergence_weight)
        check_miner(miner)
        if kwargs.get("distance") is not None:
            raise ValueError(f"distance must be given to loss itself, got {type(kwargs['distance']).__name__}")
        super().__init__(**kwargs)
        self.losses = nn.ModuleDict(_one_for_each(loss, num_learners))
        self.divergence = DivergenceLoss(num_learners, divergence_margin, collect_stats=self.collect_stats)
        self.num_learners = num_learners
        self.num_classes = agreed_size("num_classes", None, dict(self.losses))
        slice_size = agreed_size("embedding_size", None, dict(self.losses))
        self.embedding_size = slice_size and num_learners * slice_size
        self.divergence_weight = divergence_weight
        self.miner = miner
        of_learners = [f"learner_{m}_loss" for m in range(num_learners)]
        self.record("num_learners", "divergence_weight", statistics=[*of_learners, "learner_similarity"])

    @classmethod
    def paper(cls, num_learners: int = 8, **kwargs: Any) -> "EnsembleLoss":
        r"""Return the loss with the numbers of the ABE paper.

        $$L_m = \frac{1}{N} \sum_{i, j} y_{ij} D^2_{ij} + (1 - y_{ij}) [1 - D^2_{ij}]_+$$

        $D$: distance of unit vectors, $y_{ij}$: 1 for a positive pair, 0 for a negative one, N: batch size.

        Args:
            num_learners: M.
            **kwargs: Passed to ``EnsembleLoss``.
        """
        loss = ContrastiveLoss(pos_margin=0, neg_margin=1, distance=LpDistance(power=2), reducer=BatchAverageReducer())
        return cls(loss, num_learners, **kwargs)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        slices = split_learners(embeddings, self.num_learners).unbind(1)
        refs: Sequence[Tensor | None] = [None] * self.num_learners
        if ref_emb is not None:
            refs = split_learners(ref_emb, self.num_learners, "ref_emb").unbind(1)
        values = []
        with already_valid():
            for m, (own, ref) in enumerate(zip(slices, refs, strict=True)):
                mined = indices_tuple
                if mined is None and self.miner is not None:
                    if labels is None:
                        raise ValueError("labels are required where the loss mines, got None")
                    mined = mine(self.miner, own, labels, ref, ref_labels)
                values.append(self.losses[self._name_of(m)](own, labels, mined, ref, ref_labels))
            divergence = self.divergence(embeddings)
        if self.collect_stats:
            self.learner_similarity = self.divergence.learner_similarity
            for m, value in enumerate(values):
                setattr(self, f"learner_{m}_loss", value.item())
        return {
            "learner_loss": reduced_term(torch.stack(values).sum()),
            "divergence_loss": reduced_term(scalar(self.divergence_weight) * divergence),
        }

    def _logits(self, embeddings: Tensor) -> Tensor:
        """Return the mean of the learners' logits."""
        slices = split_learners(embeddings, self.num_learners).unbind(1)
        names = map(self._name_of, range(self.num_learners))
        logits = [
            logits_of(self.losses[name], own, f"losses[{name!r}]") for name, own in zip(names, slices, strict=True)
        ]
        return torch.stack(logits).mean(0)

    @property
    def leaves_out_own(self) -> bool:  # type: ignore[override]
        return all_leave_out_own(self)

    def compares_with_refs(self) -> dict[str, nn.Module]:
        """Return the children that see ``ref_emb``, by name."""
        return {f"losses[{name!r}]": child for name, child in self.losses.items()}

    def _name_of(self, m: int) -> str:
        return "shared" if "shared" in self.losses else f"learner_{m}"


def _one_for_each(loss: Any, num_learners: int) -> dict[str, BaseMetricLossFunction]:
    """Return the learners' losses, or the one that all share, under names that PML's record keeper can use."""
    if isinstance(loss, BaseMetricLossFunction):
        _check_learner("loss", loss)
        if not any(True for _ in loss.parameters()):
            return {"shared": loss}
        made = [_drawn_afresh(copy.deepcopy(loss), num_learners) for _ in range(num_learners)]
    elif isinstance(loss, list | tuple | nn.ModuleList):
        made = list(loss)
        if len(made) != num_learners:
            raise ValueError(f"loss must be num_learners = {num_learners} losses, got a list of {len(made)}")
    elif callable(loss) and not isinstance(loss, nn.Module):
        made = [_made_by(loss) for _ in range(num_learners)]
    else:
        raise TypeError(
            f"loss must be a BaseMetricLossFunction, a list of them or a function that makes one, got {shown(loss)}"
        )
    seen: set[int] = set()
    for m, child in enumerate(made):
        _check_learner(f"loss[{m}]", child)
        parameters = {id(p) for p in child.parameters()}
        if parameters & seen:
            raise ValueError(f"loss must be one of its own for each learner, got loss[{m}] with parameters of another")
        seen |= parameters
    return {f"learner_{m}": child for m, child in enumerate(made)}


def _made_by(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except TypeError as error:
        if not isinstance(make, type):
            raise
        raise TypeError(f"loss must be a loss with its arguments, got {shown(make)}: {error}") from error


def _check_learner(name: str, loss: Any) -> None:
    check_child(name, loss)
    if isinstance(loss, DivergenceLoss):
        raise ValueError(
            f"{name} must be what a learner is trained with, got a DivergenceLoss, which EnsembleLoss adds itself: "
            "EnsembleLoss(loss, num_learners, divergence_weight, divergence_margin)"
        )


def _drawn_afresh(loss: BaseMetricLossFunction, num_learners: int) -> BaseMetricLossFunction:
    for module in reversed(list(loss.modules())):  # what contains a module may draw its parameters in another way
        own = list(module.parameters(recurse=False))
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
        elif own and callable(getattr(module, "weight_init_func", None)):
            with torch.no_grad():
                for parameter in own:
                    if parameter.numel() == 1:  # a setting that is learned: it begins where it was set
                        continue
                    module.weight_init_func(parameter)
        elif own:
            raise ValueError(
                f"loss must be a list of {num_learners} losses or a function that makes one, got one "
                f"{type(module).__name__}, whose parameters no reset_parameters or weight_init_func draws afresh"
            )
    return loss
