import pytest
import torch

from pml_ext.neighbors import knn_graph

EMB = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def neighbors_of(edge_index, i):
    return edge_index[0, edge_index[1] == i].tolist()


def by_hand(emb, k):
    unit = emb.double() / emb.double().norm(dim=1, keepdim=True)
    similarity = unit @ unit.T
    return [[j for j in similarity[i].argsort(descending=True).tolist() if j != i][:k] for i in range(len(emb))]


both_ways = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["faiss", "torch"])


@both_ways
@pytest.mark.parametrize("k", [1, 5, 100])
def test_neighbors(dtype, k, device):
    edge_index = knn_graph(EMB.to(device, dtype), k).cpu()
    for i, expected in enumerate(by_hand(EMB, k)):
        assert neighbors_of(edge_index, i) == expected
    assert edge_index.shape == (2, 40 * min(k, 39))
    assert (edge_index[1].diff() >= 0).all()


@both_ways
def test_mini_batches(dtype):
    batch = torch.tensor([0] * 10 + [3] * 1 + [7] * 29)
    edge_index = knn_graph(EMB.to(dtype), 3, batch=batch)
    assert torch.equal(batch[edge_index[0]], batch[edge_index[1]])
    for start, stop in ((0, 10), (10, 11), (11, 40)):
        for i, expected in enumerate(by_hand(EMB[start:stop], 3)):
            assert neighbors_of(edge_index, start + i) == [start + j for j in expected]


@both_ways
def test_equal_rows(dtype):
    """A sample is never its own neighbor, though others lie as near."""
    edge_index = knn_graph(torch.ones(6, 3, dtype=dtype), 2)
    assert edge_index.shape == (2, 12)
    assert (edge_index[0] != edge_index[1]).all()


def test_chunks(monkeypatch):
    whole = knn_graph(EMB.double(), 5)
    monkeypatch.setattr("pml_ext.neighbors.similarity._CHUNK_ELEMENTS", 130)  # three rows at a time
    assert torch.equal(knn_graph(EMB.double(), 5), whole)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half(half):
    assert torch.equal(knn_graph(EMB.to(half), 3), knn_graph(EMB.to(half).float(), 3))


def test_autocast_changes_nothing(device):
    """Where products are not faiss's, that is on CUDA."""
    emb = torch.randn(300, 32, device=device)
    expected = knn_graph(emb, 10)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert torch.equal(knn_graph(emb, 10), expected)


def test_few_samples():
    assert knn_graph(EMB[:1], 3).shape == (2, 0)
    assert knn_graph(EMB[:0], 3).shape == (2, 0)
    assert knn_graph(EMB[:0], 3).dtype == torch.long


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((EMB, 0), ValueError, "k must be an integer >= 1, got 0"),
        ((EMB.long(), 1), TypeError, r"embeddings must have a floating point dtype, got torch\.int64"),
        ((EMB[0], 1), ValueError, r"embeddings must have shape .*, got \(6,\)"),
        ((EMB / 0, 1), ValueError, "embeddings must be finite"),
        ((EMB, 1, torch.arange(40).flip(0)), ValueError, "batch must be sorted"),
        ((EMB, 1, torch.arange(4)), ValueError, r"batch must have shape"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        knn_graph(*args)
