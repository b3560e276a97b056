import os

import pytest

from pml_ext.datasets.file_copies import copied_files

LONG = bytes(range(256)) * 1000  # 256,000 bytes


def write(folder, contents):
    paths = [folder / f"{i}.jpg" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


@pytest.mark.parametrize(
    ("contents", "copies"),
    [
        ([b"one", b"two", b"one", b"three", b"two", b"one"], {2: 0, 4: 1, 5: 0}),
        ([LONG + b"a", LONG + b"b", LONG + b"a", b"x" + LONG], {2: 0}),  # alike at the beginning, and as long
        ([b"", b"", b"a"], {}),
        ([], {}),
    ],
)
def test_copies_byte_for_byte(contents, copies, tmp_path):
    assert copied_files(write(tmp_path, contents)) == copies


def test_what_is_no_file_is_a_copy_of_none(tmp_path):
    paths = write(tmp_path, [b"same", b"same"])
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "link").symlink_to("0.jpg")
    names = ["gone", "gone", "pipe", "pipe", ".", "link"]
    assert copied_files([*paths, *(tmp_path / name for name in names)]) == {1: 0, 7: 0}


def test_only_files_of_the_same_size_are_read(tmp_path, monkeypatch):
    paths = write(tmp_path, [b"a", b"bb", b"ccc", b"dd"])
    opened = []
    monkeypatch.setattr("builtins.open", lambda path, mode, _open=open: opened.append(path) or _open(path, mode))
    assert copied_files(paths) == {}
    assert opened == [paths[1], paths[3]]
