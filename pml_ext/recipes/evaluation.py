"""Embeddings of a data set, and how well they retrieve."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pml_ext import evaluation
from pml_ext.evaluation import METRICS
from pml_ext.modes import in_mode


@torch.no_grad()  # not inference_mode: what is returned may be trained on
def embed(
    trunk: nn.Module,
    dataset: Any,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the embeddings of a data set, of length 1, and its labels, on the CPU.

    Args:
        trunk: The network, used in eval mode and on its own device.
        dataset: Of transformed images and labels.
        batch_size: Images at a time.
        autocast: As in ``Trainer``.
        num_workers: Processes that load images.
        progress: Whether to show a progress bar.

    Returns:
        ``(N, D)`` float32 and ``(N,)``.
    """
    like = next(trunk.parameters(), torch.empty(0))
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=num_workers)
    embeddings, labels = [], []
    with in_mode(trunk):
        for images, batch_labels in tqdm(loader, desc="embedding", disable=not progress):
            with torch.autocast(like.device.type, autocast, enabled=autocast is not None):
                raw = trunk(images.to(like.device))
            embeddings.append(nn.functional.normalize(raw.float()).cpu())
            labels.append(torch.as_tensor(batch_labels))
    return torch.cat(embeddings), torch.cat(labels)


def retrieval_metrics(
    embeddings: Tensor,
    labels: Any,
    gallery: tuple[Tensor, Any] | None = None,
    metrics: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Return the metrics of ``pml_ext.evaluation.retrieval_metrics``, without counts.

    Args:
        embeddings: ``(N, D)``, the queries.
        labels: ``(N,)``.
        gallery: Embeddings and labels that are searched. None: every query searches all other queries.
        metrics: Names.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """
    searched, searched_labels = (None, None) if gallery is None else gallery
    values = evaluation.retrieval_metrics(embeddings, labels, searched, searched_labels, metrics)
    return {name: value for name, value in values.items() if not name.startswith("num_")}
