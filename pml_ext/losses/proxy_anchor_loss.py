"""Proxy-Anchor loss whose proxies keep their dtype."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from pytorch_metric_learning.reducers import DivisorReducer
from torch import Tensor

from pml_ext.losses.base_proxy_loss import BaseProxyLoss
from pml_ext.losses.log_sum_exp import log1p_sum_exp, log1p_sum_exp_by_class
from pml_ext.losses.sample_weights import sample_weights
from pml_ext.pml_internals import element_term, reduced_term
from pml_ext.streaming.proxy_anchor import proxy_anchor_loss
from pml_ext.types import Indices, LossDict
from pml_ext.validation import check_settings, scalar

TupleWeights = Literal["exponent", "factor"]


class ProxyAnchorLoss(BaseProxyLoss):
    r"""Each proxy pulls the samples of its class and pushes all others, the hardest ones most.

    $$L = \frac{1}{|P^+|} \sum_{p \in P^+} \log\Big(1 + \sum_{i \in X_p^+} e^{-\alpha (s(x_i, p) - \delta)}\Big)
        + \frac{1}{|P|} \sum_{p \in P} \log\Big(1 + \sum_{i \in X_p^-} e^{\alpha (s(x_i, p) + \delta)}\Big)$$

    $P$: all proxies. $P^+$: those with a sample in the batch. $X_p^\pm$: samples of the proxy's class, and the others.
    $s$: similarity (for a distance the signs swap). With ``indices_tuple``, $w_i - 1$ is added to the exponents, $w_i$
    being the share of sample $i$ in the tuple, as PML 2.9 does: a sample without a pair counts $1 / e$ of the most
    frequent one. See ``tuple_weights``.

    Value, parameter name and initialization are PML's, so that state dicts are exchangeable. It differs where PML
    falls short: proxies are used on the device of the embeddings but never cast, and ``ClassWeightedReducer`` weighs
    each proxy by its class. With PML's ``CosineSimilarity`` (the default) and ``DotProductSimilarity`` it walks over
    the proxies in chunks, without a matrix of batch times classes, and has first derivatives only.

    Args:
        num_classes: $|P|$ >= 1. Labels lie in 0 to ``num_classes - 1``.
        embedding_size: Width of embeddings and proxies, >= 1.
        margin: $\delta$, in the units of ``distance`` (cosine: 0 to 1 is usual).
        alpha: $\alpha$ > 0, the scale. Like ``margin`` it may be a parameter; then a matrix of batch times classes is
            formed, which ``process_group`` refuses.
        tuple_weights: "exponent": as above. "factor": exponentials are multiplied by $w_i$, as by PML 3: samples that
            nothing mined names are left out, and classes that have no other sample leave $P^+$.
        chunk_size: Proxies in a chunk. None: as many as fit into the cache.
        process_group: Ranks (a process group or a ``DeviceMesh``) over which proxies, their gradient and the
            optimizer's state are split: each rank has its classes only, as rows of a ``DTensor``. Such a loss must be
            called through ``pml_ext.distributed.DistributedLossWrapper``, and takes cosine or dot product, its default
            reducer and no ``weight_regularizer``. None: all classes are here.
        **kwargs: Passed to PML's ``WeightRegularizerMixin`` (``weight_init_func``, ``weight_regularizer``,
            ``weight_reg_weight``) and ``BaseMetricLossFunction``.

    Shape:
        - embeddings: ``(B, embedding_size)``, floating point. labels: ``(B,)``, integers.
        - output: scalar. To the reducer: ``pos_loss`` and ``neg_loss``. Under the default ``DivisorReducer`` they are
          already divided by the divisors of the equation, which takes one walk over the proxies; others get
          ``(num_classes,)``, reduction type "element", with these divisors, which takes two.

    Raises:
        TypeError: If ``alpha`` or ``margin`` is not a number, or requires a gradient with ``process_group``.
        ValueError: If a size is < 1, ``alpha`` is not positive, ``chunk_size`` is < 1, ``tuple_weights`` is unknown,
            ``labels`` are missing or out of range, or ``ref_emb`` is given.
        NotImplementedError: If a gradient of the streamed loss is differentiated.

    Examples:
        >>> loss_func = ProxyAnchorLoss(num_classes=3, embedding_size=3)
        >>> _ = torch.nn.init.eye_(loss_func.proxies)
        >>> loss_func(torch.eye(3), torch.tensor([0, 1, 2])).item()  # log(1 + exp(-28.8)) + log(1 + 2 exp(3.2))
        3.9133...

    Source:
        Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, Eq. 4. The weights of ``indices_tuple``
        are PML's addition.
    """

    sub_losses = ("pos_loss", "neg_loss")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32,
        chunk_size: int | None = None,
        process_group: Any = None,
        tuple_weights: TupleWeights = "exponent",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, chunk_size, process_group, **kwargs)
        check_settings(positive={"alpha": alpha}, finite={"margin": margin})
        if tuple_weights not in get_args(TupleWeights):
            raise ValueError(f"tuple_weights must be one of {', '.join(get_args(TupleWeights))}, got {tuple_weights!r}")
        self.margin = margin
        self.alpha = alpha
        self.tuple_weights = tuple_weights
        self.record("alpha", "margin")

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        shift = None
        if indices_tuple is not None:
            weights = sample_weights(indices_tuple, len(labels), embeddings.dtype)
            if self.tuple_weights == "factor":
                named = weights > 0
                embeddings, labels, shift = embeddings[named], labels[named], weights[named].log()
            else:
                shift = weights - 1
        reduced = self._divides_only()
        if self._can_stream(embeddings, self.alpha, self.margin):
            settings = {"alpha": self.alpha, "margin": self.margin, "sample_shift": shift, "per_class": not reduced}
            if self.shards is not None and (not reduced or not len(labels)):
                what = "default reducer and no statistics" if len(labels) else "batch that is not empty"
                raise ValueError(f"a loss with process_group must have a {what}")
            parts = self._streamed(proxy_anchor_loss, embeddings, labels, **settings)
            if self.shards is not None:
                parts = self.shards.sum_values(torch.stack(parts)).unbind()
        else:
            parts = self._dense(embeddings, labels, shift)
            if reduced:  # a count that is a tensor does not break a compiled graph
                is_present = labels.new_zeros(self.num_classes).index_fill(0, labels, 1)
                parts = parts[0].sum() / is_present.sum().clamp_min(1), parts[1].sum() / self.num_classes
        if reduced:
            terms = {name: reduced_term(part) for name, part in zip(self.sub_losses, parts, strict=True)}
        else:
            present = len(torch.unique(labels))
            terms = {"pos_loss": element_term(parts[0], present), "neg_loss": element_term(parts[1], self.num_classes)}
        self._regularize_proxies(terms, embeddings)
        return terms

    def _dense(self, embeddings: Tensor, labels: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both parts of each class, ``(C,)``, by the equation: for any distance, derivative and transform."""
        sign = 1 if self.distance.is_inverted else -1  # a distance is a negative similarity, and so is its margin
        similarity, margin, alpha = sign * self._logits(embeddings), sign * scalar(self.margin), scalar(self.alpha)
        own = similarity.gather(1, labels[:, None]).squeeze(1)  # (B,)
        positive, negative = -alpha * (own - margin), alpha * (similarity + margin)
        if shift is not None:
            positive, negative = positive + shift, negative + shift[:, None]
        others = torch.ones_like(similarity, dtype=torch.bool).scatter(1, labels[:, None], False)
        return log1p_sum_exp_by_class(positive, labels, self.num_classes), log1p_sum_exp(negative, others, 0)

    def _divides_only(self) -> bool:
        """Whether reducing is dividing by the divisor, which the walk does: then it also computes the gradients."""
        by_name = getattr(self.reducer, "reducers", {})
        return not self.collect_stats and all(
            name in by_name and type(by_name[name]) is DivisorReducer and not by_name[name].collect_stats
            for name in self.sub_losses
        )

    def element_labels(self, labels: Tensor | None) -> Tensor:
        """Return 0 to ``num_classes - 1``: the losses are per proxy, and reducers are to see the proxies' classes."""
        return torch.arange(self.num_classes, device=None if labels is None else labels.device)

    def get_default_reducer(self) -> DivisorReducer:
        return DivisorReducer()

    def get_default_weight_init_func(self) -> Callable[[Tensor], Tensor]:
        return partial(torch.nn.init.kaiming_normal_, mode="fan_out")
