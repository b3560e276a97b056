import re
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from pml_ext.datasets import ImageArrays
from pml_ext.visualization import retrieval_report
from pml_ext.visualization.thumbnails import encode_thumbnails, load_thumbnails
from tests.visualization.report_pages import EVIL, Page, clusters

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


def use_chunks(monkeypatch):
    monkeypatch.setattr("pml_ext.neighbors.search._DISTANCES_AT_ONCE", 25 * 312)
    monkeypatch.setattr("pml_ext.neighbors.search._TILE", 64)
    monkeypatch.setattr("pml_ext.neighbors.similarity._CHUNK_ELEMENTS", 2000)


@pytest.mark.parametrize("chunked", [False, True])
def test_metrics_are_those_of_pml(report, monkeypatch, chunked):
    embeddings, labels = clusters()
    embeddings[40:110] = embeddings[40]  # ties, also across classes, and more of them than neighbors
    labels = torch.cat([3 * labels + 5, torch.tensor([1000, 2000])])  # two classes without a match
    embeddings = torch.cat([embeddings, torch.randn(2, 16)])
    if chunked:
        use_chunks(monkeypatch)
    page = report(embeddings, labels, num_neighbors=3)
    unit = torch.nn.functional.normalize(embeddings)
    kwargs = {"include": METRICS, "k": "max_bin_count", "device": torch.device("cpu")}
    expected = AccuracyCalculator(**kwargs).get_accuracy(unit, labels)
    assert page.metrics == pytest.approx([expected[name] for name in METRICS], abs=1e-9)
    assert 0.2 < page.metrics[2] < 0.8
    each = AccuracyCalculator(return_per_class=True, **kwargs).get_accuracy(unit, labels)
    rows = sorted(page.data["classes"], key=lambda row: int(row[0].split()[1]))
    assert len(rows) == 12
    assert sorted(row[-1] for row in rows) == [row[-1] for row in page.data["classes"]]
    for i, row in enumerate(rows):
        assert row[2:] == pytest.approx([each[name][i] for name in METRICS], abs=1e-9)
    assert "2 classes with one image each" in page.text
    assert "<li>class 1000</li><li>class 2000</li>" in page.text


ANGLES = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0, 3.0], dtype=torch.float64)
TOY = torch.stack([ANGLES.cos(), ANGLES.sin()], 1) * torch.arange(1, 7)[:, None]  # lengths do not matter
TOY_LABELS = torch.tensor([4, 7, 4, 7, 4, 9])


def test_by_hand(report):
    page = report(TOY, TOY_LABELS, class_names={4: "cat", 7: "dog", 9: "eel"}, num_queries=2)
    # Neighbors, R = 2 for cats (0, 2, 4), 1 for dogs (1, 3):
    # 0: 1 2 | 3 4, AP (0 + 1/2) / 2. 2: 1 0 (0.2 before 0.3), AP 1/4. 4: 3 2, AP 1/4. 1: 0. 3: 2
    assert page.data["classes"] == [["dog", 2, 0, 0, 0], ["cat", 3, 0, 0.5, 0.25]]
    assert page.metrics == pytest.approx([0, 0.3, 0.15])
    assert [row[:3] for row in page.tables["class-table"][1:]] == [["dog", "2", "0.0%"], ["cat", "3", "0.0%"]]
    assert "the class <strong>eel</strong>, which has one image" in page.text
    pairs = [row[:5] for row in page.tables["pair-table"][1:]]
    assert pairs == [["dog", "cat", "2", "100.0%", "100.0%"], ["cat", "dog", "3", "100.0%", "50.0%"]]
    queries = re.findall(r"<h4><span.*?>(.*?)</span> <small>image (\d), AP@R (.*?)</small>", page.text)
    assert queries[:2] == [("dog", "1", "0.0%"), ("dog", "3", "0.0%")]  # 1 is the more certain one
    assert len(queries) == 4 and len({query[1] for query in queries}) == 4
    kinds = re.findall(r'<figure class="tile (right|wrong|asked)">.*?aria-label="(.*?)"', page.text)
    assert kinds[:4] == [
        ("asked", "Query, image 1, class dog"),
        ("wrong", "wrong: image 0, class cat"),
        ("wrong", "wrong: image 2, class cat"),
        ("right", "right: image 3, class dog"),
    ]
    similarities = re.findall(r"</span> (-?\d\.\d\d)<span", page.text)
    assert similarities[:5] == [f"{np.cos(x):.2f}" for x in (0.1, 0.2, 0.5, 0.9, 2.9)]


