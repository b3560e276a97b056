"""Embeddings in clusters, and their groups of neighbors with sets and loops."""

import torch

D = 6
LABELS = torch.arange(12).repeat_interleave(5)


def clusters():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(12, D, generator=generator, dtype=torch.float64)
    return centers[LABELS] + 0.6 * torch.randn(60, D, generator=generator, dtype=torch.float64)


EMB = clusters()


def reference_groups(emb, k1, size):
    """The neighbors with sets and loops."""
    unit = emb / emb.norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T).fill_diagonal_(2)
    order = similarity.argsort(1, descending=True).tolist()

    def mutual(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    groups, grown = [], 0
    for i in range(len(emb)):
        own = mutual(i, k1)
        members = set(own)
        for j in own:
            theirs = mutual(j, round(k1 / 2))
            if len(theirs & own) > 2 / 3 * len(theirs):
                members |= theirs
        grown += len(members) > len(own)
        nearest = [j for j in order[i] if j in members] + [j for j in order[i] if j not in members]
        groups.append(nearest[:size])
    return groups, grown
