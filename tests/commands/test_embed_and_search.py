"""``pml-ext embed`` and ``search`` without a training: names, full disks, damaged indexes, networks that fail."""

import io
import json
import os
import re
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pml_ext import recipes
from pml_ext.commands import embed, search
from pml_ext.commands.command_line import Command, print_any_name
from pml_ext.commands.index import content_of, read_index, write_index
from pml_ext.commands.main import main
from pml_ext.datasets import ImageReader
from pml_ext.recipes.run_lock import RunLock

INDEX = ["embeddings.npy", "index.faiss", "index.json", "paths.txt"]
NAMES = ["a.png", "b.png", "sub/c.png", "sub/猫.png", os.fsdecode(b"sub/\xe9t\xe9.png")]


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A network that is loaded from any folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    torch.manual_seed(0)
    made = recipes.recipe("triplet", 2, width=4, in_channels=3, image_size=8, embedding_size=6)
    made.trunk.eval()
    run = SimpleNamespace(recipe=made, autocast=None, checksum="1a2b", reader=ImageReader())
    for module in (embed, search):
        monkeypatch.setattr(module, "load_run", lambda *args: run)
    return run


def indexed(photos):
    embed.main(photos.parent / "run", photos)
    return photos.parent / "run" / "index"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(name, arguments, capsys):
    """Run a command as a program does; return the exit status and stderr without progress bars."""
    try:
        main([name, *map(str, arguments)])
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    bars = "embedding:", "checking images:"
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    return status, [line for line in lines if line and not line.startswith(bars)]


@pytest.mark.parametrize(
    ("encoding", "errors", "printed"),
    [
        ("cp1252", "strict", b"\\u732b \xe9 \\udce9\n"),
        ("ascii", "strict", b"\\u732b \\xe9 \\udce9\n"),
        ("utf-8", "strict", "猫 é \\udce9\n".encode()),
        ("utf-8", "surrogateescape", b"\xe7\x8c\xab \xc3\xa9 \xe9\n"),  # of the C locale: what the name is on disk
    ],
)
def test_what_a_terminal_does_not_have_is_escaped(encoding, errors, printed, monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding, errors, newline="\n", write_through=True))
    Command("names", "names").run(lambda: print("猫 é \udce9"), [])
    assert terminal.getvalue() == printed


def test_search_among_names_that_cannot_be_printed(photos, loaded, monkeypatch, capsys):
    run, terminal = photos.parent / "run", io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, "cp1252", newline="\n", write_through=True))
    assert command("embed", [run, photos], capsys) == (0, [])
    given = [run, photos / NAMES[4], "--k", 5, "--out", run / os.fsdecode(b"\xe9.png")]
    assert command("search", given, capsys) == (0, [])
    lines = terminal.getvalue().decode("cp1252").splitlines()
    assert lines[0].startswith("5 images, 6 dimensions each: ")
    assert lines[2].split() == ["1", "1.0000", r"sub/\udce9t\udce9.png"]
    assert sorted(line.split()[2] for line in lines[3:7]) == ["a.png", "b.png", r"sub/\u732b.png", "sub/c.png"]
    assert lines[7].startswith("picture: ") and lines[7].endswith(r"\udce9.png")
    assert given[-1].read_bytes().startswith(b"\x89PNG")


def listed(names):
    return "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")


def test_an_index_keeps_all_names(tmp_path):
    names = [*NAMES, "a\rb.png", " c.png ", "d\u2028e.png"]
    rows = np.eye(8, dtype=np.float32)
    write_index(tmp_path / "index", rows, names, {"folder": "/p", "weights": "1"})
    embeddings, paths, origin = read_index(tmp_path / "index")
    assert paths == names
    assert embeddings.tolist() == rows.tolist()
    assert origin == {"folder": "/p", "weights": "1", "images": 8, "content": content_of(rows, listed(names))}


