"""One way to logits for all losses that have them."""

import torch
from torch import Tensor

from pml_ext.precision import full_precision, full_precision_in_backward, upcast_half
from pml_ext.validation import already_valid, check_batch, validation_wanted


class LogitsMixin:
    """Gives a loss ``get_logits``, with checked input and in float32 or better; the loss has ``_logits``."""

    embedding_size: int | None

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Return a number for each sample and class, ``(B, num_classes)``, float32 or better.

        A softmax's logits with their scale, without margins. Of a loss with proxies and no softmax
        (``ProxyAnchorLoss``), similarities; with a distance that is not inverted, distances: small is near. Of an
        ensemble, the mean over learners; of ``IntraBatchLoss``, those of its raw loss.

        Args:
            embeddings: ``(B, D)``, floating point, finite.

        Raises:
            TypeError: If ``embeddings`` are not floating point, or a loss inside has no ``get_logits``.
            ValueError: If their shape or a value breaks a rule.
        """
        if validation_wanted():
            check_batch(embeddings, embedding_size=self.embedding_size)
        with full_precision(embeddings.device), already_valid():
            logits = self._logits(upcast_half(embeddings))
            full_precision_in_backward([logits], [embeddings])
            return logits

    def _logits(self, embeddings: Tensor) -> Tensor:
        raise NotImplementedError


def logits_of(loss_func: torch.nn.Module | None, embeddings: Tensor, name: str) -> Tensor:
    """Return the logits of a loss inside another.

    Raises:
        TypeError: If it has none.
    """
    if not hasattr(loss_func, "get_logits"):
        raise TypeError(f"{name} must define get_logits; {type(loss_func).__name__} does not")
    logits: Tensor = loss_func.get_logits(embeddings)  # type: ignore[operator, union-attr]
    return logits
