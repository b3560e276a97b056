import pytest
import torch
from torch import nn

from pml_ext.recipes import embed, retrieval_metrics


def test_embed():
    x, labels = torch.randn(10, 4), torch.arange(10)
    trunk = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train()
    embeddings, embedded_labels = embed(trunk, torch.utils.data.TensorDataset(x, labels), batch_size=4)
    assert torch.equal(embedded_labels, labels)
    torch.testing.assert_close(embeddings, nn.functional.normalize(trunk[1](x)).detach())  # no dropout
    assert trunk.training
    assert not embeddings.is_inference()  # may be the input of a linear probe
    half, _ = embed(trunk, torch.utils.data.TensorDataset(x, labels), autocast=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, embeddings)
    torch.testing.assert_close(half, embeddings, atol=2e-2, rtol=0)


def test_metrics_by_hand():
    """Four points on a line of classes 0, 0, 1, 1: one query of class 1 has a neighbour of class 0 before its own."""
    angles = torch.tensor([0.0, 0.1, 0.25, 0.9])
    embeddings, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1])
    metrics = retrieval_metrics(embeddings, labels)
    # 0: 1 right; 1: 0 right; 2: 1 wrong; 3: 2 right. One match each, so that all metrics agree.
    assert set(metrics.values()) == {0.75}
    assert {type(value) for value in metrics.values()} == {float}


def test_metrics_of_a_slice():
    embeddings, labels = torch.randn(12, 8), torch.arange(12) // 3
    part = embeddings[:, 2:5]
    assert not part.is_contiguous()
    expected = retrieval_metrics(part.clone(), labels)
    assert retrieval_metrics(part, labels) == expected
    everyone = retrieval_metrics(part, labels, (part, labels), ("precision_at_1",))
    assert everyone == retrieval_metrics(part.clone(), labels, (part.clone(), labels), ("precision_at_1",))


def test_metrics_in_a_gallery():
    gallery = torch.eye(3), torch.tensor([7, 8, 9])
    metrics = retrieval_metrics(torch.eye(3)[[1, 2]], torch.tensor([8, 7]), gallery, ("precision_at_1",))
    assert metrics == {"precision_at_1": pytest.approx(0.5)}
