"""Embeddings of a data set, and how well they retrieve."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import FaissKMeans
from torch import Tensor, nn
from tqdm import tqdm

from pml_ext.modes import in_mode

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
"""Names of the metrics that are computed by default."""


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
    labels: Tensor,
    gallery: tuple[Tensor, Tensor] | None = None,
    metrics: Sequence[str] = METRICS,
) -> dict[str, float]:
    """Return PML's metrics, 0 to 1.

    Args:
        embeddings: ``(N, D)``, the queries.
        labels: ``(N,)``.
        gallery: Embeddings and labels that are searched. None: every query searches all other queries.
        metrics: Names of PML's ``AccuracyCalculator``.
    """
    quiet = FaissKMeans(min_points_per_centroid=1)  # faiss would warn of small classes, and do the same
    calculator = AccuracyCalculator(
        include=tuple(metrics), k="max_bin_count", device=torch.device("cpu"), kmeans_func=quiet
    )
    if gallery is not None:
        gallery = gallery[0].contiguous(), gallery[1]
    values = calculator.get_accuracy(embeddings.contiguous(), labels, *(gallery or ()))  # faiss asserts contiguity
    return {name: float(value) for name, value in values.items()}  # NumPy's numbers would not load with weights_only
