"""Retrieval metrics by loops over sorted lists, in NumPy's float64."""

import numpy as np


def nearest_first(queries, gallery, own):
    """For each query the gallery rows by distance, then index, itself left out."""
    queries, gallery = (np.asarray(x, dtype=np.float64) for x in (queries, gallery))
    order = []
    for i, row in enumerate(queries):
        distance = ((gallery - row) ** 2).sum(1)
        order.append([int(j) for j in np.lexsort((np.arange(len(gallery)), distance)) if own is None or j != own[i]])
    return order


def values_of_queries(queries, labels, gallery=None, gallery_labels=None, ignored=None, ks=(1, 2, 4, 8)):
    """Return (label, {metric: value}) for each query that has a match, and how many have none."""
    own = range(len(queries)) if gallery is None else None
    gallery, gallery_labels = (queries, labels) if gallery is None else (gallery, gallery_labels)
    values, num_without = [], 0
    for i, order in enumerate(nearest_first(queries, gallery, own)):
        label = labels[i]
        if ignored is not None and label == ignored:
            continue
        right = [gallery_labels[j] == label for j in order]
        total = sum(right)
        if not total:
            num_without += 1
            continue
        ranks = [rank for rank, is_right in enumerate(right, 1) if is_right]
        precisions = [(rank, number / rank) for number, rank in enumerate(ranks, 1)]
        of_query = {
            "r_precision": sum(right[:total]) / total,
            "mean_average_precision_at_r": sum(p for rank, p in precisions if rank <= total) / total,
            "mean_average_precision": sum(p for _, p in precisions) / total,
            "mean_reciprocal_rank": 1 / ranks[0],
        }
        for k in ks:
            of_query |= {
                f"precision_at_{k}": sum(right[:k]) / k,
                f"recall_at_{k}": float(any(right[:k])),
                f"hit_rate_at_{k}": float(any(right[:k])),
            }
        values.append((label, of_query))
    return values, num_without
