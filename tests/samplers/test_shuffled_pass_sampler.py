import numpy as np
import pytest
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.utils.data import DataLoader, TensorDataset

from pml_ext.losses import MultiSimilarityLoss
from pml_ext.samplers import ShuffledPassSampler

SIZES = [1, 3, 4, 7, 10, 11, 12]
LABELS = torch.arange(len(SIZES)).mul(5).repeat_interleave(torch.tensor(SIZES))[torch.randperm(sum(SIZES))]


def spread(drawn, values):
    """Return by how much the counts of some values differ."""
    counts = [drawn.count(value) for value in values]
    return max(counts) - min(counts)


@pytest.mark.parametrize(("m", "batch_size"), [(4, 12), (4, 28), (3, 15), (1, 2), (5, 10)])
def test_counts_are_within_one_at_any_time(m, batch_size):
    sampler = ShuffledPassSampler(LABELS, m, batch_size, length=6 * batch_size)
    assert len(sampler) == 6 * batch_size
    classes, images = [], {c: [] for c in LABELS.unique().tolist()}
    for _ in range(4):  # passes go on from epoch to epoch
        for batch in torch.tensor(list(sampler)).split(batch_size):
            groups = batch.view(-1, m)
            own = LABELS[groups]
            assert own.eq(own[:, :1]).all() and len(own[:, 0].unique()) == batch_size // m
            for c, group in zip(own[:, 0].tolist(), groups.tolist(), strict=True):
                classes.append(c)
                images[c] += group
                members = LABELS.eq(c).nonzero().flatten().tolist()
                assert len(set(group)) == min(m, len(members))
                assert spread(images[c], members) <= 1
            assert spread(classes, images) <= 1


def test_passes_differ():
    labels = torch.arange(20).repeat_interleave(2)
    sampler = ShuffledPassSampler(labels, 2, 10, seed=1)
    first, second = labels[list(sampler)][::2].tolist(), labels[list(sampler)][::2].tolist()
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    again, other = (list(ShuffledPassSampler(labels, 2, 10, seed=seed)) for seed in (1, 2))
    assert labels[again][::2].tolist() == first and again != other


def test_no_class_is_left_out_in_an_epoch():
    """PML's sampler draws each batch anew."""
    labels = torch.arange(1000).repeat_interleave(6)
    ours, theirs = ShuffledPassSampler(labels, 4, 120), MPerClassSampler(labels, 4, 120, len(labels))
    assert len(ours) == len(theirs)
    assert len(labels[list(ours)].unique()) == 1000 > 900 > len(labels[list(theirs)].unique())


@pytest.mark.parametrize("used", [0, 1, 12, 17, 59, 60])
def test_it_goes_on_in_the_middle(used, tmp_path):
    whole = ShuffledPassSampler(LABELS, 4, 12, length=60, seed=3)
    expected = [list(whole) for _ in range(3)]
    first = ShuffledPassSampler(LABELS, 4, 12, length=60, seed=3)
    list(first)
    running = iter(first)
    assert [next(running) for _ in range(used)] == expected[1][:used]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ShuffledPassSampler(LABELS, 4, 12, length=60, seed=99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    iter(second)  # what is not used changes nothing
    rest = [list(second) for _ in range(2)]
    assert rest == ([expected[1][used:], expected[2]] if used < 60 else [expected[2], rest[1]])


def test_it_goes_on_behind_what_a_loader_has_drawn_ahead():
    expected = [list(ShuffledPassSampler(LABELS, 4, 12, length=60, seed=3))][0]
    first = ShuffledPassSampler(LABELS, 4, 12, length=60, seed=3)
    loader = iter(DataLoader(torch.arange(len(LABELS)), 12, sampler=first))
    assert next(loader).tolist() == expected[:12]
    next(loader)
    state = first.state_dict(used=12)  # one of the two batches has been trained with
    second = ShuffledPassSampler(LABELS, 4, 12, length=60)
    second.load_state_dict(state)
    assert second.state_dict()["used"] == 12
    assert list(second) == expected[12:]
    with pytest.raises(ValueError, match="used must be 0 to 24, the images handed out, got 25"):
        first.state_dict(used=25)


@pytest.mark.parametrize("kind", [np.asarray, list, lambda x: np.asarray(x, dtype=np.uint8)])
def test_labels_of_any_kind(kind):
    labels = kind(LABELS.tolist())
    assert list(ShuffledPassSampler(labels, 2, 4, seed=0)) == list(ShuffledPassSampler(LABELS, 2, 4, seed=0))


def test_in_a_trainer_of_pml():
    images, trunk, seen = torch.randn(len(LABELS), 4), torch.nn.Linear(4, 4), []
    trainer = MetricLossOnly(
        {"trunk": trunk},
        {"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1)},
        12,
        {"metric_loss": MultiSimilarityLoss()},
        TensorDataset(images, LABELS),
        sampler=ShuffledPassSampler(LABELS, 4, 12),
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        data_and_label_getter=lambda batch: (seen.append(batch[1]), batch)[1],
    )
    trainer.train()
    assert [len(labels) for labels in seen] == [12] * 4
    assert all(labels.unique(return_counts=True)[1].tolist() == [4, 4, 4] for labels in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 0}, "m must be an integer >= 1, got 0"),
        (
            {"batch_size": 10},
            "batch_size must be a multiple of m = 4 and at most 4 times the number of classes, 7, got 10",
        ),
        ({"batch_size": 32}, "batch_size must be a multiple of m = 4 and .*, 7, got 32"),
        ({"length": 8}, "length must be >= batch_size = 12, got 8"),
        ({"labels": LABELS[:, None]}, r"labels must have shape \(N,\) with N >= 1, got \(48, 1\)"),
        ({"labels": []}, r"labels must have shape \(N,\) with N >= 1, got \(0,\)"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        ShuffledPassSampler(**({"labels": LABELS, "m": 4, "batch_size": 12} | changes))


def test_seeds():
    drawn = {tuple(ShuffledPassSampler(LABELS, 4, 12, seed=seed)) for seed in (5, np.int64(5), np.uint8(5))}
    assert len(drawn) == 1
    for seed in (1.5, True, "5"):
        with pytest.raises(TypeError, match=f"seed must be an integer or None, got {seed!r}"):
            ShuffledPassSampler(LABELS, 4, 12, seed=seed)


def test_the_state_of_other_numbers():
    sampler = ShuffledPassSampler(LABELS, 4, 12)
    batch = iter(sampler)
    for _ in range(24):
        next(batch)
    state = sampler.state_dict()
    for numbers, message in (
        ((2, 12), "with m=2, got 4"),
        ((4, 8), "with batch_size=8, got 12"),
        ((4, 12, 24), "of an epoch of up to 24 images, got 24 used"),
    ):
        with pytest.raises(ValueError, match=f"state must be .*{message}"):
            ShuffledPassSampler(LABELS, *numbers).load_state_dict(state)


def test_the_state_of_other_labels():
    state = ShuffledPassSampler(LABELS, 4, 12).state_dict()
    for labels in (LABELS[1:], LABELS.flip(0).sort().values):
        with pytest.raises(ValueError, match="state must be of a sampler with the same labels, got another"):
            ShuffledPassSampler(labels, 4, 12).load_state_dict(state)