def test_a_gallery_by_hand(report):
    """Queries at 0, 0.25 and 2 radians; in the gallery images at 0.1, 0.3, 0.35, 2.1 and 1.9, the last of no query."""
    at = lambda angles: torch.stack([torch.tensor(angles).cos(), torch.tensor(angles).sin()], 1)  # noqa: E731
    queries, gallery = at([0.0, 0.25, 2.0]), at([0.1, 0.3, 0.35, 2.2, 1.9])
    pictures = {"images": torch.rand(3, 3, 4, 4), "gallery_images": torch.rand(5, 3, 4, 4)}
    page = report(
        queries, ["cat", "dog", "eel"], gallery=gallery, gallery_labels=["cat", "dog", "cat", "eel", "fox"], **pictures,
        num_points=9, num_neighbors=3,
    )  # fmt: skip
    # cat: R = 2, finds cat, dog. dog: R = 1, finds dog. eel: R = 1, finds fox (0.1 away), not eel (0.2).
    assert page.data["classes"] == [["eel", 1, 0, 0, 0], ["cat", 1, 1, 0.5, 0.5], ["dog", 1, 1, 1, 1]]
    assert page.metrics == pytest.approx([2 / 3, 0.5, 0.5])
    assert "3 images of 3 classes" in page.text and "searched in a gallery of 5 other images" in page.text
    pairs = [row[:5] for row in page.tables["pair-table"][1:]]
    assert pairs == [["eel", "fox", "1", "100.0%", "100.0%"], ["cat", "dog", "1", "0.0%", "50.0%"]]
    assert 'alt="wrong: gallery image 4, class fox"' in page.text and 'alt="Query, image 2, class eel"' in page.text
    assert len(page.data["points"]) == 3
    assert len([img for img in page.all("img") if img.get("src")]) == 3 * 4


def test_labels_of_any_kind(report):
    page = report(TOY, [True, False, True, False, True, False])
    assert {row[0] for row in page.data["classes"]} == {"class True", "class False"}
    for labels in (TOY_LABELS + 2**40, TOY_LABELS.numpy().astype(np.uint64)):
        assert report(TOY, labels).metrics == pytest.approx([0, 0.3, 0.15])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gallery": TOY}, "gallery_labels must come with gallery, got gallery alone"),
        ({"gallery_labels": TOY_LABELS}, "gallery must come with gallery_labels"),
        ({"gallery": TOY[:, :1], "gallery_labels": TOY_LABELS}, r"gallery must have shape \(N, 2\), got \(6, 1\)"),
        (
            {"gallery": TOY, "gallery_labels": TOY_LABELS, "images": torch.rand(6, 4, 4)},
            "gallery_images must come with",
        ),
    ],
)
def test_bad_galleries(report, kwargs, message):
    with pytest.raises(ValueError, match=message):
        report(TOY, TOY_LABELS, **kwargs)


@pytest.mark.parametrize("chunked", [False, True])
def test_confused_pairs_and_similarities(report, monkeypatch, chunked):
    if chunked:
        use_chunks(monkeypatch)
    embeddings, labels = clusters(80, 5, spread=2.0)
    page = report(embeddings, labels, num_pairs=99)
    unit, y = torch.nn.functional.normalize(embeddings).double().numpy(), labels.numpy()
    cosine = unit @ unit.T
    order = np.argsort(-(cosine - 9 * np.eye(80)), axis=1)
    expected = {}
    for a in range(5):
        for b in set(range(5)) - {a}:
            rows = y[order[y == a]]
            size = len(rows)
            share = (rows[:, : size - 1] == b).mean()
            if share:
                expected[f"class {a}", f"class {b}"] = [f"{100 * x:.1f}%" for x in ((rows[:, 0] == b).mean(), share)]
    rows = page.tables["pair-table"][1:]
    assert {(row[0], row[1]): row[3:] for row in rows} == expected
    shares = [float(row[4][:-1]) for row in rows]
    assert shares == sorted(shares, reverse=True) and len(shares) > 5
    same = (y[:, None] == y) & ~np.eye(80, dtype=bool)
    positive, negative = cosine[same], cosine[y[:, None] != y]
    assert f"On average {positive.mean():.2f} for pairs of one class and {negative.mean():.2f} for" in page.text
    auc = float(re.search(r"more similar one in ([\d.]+)% of", page.text)[1])
    assert auc == pytest.approx(100 * (positive[:, None] > negative).mean(), abs=0.15)
    for column, values in ((1, positive), (2, negative)):
        bins = [(*map(float, row[0].split(" to ")), float(row[column][:-1])) for row in page.tables[None][1:]]
        assert sum(share for *_, share in bins) == pytest.approx(100, abs=2)
        for low, high, share in bins:
            inside = 100 * ((values >= low) & (values < high)).mean()
            assert share == pytest.approx(inside, abs=0.1)