def test_images_that_have_changed_since_are_named(photos, loaded, capsys):
    run, made = photos.parent / "run", photos.parent / "run" / "index" / "index.json"
    assert command("embed", [run, photos], capsys) == (0, [])
    newer = made.stat().st_mtime + 1
    os.utime(photos / "a.png", (newer, newer))
    main(["search", str(run), str(photos / "b.png"), "--k", "5"])
    told = f'1 of 5 images have changed since the index was made, run "pml-ext embed" again: {photos / "a.png"}'
    assert capsys.readouterr().err == f"warning: {told}\n"
    os.utime(photos / "a.png", (newer - 2, newer - 2))
    main(["search", str(run), str(photos / "b.png"), "--k", "5"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["a\nb.png", "a\rb.png"])
def test_names_that_an_index_cannot_keep(name, photos, loaded):
    shutil.copy(photos / "a.png", photos / name)
    with pytest.raises(ValueError, match=r"IMAGES must have no line break in a name, got '.*/a\\[nr]b\.png'"):
        indexed(photos)
    assert not (photos.parent / "run" / "index").exists()


def test_equal_similarities_come_by_index():
    query = torch.nn.functional.normalize(torch.randn(1, 33, generator=torch.Generator().manual_seed(0)))
    near, far = query.clone(), torch.nn.functional.normalize(query + 0.1)
    embeddings = torch.cat([far.expand(5000, -1), near.expand(3, -1), far.expand(2000, -1)])
    similarities, rows = zip(*search.nearest(embeddings, query, 2010), strict=True)
    assert rows == (5000, 5001, 5002, *range(2007))
    assert similarities[0] == pytest.approx(1, abs=1e-6)
    assert similarities[3] == pytest.approx(float(far.double()[0] @ query.double()[0]), abs=1e-6)
    assert len(search.nearest(near, query, 3)) == 1


def test_images_that_are_gone_leave_an_empty_place(photos, loaded, monkeypatch, capsys):
    print_any_name()
    index = indexed(photos)
    before = [result["path"] for result in search.main(index.parent, photos / "a.png", k=5)["results"]]
    (photos / "b.png").unlink()
    (photos / "sub" / "c.png").write_text("no image")
    os.utime(photos / "sub" / "c.png", (0, 0))  # not newer than the index
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    capsys.readouterr()
    again = search.main(index.parent, photos / "a.png", k=5)["results"]
    assert [result["path"] for result in again] == before
    printed = capsys.readouterr()
    gone = [photos / path for path in before if path in ("b.png", "sub/c.png")]
    lacks = 'the picture lacks 2 of 5 images that cannot be read, "pml-ext embed" makes a new index'
    assert printed.err == f"warning: {lacks}: {gone[0]}, {gone[1]}\n"
    assert printed.out.splitlines()[-1] == f"picture: {index.parent / 'search.png'}"
    shown = {re.split("[:\n]", axis.get_title())[0]: bool(axis.images) for axis in drawn[0].axes}
    assert shown == {"query": True} | {str(rank): photos / path not in gone for rank, path in enumerate(before, 1)}
    assert [text.get_text() for axis in drawn[0].axes for text in axis.texts] == ["cannot be read"] * 2


def damaged(file, content):
    return lambda index: (index / file).write_bytes(content)


def of_array(*args, **kwargs):
    buffer = io.BytesIO()
    np.save(buffer, np.array(*args, **kwargs))
    return damaged("embeddings.npy", buffer.getvalue())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged("index.json", b"{"), "error: cannot read {index}/index.json: it is no JSON: "),
        (damaged("index.json", b"\xff"), "error: cannot read {index}/index.json: it is no JSON: "),
        (damaged("index.json", b"[1]"), "error: {index}/index.json must have a text 'folder', got None: run "),
        (damaged("index.json", b'{"folder": "/"}'), "/index.json must have a text 'weights', got None: run "),
        (damaged("index.json", b'{"folder": 3, "weights": "1a2b"}'), "must have a text 'folder', got 3: run "),
        (damaged("index.json", b'{"folder": "/", "weights": "0"}'), "error: --index must be made with the network of"),
        (
            lambda index: (index / "index.json").unlink(),
            'error: --index must be made by "pml-ext embed", got {index}',
        ),
        (lambda index: (index / "embeddings.npy").unlink(), "got {index} without embeddings.npy"),
        (damaged("embeddings.npy", b""), "error: cannot read {index}/embeddings.npy: it is no array of NumPy"),
        (damaged("embeddings.npy", b"text"), "error: cannot read {index}/embeddings.npy: it is no array of NumPy"),
        (damaged("embeddings.npy", b"\x93NUMPY\x01\0"), "error: cannot read {index}/embeddings.npy: it is no array"),
        (of_array(np.eye(5, 6), dtype=object), "error: cannot read {index}/embeddings.npy: it is no array of NumPy"),
        (of_array(np.eye(5, 6), dtype=int), "{index}/embeddings.npy must be a tensor or an array with a floating"),
        (of_array(np.full((5, 6), np.nan)), "error: {index}/embeddings.npy must be finite, got nan in row 0; 5 of 5"),
        (of_array(np.zeros((0, 6))), "error: {index}/embeddings.npy must have at least one row and one column, got"),
        (of_array(np.eye(5, 4)), "error: {index}/embeddings.npy must have 6 columns, as the network of RUN, got 4"),
        (
            damaged("paths.txt", b"a.png\nb.png\n"),
            "error: {index}/paths.txt must have 5 lines, one for each row, got 2",
        ),
    ],
)
def test_a_damaged_index(damage, message, photos, loaded, monkeypatch, capsys):
    index = indexed(photos)
    about = json.loads((index / "index.json").read_text())
    del about["content"]  # of a former version, which notices less
    (index / "index.json").write_text(json.dumps(about))
    damage(index)
    capsys.readouterr()
    status, lines = command("search", [index.parent, photos / "a.png"], capsys)
    assert (status, len(lines)) == (2, 1)
    assert message.format(index=index) in lines[0]
    assert not (index.parent / "search.png").exists()


