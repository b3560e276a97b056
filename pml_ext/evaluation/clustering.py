"""How well the clusters of embeddings agree with their classes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def clustering_metrics(embeddings: Tensor, codes: Tensor, metrics: Sequence[str]) -> dict[str, float]:
    """Return normalized and adjusted mutual information of classes and of as many k-means clusters.

    The clusters are those of PML's ``AccuracyCalculator``: faiss, 20 iterations, float32, on the CPU.

    Args:
        embeddings: ``(N, D)``, floating point, finite.
        codes: ``(N,)``, int64.
        metrics: "NMI", "AMI" or both.
    """
    import faiss  # on use: only clusters need it
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score  # on use: slow to load

    points = embeddings.float().cpu().contiguous().numpy()
    # One point for each cluster is enough: faiss would warn of classes with fewer than 39, and do the same.
    kmeans = faiss.Kmeans(points.shape[1], len(torch.unique(codes)), niter=20, min_points_per_centroid=1)
    kmeans.train(points)
    clusters = kmeans.index.search(points, 1)[1][:, 0]
    score = {"NMI": normalized_mutual_info_score, "AMI": adjusted_mutual_info_score}
    return {name: float(score[name](codes.numpy(), clusters)) for name in metrics}
