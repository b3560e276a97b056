"""Embeddings of a data set, and how well they retrieve."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pml_ext import evaluation
from pml_ext.datasets.image_reader import BrokenImageError
from pml_ext.modes import in_mode
from pml_ext.recipes.device import warn_of_slow_autocast

METRICS = evaluation.METRICS
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

    A row of zeros, which has no direction, stays as it is.

    Args:
        trunk: The network, used in eval mode and on its own device. It returns a row for each image.
        dataset: A data set of transformed images and their labels, integers.
        batch_size: Images at a time.
        autocast: dtype of the network's forward pass, as in ``Trainer``. None: no autocast.
        num_workers: Processes that load images.
        progress: Whether to show a progress bar.

    Returns:
        ``(N, D)`` float32 and ``(N,)``.

    Raises:
        TypeError: If the network does not return a floating point tensor, labels are not integers, or images are not
            tensors.
        ValueError: If the network returns another shape, or numbers that are not finite; or the data set is empty or
            does not give pairs.
    """
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise TypeError("dataset must be a data set, such as loader.dataset, got a DataLoader")
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=num_workers)
    try:
        embedded = _embed(trunk, tqdm(loader, desc="embedding", disable=not progress), autocast)
    except TypeError as error:
        if "default_collate" not in str(error) or "found" not in str(error):
            raise
        got = str(error).rpartition("found ")[2].strip()
        hint = "; recipe.transforms.test makes tensors of images" if "PIL" in got else ""
        raise TypeError(f"dataset must give tensors as images and integers as labels{hint}, got {got}") from error
    if embedded is None:
        raise ValueError("dataset must have at least one image, got none")
    return embedded


@torch.no_grad()
def embed_readable(
    trunk: nn.Module,
    dataset: Any,
    batch_size: int = 256,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``embed`` does, of the images that can be read, and which these are, ``(N,)``, bool.

    Raises:
        TypeError: If ``embed`` would raise it.
        ValueError: If ``embed`` would raise it, or no image can be read.
    """
    loader = torch.utils.data.DataLoader(_Readable(dataset), batch_size, num_workers=num_workers, collate_fn=_present)
    readable: list[Tensor] = []

    def batches() -> Iterator[Any]:
        for batch, present in tqdm(loader, desc="embedding", disable=not progress):
            readable.append(present)
            if batch is not None:
                yield batch

    embedded = _embed(trunk, batches(), autocast)
    if embedded is None:
        raise ValueError(f"dataset must have at least one image that can be read, got {len(dataset)} that cannot")
    return *embedded, torch.cat(readable)


class _Readable(torch.utils.data.Dataset[Any]):
    """A data set that has None where an image cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except BrokenImageError:
            return None


def _present(samples: list[Any]) -> tuple[Any, Tensor]:
    """Return a batch of the samples that there are, or None, and which these are."""
    present = [sample for sample in samples if sample is not None]
    mask = torch.tensor([sample is not None for sample in samples])
    return torch.utils.data.default_collate(present) if present else None, mask


def _embed(trunk: nn.Module, batches: Iterable[Any], autocast: torch.dtype | None) -> tuple[Tensor, Tensor] | None:
    """Return embeddings and labels of batches, None if there are none."""
    like = next(trunk.parameters(), torch.empty(0))
    warn_of_slow_autocast(like.device, autocast)
    embeddings: list[Tensor] = []
    labels: list[Tensor] = []
    with in_mode(trunk):
        for batch in batches:
            images, batch_labels = _checked_pair(batch)
            with torch.autocast(like.device.type, autocast, enabled=autocast is not None):
                raw = trunk(images.to(like.device))
            _check_output(raw, len(images), embeddings)
            embeddings.append(nn.functional.normalize(raw.float()).cpu())
            labels.append(batch_labels)
    return (torch.cat(embeddings), torch.cat(labels)) if embeddings else None


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Return images and labels of a loader's batch, as it has them.

    Raises:
        ValueError: If it is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:  # a tensor of two images could be taken apart, too
        got = f"{len(batch)} things" if isinstance(batch, tuple | list) else "one thing"
        if isinstance(batch, dict):
            got = f"a dictionary of {', '.join(map(str, batch))}"
        raise ValueError(f"dataset must give an image and a label for each index, got {got}")
    images, labels = batch
    return images, labels


def _checked_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels of a loader's batch."""
    images, labels = pair_of(batch)
    if not isinstance(labels, Tensor):
        first = labels[0] if isinstance(labels, tuple | list) else labels
        raise TypeError(f"dataset must give integers as labels, got {first!r}")
    if labels.ndim != 1:
        raise ValueError(f"dataset must give one label for each image, got labels of shape {tuple(labels.shape)}")
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise TypeError(f"dataset must give integers as labels, got {labels[labels != labels.round()][0].item()}")
    return images, labels


def _check_output(raw: Any, num_images: int, before: list[Tensor]) -> None:
    """Check what a network makes of some images; ``before`` is what it made of those in front of them."""
    if not isinstance(raw, Tensor):
        raise TypeError(f"trunk must return one tensor, got {type(raw).__name__}")
    if raw.ndim != 2 or len(raw) != num_images or not raw.shape[1]:
        advice = ": pool or flatten feature maps" if raw.ndim > 2 else ""
        raise ValueError(
            f"trunk must return a row for each image, shape ({num_images}, D), got {tuple(raw.shape)}{advice}"
        )
    if not raw.is_floating_point():
        raise TypeError(f"trunk must return floating point, got {raw.dtype}")
    if before and raw.shape[1] != before[0].shape[1]:
        raise ValueError(
            f"trunk must return rows of one width, got {before[0].shape[1]} and, from row {_count(before)} on, "
            f"{raw.shape[1]}"
        )
    wrong = torch.linalg.vector_norm(raw.float(), dim=1).isfinite().logical_not().nonzero().flatten()
    if len(wrong):
        x = raw[wrong[0]]
        odd = x[x.isfinite().logical_not()].tolist()
        got = odd[0] if odd else f"{x.abs().max().item():.3g}, which makes a row too long for float32,"
        rows = ", ".join(str(_count(before) + row) for row in wrong[:5].tolist()) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"trunk must return finite embeddings, got {got} in row {_count(before) + int(wrong[0])}; "
            f"{len(wrong)} of the first {_count(before) + num_images} rows: {rows}"
        )


def _count(parts: list[Tensor]) -> int:
    return sum(map(len, parts))


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
        TypeError: If ``gallery`` is no pair, or ``pml_ext.evaluation.retrieval_metrics`` raises it.
        ValueError: If ``pml_ext.evaluation.retrieval_metrics`` raises it.
    """
    if gallery is not None and not (isinstance(gallery, tuple | list) and len(gallery) == 2):
        raise TypeError(f"gallery must be a pair of embeddings and labels, or None, got a {type(gallery).__name__}")
    searched, searched_labels = (None, None) if gallery is None else gallery
    values = evaluation.retrieval_metrics(embeddings, labels, searched, searched_labels, metrics)
    return {name: value for name, value in values.items() if not name.startswith("num_")}
