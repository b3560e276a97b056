"""A pair loss and a proxy loss as one loss (MHGL)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.children import agreed_size, all_leave_out_own, check_child, check_weights, mine
from pml_ext.losses.logits import LogitsMixin, logits_of
from pml_ext.losses.multi_similarity_loss import MultiSimilarityLoss
from pml_ext.losses.proxy_anchor_loss import ProxyAnchorLoss
from pml_ext.pml_internals import reduced_term
from pml_ext.types import Indices, LossDict
from pml_ext.validation import already_valid, check_miner, scalar, shown

_PROXY_ARGUMENTS = ("weight_init_func", "weight_regularizer", "weight_reg_weight", "process_group")


class HybridLoss(LogitsMixin, BaseLoss):
    r"""Combine a pair loss, rich in relations between samples, with a proxy loss, which converges fast.

    $$L = w_\text{pair} L_\text{pair} + w_\text{proxy} L_\text{proxy}$$

    One loss for miners, wrappers and trainers, with two sub-losses. The children are called through their own
    ``forward``: their reducers and regularizers act. The pair part takes ``indices_tuple`` and ``ref_emb``; the proxy
    part always sees the whole batch.

    Args:
        num_classes: Classes of the default ``proxy_loss``; not needed with another one.
        embedding_size: Width of the default ``proxy_loss``; not needed with another one.
        pair_loss: A loss of samples with samples. Default: ``MultiSimilarityLoss()``, shift 0.5.
        proxy_loss: A loss of samples with proxies. Default: ``ProxyAnchorLoss(num_classes, embedding_size)``.
        pair_weight: $w_\text{pair}$ >= 0. May be changed during training.
        proxy_weight: $w_\text{proxy}$ >= 0; it may be a parameter too.
        miner: Mines for the pair part whenever no ``indices_tuple`` is given; called with embeddings, labels, and the
            references or None. PML's ``DistributedLossWrapper`` with
            ``efficient=True`` always gives one; ``CrossBatchMemory`` takes this miner for its own.
        **kwargs: ``weight_init_func``, ``weight_regularizer``, ``weight_reg_weight`` and ``process_group`` reach the
            default proxy loss, ``distance`` the default children; each is refused if nothing would use it. The rest
            (``reducer``, ``embedding_regularizer``, ``collect_stats``, ...) is that of PML's
            ``BaseMetricLossFunction``. Reducers of the hybrid get two numbers that are already reduced: Threshold-,
            ClassWeighted- and PerAnchorReducer have no effect there, but act in a child.

    Shape:
        - embeddings: ``(B, D)``, floating point. labels: ``(B,)``, integers.
        - output: scalar. To the reducer: ``pair_loss`` and ``proxy_loss``, weighted, reduction type "already_reduced".

    Raises:
        TypeError: If a child is not a PML loss, or ``miner`` cannot be called.
        ValueError: If ``num_classes`` or ``embedding_size`` is missing for the default proxy loss or contradicts a
            child, a weight is negative, a child has a ``DoNothingReducer``, or an argument would not be used.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> loss_func = HybridLoss(num_classes=10, embedding_size=64)
        >>> bool(loss_func(torch.randn(8, 64), torch.arange(8) // 2) > 0)
        True

    Source:
        Ebrahimpour, Qian, Beach: "Multi-Head Deep Metric Learning Using Global and Local Representations", WACV 2022,
        Eq. 7. ``paper`` has the paper's numbers. The default shift is 0.5, not 1: chosen on validation classes of three
        data sets, see docs/benchmarks.md.
    """

    sub_losses = ("pair_loss", "proxy_loss")
    takes_refs = True

    def __init__(
        self,
        num_classes: int | None = None,
        embedding_size: int | None = None,
        pair_loss: BaseMetricLossFunction | None = None,
        proxy_loss: BaseMetricLossFunction | None = None,
        pair_weight: float = 1.0,
        proxy_weight: float = 0.03,
        miner: Callable[..., Indices] | None = None,
        **kwargs: Any,
    ) -> None:
        check_weights(pair_weight=pair_weight, proxy_weight=proxy_weight)
        check_miner(miner)
        for name, size in (("num_classes", num_classes), ("embedding_size", embedding_size)):
            if isinstance(size, torch.nn.Module):
                cure = "HybridLoss(pair_loss=..., proxy_loss=...)"
                raise TypeError(f"{name} must be an integer, got {shown(size)}: {cure}")
        proxy_kwargs = {name: kwargs.pop(name) for name in _PROXY_ARGUMENTS if name in kwargs}
        if proxy_loss is not None and any(value is not None for value in proxy_kwargs.values()):
            names = ", ".join(proxy_kwargs)
            raise ValueError(f"{names} must be given to the proxy_loss itself, which is not the default one")
        if pair_loss is not None and proxy_loss is not None and kwargs.get("distance") is not None:
            raise ValueError("distance must be given to pair_loss and proxy_loss, neither of which is the default one")
        super().__init__(**kwargs)
        common = {name: kwargs[name] for name in ("distance", "collect_stats") if name in kwargs}
        if pair_loss is None:
            pair_loss = MultiSimilarityLoss(**common)
        if proxy_loss is None:
            if num_classes is None or embedding_size is None:
                raise ValueError(
                    "num_classes and embedding_size must be given to build the default proxy_loss (or give a "
                    f"proxy_loss), got num_classes={num_classes}, embedding_size={embedding_size}"
                )
            proxy_loss = ProxyAnchorLoss(num_classes, embedding_size, **proxy_kwargs, **common)
        children = {"pair_loss": pair_loss, "proxy_loss": proxy_loss}
        for name, child in children.items():
            check_child(name, child)
        self.pair_loss = pair_loss
        self.proxy_loss = proxy_loss
        self.num_classes = agreed_size("num_classes", num_classes, children)
        self.embedding_size = agreed_size("embedding_size", embedding_size, children)
        self.pair_weight = pair_weight
        self.proxy_weight = proxy_weight
        self.miner = miner
        self.record("pair_weight", "proxy_weight", statistics=["pair_loss_value", "proxy_loss_value"])

    @classmethod
    def paper(
        cls,
        num_classes: int,
        embedding_size: int,
        negative_sign: Literal["minus", "printed"] = "minus",
        **kwargs: Any,
    ) -> "HybridLoss":
        r"""Return the loss with the numbers of the MHGL paper.

        Multi-Similarity with alpha 2, beta 50 and shift 1, plus 0.03 times Proxy-Anchor with alpha 32 and margin 0.1,
        whose proxies are drawn from a normal distribution (of standard deviation 1: the paper gives none).

        Args:
            num_classes: Number of classes.
            embedding_size: Width of the embeddings.
            negative_sign: "printed": $S + 1$ in the sum over negatives, as in the paper's Eq. 6; "minus": $S - 1$, as
                in the Multi-Similarity paper.
            **kwargs: Passed to ``HybridLoss``, except ``pair_loss`` and the weights, which the paper fixes.

        Raises:
            ValueError: If one of these is given.
        """
        fixed = sorted({"pair_loss", "pair_weight", "proxy_weight"} & set(kwargs))
        if fixed:
            raise ValueError(f"{', '.join(fixed)} must not be given, the paper fixes them: use HybridLoss itself")
        if kwargs.get("proxy_loss") is None:
            kwargs.setdefault("weight_init_func", torch.nn.init.normal_)
        common = {name: kwargs[name] for name in ("distance", "collect_stats") if name in kwargs}
        pair_loss = MultiSimilarityLoss(alpha=2, beta=50, base=1.0, negative_sign=negative_sign, **common)
        return cls(num_classes, embedding_size, pair_loss, pair_weight=1.0, proxy_weight=0.03, **kwargs)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        if indices_tuple is None and self.miner is not None:
            indices_tuple = mine(self.miner, embeddings, labels, ref_emb, ref_labels)
        with already_valid():
            pair = self.pair_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            proxy = self.proxy_loss(embeddings, labels)
        if self.collect_stats:
            self.pair_loss_value, self.proxy_loss_value = pair.item(), proxy.item()
        return {
            "pair_loss": reduced_term(scalar(self.pair_weight) * pair),
            "proxy_loss": reduced_term(scalar(self.proxy_weight) * proxy),
        }

    def _logits(self, embeddings: Tensor) -> Tensor:
        """Return the proxy loss's logits."""
        return logits_of(self.proxy_loss, embeddings, "proxy_loss")

    @property
    def leaves_out_own(self) -> bool:  # type: ignore[override]
        return all_leave_out_own(self)

    def compares_with_refs(self) -> dict[str, BaseMetricLossFunction]:
        """Return the children that see ``ref_emb``, by name."""
        return {"pair_loss": self.pair_loss}

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
