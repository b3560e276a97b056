import errno
import random

import numpy as np
import pytest
import torch

from pml_ext.recipes.checkpoint import read_checkpoint, try_checkpoint, whole_file, write_checkpoint, write_text

STATE = {"trunk": {"weight": torch.arange(300.0)}, "loss": {}, "history": [{"epoch": 1}]}


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, STATE)
    assert torch.equal(read_checkpoint(path)["trunk"]["weight"], STATE["trunk"]["weight"])
    assert torch.equal(torch.load(path, weights_only=True)["trunk"]["weight"], STATE["trunk"]["weight"])
    data = path.read_bytes()
    draw = random.Random(0)
    end = range(8 * len(data) - 16 * 8, 8 * len(data))  # of the checksum itself
    for bit in (*draw.sample(range(8 * len(data)), 60), *end):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(ValueError, match=rf"^cannot read {path}: .*put a copy or another checkpoint"):
            read_checkpoint(path)
    for length in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"^cannot read {path}: "):
            read_checkpoint(path)


def test_a_file_of_a_former_version(tmp_path):
    """It has no checksum of the whole, but those of its parts."""
    path = tmp_path / "last.pt"
    torch.save(STATE, path)
    assert torch.equal(read_checkpoint(path)["trunk"]["weight"], STATE["trunk"]["weight"])
    data = path.read_bytes()
    start = data.index(STATE["trunk"]["weight"].numpy().tobytes())
    path.write_bytes(flipped(data, 8 * start + 1234))
    with pytest.raises(ValueError, match=r"the checksum of .*data/0 is wrong"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "missing"),
    [({"trunk": {}, "loss": {}}, "history"), ([1], "history"), (STATE | {"history": []}, "history")],
)
def test_what_is_no_checkpoint(state, missing, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: a checkpoint must have '{missing}', got none"):
        read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="a checkpoint must exist to resume from, got none at "):
        read_checkpoint(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("trunk", [1], "trunk must be a state dict, got a list"),
        ("loss", None, "loss must be a state dict, got a NoneType"),
        ("history", {"epoch": 1}, "history must be a list of epochs, got "),
        ("history", [3], "history must be a list of epochs, got "),
    ],
)
def test_parts_of_a_checkpoint_that_are_something_else(name, value, message, tmp_path):
    write_checkpoint(tmp_path / "a.pt", {"trunk": {}, "loss": {}, "history": [{"epoch": 1}]} | {name: value})
    with pytest.raises(ValueError, match=rf"cannot read {tmp_path / 'a.pt'}: {message}"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_full_disk(tmp_path):
    import resource

    path = tmp_path / "last.pt"
    write_checkpoint(path, STATE)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        for write in (lambda: write_checkpoint(path, STATE), lambda: write_text(path, 1000 * "x")):
            with pytest.raises(OSError, match=rf"^cannot write {path}: \[Errno {errno.EFBIG}\] .* what was there"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_two_writers_have_files_of_their_own(tmp_path):
    path = tmp_path / "a.json"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second and not path.exists()
    assert path.read_text() == "first"  # which was closed last
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_loaded_again_is_noticed(tmp_path):
    try_checkpoint(tmp_path, STATE)
    with pytest.raises(TypeError, match=r"plain values, got best with numpy\S*scalar"):
        try_checkpoint(tmp_path, STATE | {"best": {"map": np.float64(0.5)}})
    with pytest.raises(TypeError, match=r"plain values, got best with .*lambda"):
        try_checkpoint(tmp_path, STATE | {"best": lambda: 0})
    assert not list(tmp_path.iterdir())