class Broken(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output(len(images))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            lambda n: torch.full((n, 6), torch.nan),
            "return finite embeddings, got nan in row 0; {n} of the first {n} row",
        ),
        (
            lambda n: torch.full((n, 6), torch.inf),
            "return finite embeddings, got inf in row 0; {n} of the first {n} row",
        ),
        (lambda n: (torch.ones(n, 6), None), "return one tensor, got tuple"),
        (lambda n: torch.ones(n, 6, 2, 2), "return a row for each image, shape ({n}, D), got ({n}, 6, 2, 2): pool or"),
    ],
)
def test_a_network_that_fails(output, message, photos, loaded, monkeypatch, capsys):
    run = photos.parent / "run"
    working = loaded.recipe.trunk
    given = {"embed": [run, photos], "search": [run, photos / "a.png"]}
    for before in ("nothing", "an index"):
        if before == "an index":
            loaded.recipe.trunk = working
            indexed(photos)
            capsys.readouterr()
        kept = contents(run / "index") if (run / "index").exists() else None
        loaded.recipe.trunk = Broken(output)
        status, lines = command("embed", given["embed"], capsys)
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith(f"pml-ext embed: error: the network of RUN must {message.format(n=5)}")
        assert (contents(run / "index") if (run / "index").exists() else None) == kept
    status, lines = command("search", given["search"], capsys)
    assert (status, len(lines)) == (2, 1)
    assert lines[0].startswith(f"pml-ext search: error: the network of RUN must {message.format(n=1)}")
    assert not (run / "search.png").exists()


LARGE = {  # number of rows, path of each, folder
    "embeddings.npy": (9000, "a", "f"),
    "index.faiss": (900, "a", "f"),
    "paths.txt": (9, 400 * "a", "f"),
    "index.json": (9, "a", 4000 * "f"),
}


