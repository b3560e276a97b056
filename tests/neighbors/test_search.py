import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pml_ext.neighbors import search as module
from pml_ext.neighbors.search import search

EMB = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
ITSELF = torch.arange(50)


def by_loops(queries, gallery, k, own=None):
    """The k nearest rows of each query by squared distance, ties by index, without torch."""
    nearest = []
    for i, row in enumerate(queries.double().numpy()):
        distances = [(((row - other) ** 2).sum(), j) for j, other in enumerate(gallery.double().numpy())]
        nearest.append([j for _, j in sorted(distances) if own is None or j != own[i]][:k])
    return nearest


def gathered(chunks, length):
    """The neighbors of all queries as lists, in order, and the sizes of chunks."""
    nearest, sizes = [None] * length, []
    for rows, neighbors in chunks:
        sizes.append(len(rows))
        for row, some in zip(rows.tolist(), neighbors.tolist(), strict=True):
            assert nearest[row] is None
            nearest[row] = some
    return nearest, sizes


@pytest.fixture
def few_at_once(monkeypatch):
    """Tiles of 7 rows and blocks of 2, so that 50 rows have all cases."""
    monkeypatch.setattr(module, "_TILE", 7)
    monkeypatch.setattr(module, "_BLOCK", 2)
    monkeypatch.setattr(module, "_ALIKE", 1)
    monkeypatch.setattr(module, "_KEYS_AT_ONCE", 16)