def test_random_queries_and_ties_without_errors(report):
    page = report(torch.ones(6, 4), [0, 0, 0, 1, 1, 1])  # equal rows: similarity 1, a map of one point
    assert "more similar one in 50.0%" in page.text
    assert len(report(torch.ones(6, 4), [0, 0, 0, 1, 1, 1], num_points=9).data["points"]) == 6
    page = report(torch.randn(9, 4), [3] * 9)
    assert page.metrics == (1, 1, 1)
    assert "there are no pairs of different classes" in page.text and "None: no image" in page.text


@pytest.mark.parametrize(("length", "dim"), [(2, 1), (2, 5), (3, 2), (5, 1), (40, 3)])
def test_map_of_any_size(report, length, dim):
    page = report(torch.randn(length, dim), [0] * length, num_points=30)
    assert len(page.data["points"]) == min(length, 30)
    assert ("drawn at random" in page.text) == (length > 30)
    places = [tuple(map(float, p)) for p in re.findall(r"translate:([\d.]+)px ([\d.]+)px", page.text)]
    assert len(places) == min(length, 30) and len(set(places)) > 1
    assert all(0 <= x <= 640 and 0 <= y <= 640 for x, y in places)


def test_map_keeps_classes_together(report):
    embeddings, labels = clusters(200, 4, spread=0.1)
    page = report(embeddings, labels, num_points=150, class_names=list("abcd"))
    places = np.array([tuple(map(float, p)) for p in re.findall(r"translate:([\d.]+)px ([\d.]+)px", page.text)][:150])
    group = np.array([point[0] for point in page.data["points"]])
    image = [point[1] for point in page.data["points"]]
    assert [page.data["names"][g] for g in group] == ["abcd"[labels[i]] for i in image]
    distance = ((places[:, None] - places) ** 2).sum(-1) + 1e9 * np.eye(150)
    assert (group[distance.argmin(1)] == group).mean() > 0.95


def test_umap(report, monkeypatch):
    called = {}

    class UMAP:
        def __init__(self, **kwargs):
            called.update(kwargs)

        def fit_transform(self, x):
            return x[:, :2]

    embeddings, labels = clusters(40, 3)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    assert "placed by UMAP" in report(embeddings, labels, num_points=40, method="umap", seed=3).text
    assert called["random_state"] == 3 and called["n_neighbors"] == 15
    assert "placed by t-SNE" in report(embeddings, labels, num_points=4, method="umap").text
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"umap-learn: pip install 'pml-ext\[umap\]', or use method='tsne'"):
        report(embeddings, labels, num_points=40, method="umap")


def test_names_cannot_run(report):
    embeddings, labels = clusters(60, 4)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8)
    files = [f"{EVIL[i % 4]}/{EVIL[(i + 1) % 4]}" for i in range(60)]
    page = report(embeddings, labels, images, EVIL, title=EVIL[1], names=files, num_points=60)
    assert len(page.all("script")) == 2 and not page.all("b", id="bold")
    assert not set("<>&") & set(re.search(r'id="data">(.*)</script>\n<script>', page.text)[1])
    assert all(img["src"].startswith("data:image/webp;base64,") for img in page.all("img") if "src" in img)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert {row[0] for row in page.tables["class-table"][1:]} == set(EVIL) == set(page.data["names"])
    assert any(f"class {EVIL[2]}, " in img.get("alt", "") for img in page.all("img"))
    assert set(page.data["files"].values()) == set(files)
    for alone in (1, 2):
        left_out = report(embeddings, [9] * (60 - alone) + list(range(alone)), class_names=EVIL * 3)
        assert len(left_out.all("script")) == 2 and not left_out.all("img") and "Left out" in left_out.text
    assert "http" not in re.sub(r"http-equiv", "", page.text).replace("data:", "")


