"""The base of losses with one proxy a class."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import Tensor

from pml_ext.losses.base_loss import BaseLoss
from pml_ext.losses.logits import LogitsMixin
from pml_ext.losses.similarity import can_stream, distance_matrix, is_plain
from pml_ext.pml_internals import RegularizedWeights
from pml_ext.precision import widen
from pml_ext.streaming.proxy_chunks import check_chunk_size
from pml_ext.types import LossDict
from pml_ext.validation import already_valid, check_count, is_learned


class BaseProxyLoss(RegularizedWeights, LogitsMixin, BaseLoss):
    """Proxies as a parameter ``proxies``, ``(num_classes, embedding_size)``, that is moved where used and never cast.

    Raises:
        ValueError: If a size or ``chunk_size`` is not an integer >= 1.
    """

    num_classes: int
    embedding_size: int

    def __init__(
        self, num_classes: int, embedding_size: int, chunk_size: int | None, process_group: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_classes", num_classes), ("embedding_size", embedding_size)):
            check_count(name, value)
        check_chunk_size(chunk_size)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.chunk_size = chunk_size
        self.shards = None if process_group is None else self._class_shards(num_classes, process_group)
        if self.shards is None:
            self.proxies = torch.nn.Parameter(torch.empty(num_classes, embedding_size))
            self.weight_init_func(self.proxies)
        else:
            self.proxies = self.shards.draw(embedding_size, self.weight_init_func)
        self.record("num_classes", "embedding_size")

    def _class_shards(self, num_classes: int, process_group: Any) -> Any:
        """Return which classes this rank has.

        Raises:
            ValueError: If the loss has what needs all proxies in one place.
        """
        from pml_ext.distributed.sharding import ClassShards  # on use: DTensor takes a second to import

        if self.weight_regularizer is not None:
            raise ValueError("weight_regularizer must not be given with process_group, which splits the proxies")
        if not is_plain(self.distance):
            raise ValueError(
                "distance must be a CosineSimilarity or DotProductSimilarity with p = 2 and without statistics with "
                f"process_group, got {self.distance}"
            )
        return ClassShards(num_classes, process_group)

    def _logits(self, embeddings: Tensor) -> Tensor:
        """Return the similarities (or distances) to all proxies, ``(B, num_classes)``."""
        if self.shards is not None:
            raise NotImplementedError("get_logits needs all proxies in one place: load the state into an unsplit loss")
        proxies = self._proxies_for(embeddings)
        return distance_matrix(self.distance, widen(embeddings, proxies.dtype), proxies)

    def _proxies_for(self, embeddings: Tensor) -> Tensor:
        """Return the proxies on the embeddings' device, in the wider of both dtypes; the parameter stays as it is."""
        dtype = torch.promote_types(self.proxies.dtype, embeddings.dtype)
        return widen(self.proxies.to(embeddings.device), dtype)

    def _can_stream(self, embeddings: Tensor, *settings: Any) -> bool:
        """Whether to walk over the proxies: not with settings that are learned, which get their gradient elsewhere."""
        if self.shards is not None:
            return True
        return not is_learned(*settings) and can_stream(self.distance, embeddings, self.num_classes)

    def _streamed(self, walk: Callable[..., Any], embeddings: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        """Call one of the functions of ``pml_ext.streaming``."""
        walk = partial(_call_valid, walk)
        if torch.compiler.is_compiling():  # a call that is not looked into, instead of a loop that is unrolled
            walk = torch.compiler.disable(walk)  # type: ignore[no-untyped-call]
        proxies: Any = self.proxies
        shard = None
        if self.shards is not None:
            shard = self.shards.of_this_batch()
            proxies, embeddings = proxies.to_local(), self.shards.sum_gradients(embeddings)
        settings = {"normalize": self.distance.normalize_embeddings, "chunk_size": self.chunk_size, "shard": shard}
        return walk(embeddings, proxies.to(embeddings.device), labels, **settings, **kwargs)

    def _regularize_proxies(self, terms: LossDict, embeddings: Tensor) -> None:
        if self.weight_regularizer is not None:  # or proxies would be moved for nothing
            self.regularize_weights(terms, self._proxies_for(embeddings))

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()


def _call_valid(walk: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with already_valid():
        return walk(*args, **kwargs)
