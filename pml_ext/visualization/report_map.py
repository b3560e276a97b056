"""Where images lie on the map of a report."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pml_ext.extras import comes_with


class MapMethod(NamedTuple):
    """A way to place rows of length 1 in two dimensions: ``place(unit, seed)`` gives ``(N, 2)``."""

    name: str
    place: Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]]


def map_method(method: str, num_points: int) -> MapMethod:
    """Return the method of a name.

    Args:
        method: "tsne" or "umap". For fewer than 5 points it is t-SNE.
        num_points: That are to be placed.

    Raises:
        ImportError: If ``method`` is "umap" and umap-learn is not installed.
        ValueError: If ``method`` is another.
    """
    if method not in ("tsne", "umap"):
        raise ValueError(f"method must be 'tsne' or 'umap', got {method!r}")
    if method == "umap":
        with comes_with("umap", "umap-learn", "method 'umap'", ", or use method='tsne'"):
            module = importlib.import_module("umap")
        if num_points >= 5:  # its spectral start fails for fewer
            return MapMethod("UMAP", partial(_place_by_umap, module))
    return MapMethod("t-SNE", _place_by_tsne)


def choose_points(length: int, num_points: int, seed: int) -> list[int]:
    """Return random indices, sorted."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:num_points]
    return sorted(order.tolist())


def _place_by_tsne(unit: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Return positions in two dimensions."""
    from sklearn.manifold import TSNE  # on use: slow to load, and only maps need it
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # on use: only maps need it

    init = "pca" if unit.shape[1] > 1 and unit.std(0).max() > 1e-4 else "random"  # PCA of equal rows has no scale
    with threadpool_limits(1):  # sums in another order would give another map
        return TSNE(init=init, perplexity=min(30, (len(unit) - 1) / 3), random_state=seed).fit_transform(unit)


def _place_by_umap(umap: Any, unit: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    neighbors = min(15, len(unit) - 1)
    placed = umap.UMAP(n_neighbors=neighbors, metric="cosine", random_state=seed, n_jobs=1).fit_transform(unit)
    return np.nan_to_num(placed)  # it drops points that it cannot connect