def test_names_of_images(report, tmp_path):
    """In the rows of queries, on the map, and in what classes lead to."""
    paths = [tmp_path / folder / f"{i}.png" for i, folder in enumerate(["cat", "dog", "cat", "dog", "cat", "eel"])]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    names = {4: "cat", 7: "dog", 9: "eel"}
    page = report(TOY, TOY_LABELS, paths, names, num_points=9, num_queries=1)
    assert "</span> <small>image 1, dog/<wbr>1.png, AP@R 0.0%</small></h4>" in page.text
    assert {"alt", "title"} <= {key for img in page.all("img") for key in img}
    assert all(img["title"] == img["alt"] for img in page.all("img") if "src" in img)
    assert page.all("img", title="wrong: image 0, class cat, cat/0.png")
    assert '<span class="name">cat</span><span class="file">0.png</span>' in page.text
    assert page.data["files"] == {str(i): f"{path.parent.name}/{path.name}" for i, path in enumerate(paths)}
    assert report(TOY, TOY_LABELS, paths, names, num_points=9, num_queries=1, names=list("abcdef")).data["files"] == (
        dict(zip("012345", "abcdef", strict=True))
    )
    assert report(TOY, TOY_LABELS, names=list("abcdef")).all("div", title="wrong: image 0, class class 4, a")
    assert 'class="file"' not in report(TOY, TOY_LABELS).text
    with pytest.raises(ValueError, match="gallery must come with gallery_names, got gallery_names alone"):
        report(TOY, TOY_LABELS, gallery_names=list("abcdef"))


def test_what_a_class_leads_to(report):
    """By hand, as above: cats (0, 2, 4) are taken for dogs (1, 3), and all dogs for cats."""
    page = report(TOY, TOY_LABELS, class_names={4: "cat", 7: "dog", 9: "eel"})
    angles = ANGLES.tolist()
    near = lambda query, others: [  # noqa: E731
        [i, round(float(np.cos(angles[i] - angles[query])), 4), int(TOY_LABELS[i] == TOY_LABELS[query])] for i in others
    ]
    assert page.data["codes"] == {"0": "cat", "1": "dog", "2": "eel"}
    assert page.data["details"] == {
        "1": [2, [0, 0, 0], None, [[0, 1, 1]], [[1, 0, near(1, [0, 2, 3, 4, 5])], [3, 0, near(3, [2, 4, 1, 0, 5])]]],
        "0": [3, [0, 0.5, 0.25], None, [[1, 0.5, 1]], [[0, 0.25, near(0, [1, 2, 3, 4, 5])],
                                                       [2, 0.25, near(2, [1, 0, 3, 4, 5])]]],
    }  # fmt: skip
    assert page.data["shown"]["3"] == [3, 1] and set(page.data["shown"]) == set("012345")
    linked = [attrs["data-class"] for attrs in page.all("span") if "data-class" in attrs]
    assert linked[:2] == ["1", "0"] and set(linked) == {"0", "1"}


def test_pictures_of_the_worst_classes(report, monkeypatch):
    monkeypatch.setattr("pml_ext.visualization.report_choice._CLASSES_WITH_PICTURES", 2)
    labels = torch.arange(60) // 2
    page = report(torch.randn(60, 4), labels, torch.rand(60, 4, 4), num_queries=1, num_neighbors=2)
    rows = list(page.data["details"].values())
    assert len(rows) == 30
    shown = [{query[0], *(near[0] for near in query[2])} for row in rows[:2] for query in row[4]]
    assert len(shown) == 4 and set(map(int, page.data["pictures"])) == set.union(*shown)


def test_surrogates_and_strange_names_are_written(report):
    assert "?" in report(TOY, TOY_LABELS, class_names={4: "\udc80", 7: "", 9: "\x00"}).text


def test_structure(report):
    embeddings, labels = clusters(60, 10)
    page = report(embeddings, labels, torch.rand(60, 1, 8, 8), num_points=60)
    assert page.all("html", lang="en") and page.all("title") and page.all("main") and page.all("nav")
    assert page.all("meta", name="viewport")
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    assert [th.get("aria-sort") for th in page.all("th", scope="col")][:5] == [*["none"] * 4, "ascending"]
    assert len(page.all("button")) == 2 * 5 + 1
    assert len(page.all("caption")) == len(page.all("table")) == 3
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.tags:  # what is referred to is there
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert attrs.get(name, "main") in ids
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids
    assert all("alt" in img for img in page.all("img"))
    assert not [attrs for _, attrs in page.tags if attrs.get("src", "data:")[:5] != "data:"]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def test_deterministic(report, tmp_path):
    embeddings, labels = clusters(60, 6)
    images = torch.rand(60, 3, 9, 9)
    one, two, other = (
        report(embeddings, labels, images, num_points=50, seed=seed, path=tmp_path / name).text
        for seed, name in ((0, "a.html"), (0, "b.html"), (1, "c.html"))
    )
    assert one == two != other
    with torch.autocast("cpu", torch.bfloat16):
        assert report(embeddings.numpy(), labels.numpy(), images, num_points=50).text == one