@pytest.mark.parametrize("k", [0, 1, 3, 7, 49])
@pytest.mark.parametrize("chunk_size", [None, 1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_loops(k, chunk_size, dtype, device):
    x = EMB.to(device, dtype)
    nearest, sizes = gathered(search(x, x, k, ITSELF, chunk_size), 50)
    assert nearest == by_loops(EMB, EMB, k, ITSELF)
    assert sizes == {None: [50], 1: [1] * 50, 20: [20, 20, 10]}[chunk_size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("offset", "spread"), [(10.0, 0.02), (-1e4, 1.0), (1e5, 1e-8)])
def test_rows_far_from_zero(offset, spread, dtype, device):
    """A squared length of 200,000 has no digit left for distances of a thousandth."""
    moved = (EMB.to(dtype) * spread + offset).to(device)
    expected = by_loops(moved.cpu(), moved.cpu(), 10, ITSELF)
    assert gathered(search(moved, moved, 10, ITSELF), 50)[0] == expected
    others = gathered(search(moved[:9], moved[9:].repeat(2, 1), 10), 9)[0]
    assert others == by_loops(moved[:9].cpu(), moved[9:].repeat(2, 1).cpu(), 10)


def test_whole_numbers_far_from_zero_are_equally_far_as_before():
    x = torch.randint(0, 4, (60, 3), generator=torch.Generator().manual_seed(1)).float()
    expected = by_loops(x, x, 59, torch.arange(60))
    for offset in (0.0, 1000.0, -70001.0):
        assert gathered(search(x + offset, x + offset, 59, torch.arange(60)), 60)[0] == expected


@pytest.mark.parametrize("k", [1, 3, 12, 30])
def test_in_tiles_and_blocks(k, few_at_once):
    assert gathered(search(EMB, EMB, k, ITSELF), 50)[0] == by_loops(EMB, EMB, k, ITSELF)
    assert gathered(search(EMB[:9], EMB[9:], k), 9)[0] == by_loops(EMB[:9], EMB[9:], k)


def test_ties_come_by_index(few_at_once, device):
    """Small integers, whose products are exact; -0.0 is 0.0."""
    x = torch.randint(-1, 2, (90, 2), generator=torch.Generator().manual_seed(1)).float()
    x[3] = -x[3]
    for k in (1, 5, 88):
        nearest, _ = gathered(search(x.to(device), x.to(device), k, torch.arange(90)), 90)
        assert nearest == by_loops(x, x, k, torch.arange(90))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_equal_rows_come_by_index(num_rows, num_different, seed):
    """Rows with random numbers, many of them equal: products round alike wherever a row stands."""
    generator = torch.Generator().manual_seed(seed)
    copy = torch.randint(num_different, (num_rows,), generator=generator)
    x = torch.randn(num_different, 33, generator=generator)[copy]
    nearest, _ = gathered(search(x, x, num_rows - 1, torch.arange(num_rows)), num_rows)
    for i, row in enumerate(nearest):
        alike = [j for j in range(num_rows) if copy[j] == copy[i] and j != i]
        assert row[: len(alike)] == alike


@pytest.mark.parametrize("num_rows", [33, 34, 35, 1000, 70_001])
@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_come_by_index_for_any_number_of_queries(num_rows, num_queries, dtype, device):
    """Products with a single vector round equal rows differently, and so do remainders of rows on some processors."""
    for seed in range(1 if num_rows > 100 else 20):
        generator = torch.Generator().manual_seed(seed)
        gallery = torch.randn(1, 5, dtype=dtype, generator=generator).repeat(num_rows, 1).to(device)
        queries = torch.randn(num_queries, 5, dtype=dtype, generator=generator).to(device)
        for k in (3, num_rows // 8):
            ((_, neighbors),) = search(queries, gallery, k)
            assert neighbors.tolist() == [list(range(k))] * num_queries


def test_a_number_for_each_query():
    """Queries that want about as many are searched together, and none is lost."""
    wanted = torch.arange(50).flip(0) % 13
    chunks = list(search(EMB, EMB, wanted, ITSELF, chunk_size=8))
    nearest, _ = gathered(chunks, 50)
    for i, row in enumerate(nearest):
        assert row[: wanted[i]] == by_loops(EMB[i : i + 1], EMB, int(wanted[i]), [i])[0]
    assert sum(neighbors.numel() for _, neighbors in chunks) < 1.4 * int(wanted.sum())


def test_queries_that_are_not_searched():
    wanted = torch.where(torch.arange(50) % 3 == 0, 2, -1)
    nearest, _ = gathered(search(EMB, EMB, wanted, ITSELF), 50)
    right = by_loops(EMB, EMB, 2, ITSELF)
    assert nearest == [right[i] if i % 3 == 0 else None for i in range(50)]


def test_chunks_keep_memory_low(monkeypatch):
    monkeypatch.setattr(module, "_DISTANCES_AT_ONCE", 1000)
    assert gathered(search(EMB, EMB, 3), 50)[1] == [20, 20, 10]
    monkeypatch.setattr(module, "_NEIGHBORS_AT_ONCE", 30)
    assert gathered(search(EMB, EMB, 3), 50)[1] == [10] * 5
    assert max(len(rows) * neighbors.shape[1] for rows, neighbors in search(EMB, EMB, torch.arange(50))) <= 49


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    half = (100 + EMB).to(dtype)
    assert (
        gathered(search(half, half, 9, ITSELF), 50)[0] == gathered(search(half.float(), half.float(), 9, ITSELF), 50)[0]
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert gathered(search(EMB, EMB, 9, ITSELF), 50)[0] == by_loops(EMB, EMB, 9, ITSELF)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads, monkeypatch):
    monkeypatch.setattr(module, "_KEYS_AT_ONCE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert gathered(search(EMB, EMB, 9, ITSELF), 50)[0] == by_loops(EMB, EMB, 9, ITSELF)


def test_order_of_floats():
    """Keys and radix sorts are in the order of floats, infinities and tiny numbers included."""
    values = np.array([np.inf, 3e38, 1.5, 1.0, 1e-45, 0.0, -1e-45, -1.0, -3e38, -np.inf], dtype=np.float32)
    keys = module._keys(torch.from_numpy(values)[None], torch.zeros(1, dtype=torch.long))[0]
    assert (keys[1:] < keys[:-1]).all()
    values[-2] = -0.0  # beside 0.0, which comes first
    columns = np.empty((1, 9), dtype=np.int64)
    module._sort_columns(values[None], columns)
    assert columns[0].tolist() == [9, 7, 6, 5, 8, 4, 3, 2, 1]


@pytest.mark.parametrize("k", [1, 40, 299])
@pytest.mark.parametrize("threads", [1, 3])
def test_sorted_columns(k, threads, monkeypatch):
    """Of random numbers with ties, by which 16 bits they differ."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(-3, 4, (5, 300), generator=generator)
    distance = coarse * torch.where(torch.rand(5, 300, generator=generator) < 0.5, 1.0, 1 + 2**-20)
    with module._Smallest(torch.device("cpu")) as smallest:
        columns = smallest.sorted_columns(distance, k)
        keys = smallest.of_keys(module._keys(distance, torch.arange(300)), k, in_order=True)
    assert torch.equal(columns, keys & module._INDEX)


def test_progress(capsys):
    assert len(list(search(EMB, EMB, 1, progress=True))) == 1
    assert "searching" in capsys.readouterr().err
