import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from pml_ext.datasets.path_array import PathArray

PATHS = ["photos/cat/1.jpg", Path("photos/cat/12.jpg"), "photos/über/\udcff.jpg", "photos/cat"]


def test_is_a_sequence_of_strings():
    paths = PathArray(PATHS)
    strings = [os.fspath(path) for path in PATHS]
    assert (len(paths), list(paths), paths[1], paths[-1]) == (4, strings, strings[1], strings[3])
    assert (paths[1:3], paths[::-2], paths.index("photos/cat")) == (strings[1:3], strings[::-2], 3)
    assert paths == strings and paths == PathArray(strings) and paths != strings[:3] and paths != [*strings[:3], "x"]
    assert repr(paths) == "PathArray: 4 paths"
    assert pickle.loads(pickle.dumps(paths)) == strings
    for index in (4, -5):
        with pytest.raises(IndexError):
            paths[index]
    assert list(PathArray([])) == []
    assert list(PathArray(["a"] * 3)) == ["a"] * 3


def test_costs_no_object_for_each_path():
    folder = "/data/" + 60 * "x" + "/"
    tracemalloc.start()
    paths = PathArray(f"{folder}{i:06}.jpg" for i in range(5000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 5000 * (10 + 8) + 5000  # what differs and where it ends; a list of strings has over 600,000
    assert paths[4321] == f"{folder}004321.jpg"