def images_of_kind(kind, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (30, 20, 12, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x) for x in array]
    if kind == "paths":
        for i, picture in enumerate(pictures):
            picture.save(tmp_path / f"{i}.png")
        return [tmp_path / f"{i}.png" for i in range(30)]
    chw = torch.from_numpy(array).permute(0, 3, 1, 2)
    return {
        "uint8": chw,
        "float": chw / 255,
        "bfloat16": (chw / 255).bfloat16(),
        "gray": chw[:, :1],
        "flat": chw[:, 0],
        "pil": pictures,
        "pil_gray": [p.convert("L") for p in pictures],
        "pil_16_bit": [Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) << 8) for p in pictures],
        "arrays": list(array),
        "array": array,
        "tensors": list(chw),
        "pairs": [(p, 0) for p in pictures],
        "data_set": ImageArrays(array, [0] * 30),
    }[kind]


KINDS = [
    "uint8",
    "float",
    "bfloat16",
    "gray",
    "flat",
    "pil",
    "pil_gray",
    "pil_16_bit",
    "arrays",
    "array",
    "tensors",
    "pairs",
    "data_set",
    "paths",
]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind, tmp_path, report):
    images = images_of_kind(kind, tmp_path)
    page = report(torch.randn(30, 4), torch.arange(30) % 3, images, num_points=9, num_queries=2, num_neighbors=3)
    assert len([img for img in page.all("img") if "src" in img]) == 2 * 2 * 4  # queries and neighbors
    assert all(page.data["pictures"][str(i)].startswith("data:image/webp;base64,") for _, i in page.data["points"])
    (picture,) = load_thumbnails(images, [7]).values()
    expected = Image.fromarray(images_of_kind("array", tmp_path)[7])
    if kind in ("gray", "flat"):
        expected = expected.getchannel(0)
    elif kind in ("pil_gray", "pil_16_bit"):
        expected = expected.convert("L")
    error = np.abs(np.asarray(picture).astype(int) - np.asarray(expected.convert("RGB")))
    assert picture.size == (12, 20) and error.max() <= (2 if kind == "bfloat16" else 0)


def test_reads_what_is_shown_and_leaves_it(report):
    big = Image.new("RGB", (300, 200), "red")

    read = []

    class Lazy:
        def __len__(self):
            return 500

        def __getitem__(self, index):
            read.append(index)
            return big, 0

    page = report(torch.randn(500, 4), torch.arange(500) % 9, Lazy(), num_points=20, num_queries=2, num_neighbors=3)
    assert len(read) == len(set(read)) <= 2 * 2 * 4 + 20 + 9 * 2 * 4
    assert big.size == (300, 200) and page.data["points"]


def test_thumbnails_fit():
    noise = torch.randint(256, (40, 3, 96, 96), dtype=torch.uint8)
    loaded = load_thumbnails(noise, range(40))
    lengths = []
    for max_bytes in (10**9, 200_000, 60_000, 1):
        addresses = encode_thumbnails(loaded, [*range(40), 0], max_bytes, max_side=96)
        lengths.append(sum(map(len, addresses.values())) + len(addresses[0]))
        assert len(addresses) == 40 and (lengths[-1] <= max_bytes or max_bytes == 1)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[1]


@pytest.mark.slow
def test_size_and_time_of_10000(tmp_path):
    labels = torch.arange(10_000) % 500
    embeddings = torch.randn(500, 512)[labels] + 2 * torch.randn(10_000, 512)
    images = torch.randint(256, (10_000, 3, 64, 64), dtype=torch.uint8)  # nothing compresses worse
    start = time.process_time()
    path = retrieval_report(embeddings, labels, images, path=tmp_path / "report.html", num_points=2000)
    assert time.process_time() - start < 60  # t-SNE of 2,000 points included
    assert 1e6 < path.stat().st_size < 10e6
    assert len(Page(path).data["points"]) == 2000
    assert "2,000 of 10,000 images, drawn at random" in path.read_text(encoding="utf-8")


