"""Softmax loss with a margin of its own for every pair of classes, from a second modality (AAML)."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pml_ext.losses.base_proxy_loss import BaseProxyLoss
from pml_ext.losses.sample_weights import sample_weights
from pml_ext.pml_internals import element_term
from pml_ext.streaming.class_margins import ClassMargins, ClassMetric, Kind, prepare_distances, prepare_embeddings
from pml_ext.streaming.margin_softmax import margin_softmax_loss
from pml_ext.streaming.proxy_chunks import check_memory
from pml_ext.types import Indices, LossDict
from pml_ext.validation import check_batch, check_settings, scalar

Direction = Literal["distance", "similarity"]


class AdaptiveAdditiveMarginLoss(BaseProxyLoss):
    r"""Softmax loss with a margin for each pair of classes, set by their distance in a second modality.

    $$L_i = -\log \frac{e^{s c_{i y_i}}}{e^{s c_{i y_i}} + \sum_{j \ne y_i} e^{s (c_{ij} + m_{y_i j})}} \qquad
      m_{yj} = m_0 + a \, d_{yj}$$

    $c_{ij}$: cosine of sample $i$ and proxy $j$. $d_{yj}$: distance of classes $y$ and $j$ in the second modality, say
    text, divided by the largest one. $m_{yy} = 0$. If one of the two classes has no description, the margin is $m_0$.

    Tests compare it with its relatives: without a second modality, ``base_margin`` 0.35 and ``scale`` 64 it is PML's
    ``CosFaceLoss``; with ``base_margin`` 0 and ``scale`` 1 / temperature PML's ``NormalizedSoftmaxLoss``.

    With class embeddings the margins of a batch are formed chunk by chunk; a matrix of all classes is never stored.
    Proxies are used on the device of the embeddings and never cast.

    Args:
        num_classes: Number of classes >= 1. Labels lie in 0 to ``num_classes - 1``.
        embedding_size: Width of embeddings and proxies, >= 1.
        class_embeddings: A description of each class, ``(num_classes, E)``, tensor or numpy array, such as
            ``pml_ext.class_embeddings`` makes. A row with NaN, or of zeros: a class without description. It is kept
            as a buffer of that name, centered and scaled so that $d$ is a plain distance of its rows.
        class_distances: Instead, the distances themselves, ``(num_classes, num_classes)``, >= 0 with a zero diagonal;
            row $y$ holds the margins of samples of class $y$. A class whose row and column are NaN, or zeros: without
            description. Kept as a buffer. Without either, every margin is $m_0$.
        class_metric: Distance of class embeddings: "cosine" (1 - cosine), "euclidean" (slower: no matrix product) or
            "squared_euclidean".
        normalize: Whether to divide by the largest distance. For class embeddings that is exact up to 20,000 described
            classes; beyond, it is the largest among 20,000 classes drawn at random, always the same ones.
        margin_scale: $a$, in units of cosine. Without second modality it has no effect.
        base_margin: $m_0$, in units of cosine.
        direction: "distance": far classes get the larger margin. "similarity": near ones do; $1 - d$ replaces $d$.
        scale: $s$ > 0. ``scale``, ``base_margin`` and ``margin_scale`` may be parameters; then a matrix of batch
            times classes is formed, which ``process_group`` refuses.
        chunk_size: Proxies in a chunk. None: as many as fit into the cache.
        process_group: Ranks over which proxies and class descriptions are split, as in ``ProxyAnchorLoss``, but with
            any reducer.
        memory: Bytes (on each rank) that may be used from forward to backward for what would be computed twice
            otherwise, >= 0. It saves time for batches larger than ``embedding_size``; smaller ones need none, since
            the memory of the proxies' gradient, which is taken in forward, holds all of it.
        **kwargs: Passed to PML's ``WeightRegularizerMixin`` (``weight_init_func``, ``weight_regularizer``,
            ``weight_reg_weight``) and ``BaseMetricLossFunction``. ``distance`` may be any; other than PML's
            ``CosineSimilarity`` (the default) and ``DotProductSimilarity`` it needs a matrix of batch times classes,
            and a distance counts as a negative similarity.

    Shape:
        - embeddings: ``(B, embedding_size)``, floating point. labels: ``(B,)``, integers.
        - output: scalar. To the reducer: ``loss``, ``(B,)``, reduction type "element". With ``indices_tuple`` each
          sample's loss is multiplied by its share in the tuple, as in PML's classification losses.

    Raises:
        TypeError: If ``class_embeddings`` or ``class_distances`` is not a tensor or array of numbers, or requires a
            gradient, which a buffer does not get; if a setting is not a number, or requires a gradient with
            ``process_group``.
        RuntimeError: If a state is loaded whose margins another ``class_metric`` or ``normalize`` has made.
        ValueError: If both are given, their shape or a value breaks a rule, no class is described, an argument is out
            of range, ``labels`` are missing or out of range, or ``ref_emb`` is given.
        NotImplementedError: If a gradient of the streamed loss is differentiated.

    Examples:
        >>> names = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])  # class 1 is close to class 0, class 2 is not
        >>> loss_func = AdaptiveAdditiveMarginLoss(num_classes=3, embedding_size=3, class_embeddings=names)
        >>> loss_func.get_margins(torch.tensor([0]))
        tensor([[0.0000, 0.0300, 0.3000]])
        >>> _ = torch.nn.init.eye_(loss_func.proxies)
        >>> loss_func(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([0])).item()  # log(1 + exp(0.48) + exp(4.8))
        4.8213...

    Source:
        A reconstruction of Fehervari, Macedo: "Adaptive Additive Classification-Based Loss for Deep Metric Learning",
        arXiv 2006.14693, 2020. The abstract says that each negative proxy of a sample gets a margin, looked up from
        distances of classes that were computed beforehand on text; formula, sign, scaling and $s$ could not be read.
        Ours is the only form that adds a margin to each negative cosine. "distance" is the default since the abstract
        speaks of distances and the triplet loss that it builds on (Zhao et al., arXiv 1909.12939) gives far classes
        the larger margin; Li et al. (arXiv 2005.13826) add similarities instead. All numbers are ours.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        class_embeddings: Tensor | None = None,
        class_distances: Tensor | None = None,
        class_metric: ClassMetric = "cosine",
        normalize: bool = True,
        margin_scale: float = 0.3,
        base_margin: float = 0.0,
        direction: Direction = "distance",
        scale: float = 16.0,
        chunk_size: int | None = None,
        process_group: Any = None,
        memory: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, chunk_size, process_group, **kwargs)
        check_memory(memory)
        for name, word, known in (("class_metric", class_metric, ClassMetric), ("direction", direction, Direction)):
            if word not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {word!r}")
        check_settings(positive={"scale": scale}, finite={"margin_scale": margin_scale, "base_margin": base_margin})
        if isinstance(class_embeddings, str | list | tuple) and any(isinstance(x, str) for x in class_embeddings):
            raise TypeError(
                "class_embeddings must be numbers, got text: pml_ext.class_embeddings.from_text(names) embeds names"
            )
        if class_embeddings is not None and class_distances is not None:
            raise ValueError("class_embeddings and class_distances must not both be given, got both")
        self.class_metric = class_metric
        self.margin_scale = margin_scale
        self.base_margin = base_margin
        self.direction = direction
        self.scale = scale
        self.memory = memory
        described = None
        if class_embeddings is not None:
            class_embeddings, described = prepare_embeddings(class_embeddings, num_classes, class_metric, normalize)
        elif class_distances is not None:
            class_distances, described = prepare_distances(class_distances, num_classes, normalize)
        if described is not None and num_classes > 1 and not described.any():
            name = "class_distances" if class_embeddings is None else "class_embeddings"
            raise ValueError(f"{name} must describe a class, got rows of zeros or NaN only")
        self.register_buffer("class_embeddings", self._own_part(class_embeddings, 0))
        self.register_buffer("class_distances", self._own_part(class_distances, 1))  # columns: those of all rows
        self.register_buffer("class_is_described", self._own_part(described, 0))
        class_settings = None
        if described is not None:  # what the descriptions were prepared by, for who loads them
            metric = -1 if class_embeddings is None else get_args(ClassMetric).index(class_metric)
            class_settings = torch.tensor([metric, int(normalize)])
        self.register_buffer("class_settings", class_settings)
        self.record("margin_scale", "base_margin", "scale")

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> LossDict:
        if self._can_stream(embeddings, self.scale, self.base_margin, self.margin_scale):
            class_margins = self._class_margins(embeddings.device, self.margin_scale)
            settings = {"scale": self.scale, "margin": self.base_margin, "class_margins": class_margins}
            settings["memory"] = self.memory
            losses = self._streamed(margin_softmax_loss, embeddings, labels, **settings)
        else:  # the equation itself: for any distance, derivative and transform
            logits = self._logits(embeddings)
            logits = logits + scalar(self.scale) * self._margins(labels, logits.dtype)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        if indices_tuple is not None:
            losses = losses * sample_weights(indices_tuple, len(labels), losses.dtype)
        terms = {"loss": element_term(losses)}
        self._regularize_proxies(terms, embeddings)
        return terms

    @torch.no_grad()
    def get_margins(self, labels: Tensor) -> Tensor:
        """Return the margins $m_{y_i j}$ of samples of given classes, ``(B, num_classes)``, 0 for the own class.

        Raises:
            TypeError: If ``labels`` are not integers.
            ValueError: If a label is out of range.
        """
        if self.shards is not None:
            raise NotImplementedError("get_margins needs all classes in one place: load the state into an unsplit loss")
        dtype = torch.promote_types(self.proxies.dtype, torch.float32)
        check_batch(self.proxies.new_zeros(len(labels), 1, dtype=dtype), labels, num_classes=self.num_classes)
        labels = labels.to(self.proxies.device).long()
        return self._margins(labels, dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.class_settings is not None:
            state: Any = state_dict.setdefault(
                f"{prefix}class_settings", self.class_settings
            )  # of old versions: no word
            if state.tolist() != self.class_settings.tolist():
                error_msgs.append(
                    f"{prefix}class_metric and normalize must be those that the state's margins were made by, "
                    f"{_told(state)}, got a loss with {_told(self.class_settings)}"
                )
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _own_part(self, x: Tensor | None, dim: int) -> Tensor | None:
        """Return what belongs to this rank's classes, as a tensor of all ranks where classes are split."""
        if x is None or self.shards is None:
            return x
        own: Tensor = self.shards.own_part(x, dim)
        return own

    def _logits(self, embeddings: Tensor) -> Tensor:
        scale = scalar(self.scale)
        return super()._logits(embeddings) * (scale if self.distance.is_inverted else -scale)

    def _class_margins(self, device: torch.device, margin_scale: Any) -> ClassMargins | None:
        kind: Kind = "table"
        table, described = self.class_distances, self.class_is_described
        if self.class_embeddings is not None:
            table = self.class_embeddings
            kind = "euclidean" if self.class_metric == "euclidean" else "squared"
        if table is None:
            return None
        constant, slope = 0.0, margin_scale
        if self.direction == "similarity":
            constant, slope = slope, -slope
        if self.shards is not None:
            table, described = table.to_local(), described.to_local()
        return ClassMargins(table.to(device), described.to(device), kind, constant, slope)

    def _margins(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        size = len(labels), self.num_classes
        margins = torch.zeros(size, dtype=dtype, device=labels.device)
        class_margins = self._class_margins(labels.device, 1.0)
        if class_margins is not None:
            class_margins.of(labels, dtype).add_to(margins, 0)
        margins = scalar(self.base_margin) + scalar(self.margin_scale) * margins
        return margins.scatter(1, labels[:, None], 0.0)


def _told(state: Tensor) -> str:
    """Return what a state's two numbers say."""
    metric, normalized = state.tolist()
    made_by = "class_distances" if metric < 0 else repr(get_args(ClassMetric)[metric])
    return f"{made_by}, normalize={bool(normalized)}"