@pytest.mark.parametrize("file", INDEX)
@pytest.mark.parametrize("before", ["nothing", "an index"])
def test_a_full_disk(file, before, tmp_path, monkeypatch):
    """Files may have 3 kB here, and those before this one have less."""
    rows, path, folder = LARGE[file]
    out, embeddings = tmp_path / "index", np.ones((rows, 1), dtype=np.float32)
    if before == "an index":
        write_index(out, embeddings[:2], ["old"] * 2, {"folder": "old", "weights": "0"})
    kept = contents(out) if before == "an index" else {}
    if file == "index.faiss":  # as large as the array, which is written before
        monkeypatch.setattr(np, "save", lambda *args: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^cannot write {out}: File too large$"):
            write_index(out, embeddings, [path] * rows, {"folder": folder, "weights": "1"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(out) == kept


@pytest.mark.parametrize("moved", range(4))
@pytest.mark.parametrize("before", ["nothing", "an index"])
def test_killed_while_an_index_is_moved(moved, before, tmp_path, monkeypatch):
    """Whatever lies there then is no index: above all no mixture of two."""
    out = tmp_path / "index"
    if before == "an index":
        write_index(out, np.zeros((2, 3), dtype=np.float32), ["old"] * 2, {"folder": "old", "weights": "1"})
    replace, moves = os.replace, []

    def killed(source, target):
        if len(moves) == moved:
            raise KeyboardInterrupt
        moves.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_index(out, np.ones((2, 3), dtype=np.float32), ["new"] * 2, {"folder": "new", "weights": "1"})
    with pytest.raises(FileNotFoundError, match="--index must be made by "):
        read_index(out)
    assert set(contents(out)) == (set(INDEX) - {"index.json"} if before == "an index" else set(moves))


def test_what_a_killed_process_left_is_cleared_away(photos, loaded):
    index = indexed(photos)
    (index / ".new-killed").mkdir()
    (index / ".new-killed" / "embeddings.npy").write_bytes(b"a part")
    indexed(photos)
    assert sorted(contents(index)) == INDEX


def test_two_processes_do_not_write_one_index(photos, loaded):
    index = indexed(photos)
    message = f"an index's folder must be free, got {index}, which another process writes"
    with RunLock(index), ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=message):
        pool.submit(indexed, photos).result()
    assert sorted(contents(index)) == INDEX


@pytest.mark.parametrize("file", ["embeddings.npy", "paths.txt"])
def test_flipped_bits_of_an_index(file, photos, loaded):
    """Such as change values and names, and not how many there are."""
    index = indexed(photos)
    content = (index / file).read_bytes()
    for place in (len(content) - 3, len(content) - 20):
        (index / file).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"embeddings.npy and paths.txt must be as they were written"):
            read_index(index)
    (index / file).write_bytes(content)
    read_index(index)
    about = json.loads((index / "index.json").read_text())
    del about["content"]  # of a former version
    (index / "index.json").write_text(json.dumps(about))
    np.save(index / "embeddings.npy", np.load(index / "embeddings.npy").astype(float))
    assert search.main(photos.parent / "run", photos / "a.png", k=1)["results"][0]["path"] == "a.png"


def test_an_index_for_other_programs(photos, loaded):
    import faiss

    index = indexed(photos)
    assert sorted(contents(index)) == INDEX
    rows = np.load(index / "embeddings.npy")
    others = faiss.read_index(str(index / "index.faiss"))
    assert others.ntotal == 5
    np.testing.assert_array_equal(others.reconstruct_n(0, 5), rows)
    assert others.metric_type == faiss.METRIC_INNER_PRODUCT
    assert json.loads((index / "index.json").read_text()) == {
        "folder": str(photos),
        "weights": "1a2b",
        "images": 5,
        "content": content_of(rows, (index / "paths.txt").read_bytes()),
    }


def test_the_name_of_the_picture(photos, loaded, capsys):
    run = indexed(photos).parent
    search.main(run, photos / "a.png", k=1, out=run / "picture")
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {run / 'picture.png'}"
    assert (run / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written(photos, loaded):
    file = photos.parent / "out"
    file.write_text("mine")
    with pytest.raises(OSError, match=f"cannot write {file / 'index'}: Not a directory"):
        embed.main(photos.parent / "run", photos, out=file / "index")
    with pytest.raises(OSError, match=f"cannot write {file / 'a.png'}: File exists"):
        search.draw(photos / "a.png", [], file / "a.png", ImageReader())
    assert file.read_text() == "mine"