def test_many_classes_and_left_out_names_are_cut(report):
    labels = torch.cat([torch.arange(2100).repeat_interleave(2), torch.arange(3000, 3300)])
    page = report(torch.randn(4500, 8), labels)
    assert "The 2,000 worst of 2,100 classes" in page.text
    assert len(page.tables["class-table"]) == 2001
    assert "300 classes with one image each" in page.text and "and 100 more" in page.text


def test_bad_arguments(report, tmp_path):
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\), one for each row, got \(5,\)"):
        report(TOY, TOY_LABELS[:5])
    with pytest.raises(ValueError, match="images must have one entry for each of 6 embeddings, got 5"):
        report(TOY, TOY_LABELS, torch.rand(5, 3, 4, 4))
    with pytest.raises(ValueError, match="labels must have a match for one image at least, got none"):
        report(TOY, range(6))
    with pytest.raises(ValueError, match="embeddings must have at least one row"):
        report(torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    bad = TOY.clone()
    bad[2, 1] = torch.nan
    with pytest.raises(ValueError, match="embeddings must be finite, got nan in row 2; 1 of 6 rows: 2"):
        report(bad, TOY_LABELS)
    with pytest.raises(ValueError, match=r"embeddings must have shape .*, got \(12,\)"):
        report(TOY.flatten(), TOY_LABELS)
    for wrong, got in ((TOY.int(), "torch.int32"), (TOY.int().numpy(), "int32"), (TOY.tolist(), "list")):
        with pytest.raises(TypeError, match=f"embeddings must .*, got {got}"):
            report(wrong, TOY_LABELS)
    with pytest.raises(TypeError, match=r"labels must be integers, strings or bools, got torch\.float32"):
        report(TOY, TOY_LABELS.float())
    with pytest.raises(TypeError, match="title must be a string, got 5"):
        report(TOY, TOY_LABELS, title=5)
    with pytest.raises(ValueError, match="path must be a file, got the folder"):
        report(TOY, TOY_LABELS, path=tmp_path)
    for name in ("num_queries", "num_neighbors", "num_pairs", "num_points"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got -1"):
            report(TOY, TOY_LABELS, **{name: -1})
    with pytest.raises(ValueError, match="method must be 'tsne' or 'umap', got 'pca'"):
        report(TOY, TOY_LABELS, num_points=5, method="pca")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b"], ValueError, "class_names must have a name for each label, got 2 names, none for 4"),
        ({4: "a", 7: "b"}, ValueError, "got 2 names, none for 9"),
        ({4: "a", 7: 3, 9: "c"}, TypeError, "class_names must be strings, got 3"),
        ("abcdefghijkl", TypeError, "class_names must be a sequence or a dict of strings, got 'abc"),
        (7, TypeError, "class_names must be a sequence or a dict of strings, got 7"),
    ],
)
def test_bad_class_names(report, names, error, message):
    with pytest.raises(error, match=message):
        report(TOY, TOY_LABELS, class_names=names)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("folder", TypeError, "images must be a tensor, a sequence of .*, got str"),
        (iter([]), TypeError, "images must be a tensor, .*, got list_iterator"),
        (torch.zeros(6, 3, 4, 4, dtype=torch.long), TypeError, "uint8 or floats in 0 to 1, got torch.int64"),
        (torch.zeros(6, 4, 4, 3), ValueError, r"images must have shape .*, got \(6, 4, 4, 3\)"),
        (torch.zeros(6, 3, 4, 4) - 2, ValueError, r"images\[0\] must have floats in 0 to 1, got -2 to -2; normalized"),
        (torch.full((6, 4, 4), torch.nan), ValueError, r"images\[0\] must have floats in 0 to 1, got nan"),
        (
            [np.zeros((4, 4), dtype=np.int64)] * 6,
            TypeError,
            r"images\[0\] must be uint8 or floats in 0 to 1, got int64",
        ),
        ([np.zeros((4, 4, 2), dtype=np.uint8)] * 6, ValueError, r"images\[0\] must have 1 or 3 channels, got shape"),
        ([3] * 6, TypeError, r"images\[0\] must be an image, a path, .*, got int"),
        ([Image.new("F", (4, 4))] * 6, ValueError, r"images\[0\] must have values of a fixed range, got PIL mode 'F'"),
        (["no such file.png"] * 6, ValueError, "cannot read image no such file.png"),
    ],
)
def test_bad_images(report, images, error, message):
    with pytest.raises(error, match=message):
        report(TOY, TOY_LABELS, images)
