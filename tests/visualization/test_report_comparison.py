import re

import numpy as np
import pytest
import torch

from pml_ext.evaluation import retrieval_metrics
from pml_ext.visualization.report_comparison import MAX_ROWS
from pml_ext.visualization.report_html import signed_points
from tests.visualization.report_pages import EVIL, clusters

TITLES = {"title": "run A", "other_title": "run B"}


def at(angles, width=2):
    """Rows of length 1 at some angles, in radians."""
    angles = torch.tensor(angles)
    return torch.nn.functional.pad(torch.stack([angles.cos(), angles.sin()], 1), (0, width - 2))


LABELS = ["a", "a", "b", "b", "c", "c"]
A = at([0.0, 0.1, 1.0, 1.1, 2.0, 3.0])  # image 4 finds 3, of b; all others find their own class
B = at([0.0, 1.1, 2.0, 2.1, 3.0, 3.1], width=5)  # image 1 finds 2, of b


def queries_of(page, title):
    """The images of the queries that are better in a run, and the class of the nearest neighbor in each run."""
    part = page.text.split(f"Queries that are better in {title}")[1].split("<h3>")[0].split("</section>")[0]
    articles = part.split('<article class="query">')[1:]
    found = r'<h5>(.*?) <small>AP@R (.*?)</small></h5><ol class="tiles"><li>.*?class="name">(.*?)<'
    return [(int(re.search(r"<small>image (\d+)", article)[1]), *re.findall(found, article)) for article in articles]


def test_by_hand(report):
    page = report(A, LABELS, other=B, num_neighbors=3, **TITLES)
    assert "<title>run A against run B</title>" in page.text
    assert [row[:4] for row in page.tables["change-table"][1:]] == [
        ["c", "50.0%", "100.0%", "\u221250.0"],
        ["b", "100.0%", "100.0%", "+0.0"],
        ["a", "100.0%", "50.0%", "+50.0"],
    ]
    assert "1 query with a higher AP@R in <strong>run A</strong>, 1 in <strong>run B</strong>, and 4 with" in page.text
    assert "1 class with a higher MAP@R in <strong>run A</strong>, 1 in <strong>run B</strong>, and 1 with" in page.text
    assert queries_of(page, "run A") == [(1, ("run A", "100.0%", "a"), ("run B", "0.0%", "b"))]
    assert queries_of(page, "run B") == [(4, ("run A", "0.0%", "b"), ("run B", "100.0%", "c"))]
    assert page.data["details"]["2"][1:3] == [[0.5, 0.5, 0.5], [1, 1, 1]]  # of class c, in both
    assert page.data["titles"] == ["run A", "run B"]


def test_metrics_of_both(report):
    embeddings, labels = clusters(200, 10)
    other = clusters(200, 10, dim=5, spread=3.0)[0]
    page = report(embeddings, labels, other=other, **TITLES)
    assert page.metrics == report(embeddings, labels).metrics
    expected = [
        list(retrieval_metrics(torch.nn.functional.normalize(x), labels).values())[:3] for x in (embeddings, other)
    ]
    shown = [float(value) for value in re.findall(r'<data value="(.*?)"', page.text)]
    assert shown[0::3] == pytest.approx(expected[0])
    assert shown[1::3] == pytest.approx(expected[1])
    assert shown[2::3] == pytest.approx(np.subtract(*expected))
    assert all(abs(difference) > 0.1 for difference in shown[2::3])
    assert f'difference <data value="{shown[2]!r}">{100 * shown[2]:+.1f}</data> points' in page.text
    rows = [[float(x.rstrip("%").replace("\u2212", "-")) for x in row[1:]] for row in page.tables["change-table"][1:]]
    assert len(rows) == 10
    for value, of_other, difference in rows:
        assert difference == pytest.approx(value - of_other, abs=0.11)
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)


def test_the_largest_changes_come_first_and_ties_are_shuffled(report):
    labels = torch.arange(80) // 2
    good, bad = torch.eye(40)[labels], torch.randn(80, 8)
    page = report(good, labels, other=bad, num_queries=5, **TITLES)
    better = queries_of(page, "run A")
    assert len(better) == 5 and {query[1][1] for query in better} == {"100.0%"}
    assert [query[0] for query in better] != sorted(query[0] for query in better)
    assert queries_of(page, "run B") == []
    assert "Queries that are better in run B</h3><p>None.</p>" in page.text.replace("\n", "")
    swapped = report(bad, labels, other=good, num_queries=5, title="run B", other_title="run A")
    assert [query[0] for query in queries_of(swapped, "run A")] == [query[0] for query in better]
    assert report(good, labels, other=bad, num_queries=5, **TITLES).text == page.text
    assert report(good, labels, other=bad, num_queries=5, seed=1, **TITLES).text != page.text


def test_runs_that_do_not_differ(report):
    embeddings, labels = clusters(60, 5)
    page = report(embeddings, labels, other=3 * embeddings.double().numpy())
    assert "0 queries with a higher AP@R in <strong>this run</strong>, 0 in <strong>the other run</strong>" in page.text
    assert page.text.count("<p>None.</p>") == 2
    assert "this run against the other run" in page.text


def test_classes_without_a_match_are_in_neither(report):
    page = report(A, ["a", "a", "b", "b", "c", "d"], other=B, **TITLES)
    assert [row[0] for row in page.tables["change-table"][1:]] == ["b", "a"]
    assert "and 3 with the same in both" in page.text


def test_a_gallery_of_each_run(report):
    kwargs = {"gallery": at([0.1, 2.1]), "gallery_labels": ["a", "c"], "images": torch.rand(2, 3, 4, 4)}
    kwargs |= {"gallery_images": torch.rand(2, 3, 4, 4), "gallery_names": ["x/first.png", "x/second.png"]}
    page = report(at([0.0, 2.0]), ["a", "c"], other=at([0.0, 1.0], 3), other_gallery=at([0.1, 3.0], 3), **kwargs)
    assert [row[:3] for row in page.tables["change-table"][1:]] == [["a", "100.0%", "100.0%"], ["c", "100.0%", "0.0%"]]
    ((query, this, other),) = queries_of(page, "this run")
    assert (query, this[2], other[2]) == (1, "c", "a")
    assert 'alt="wrong: gallery image 0, class a, x/first.png"' in page.text
    assert len([img for img in page.all("img") if "src" in img]) == 2 * 3 + 1 * 6 - 1  # the query is shown once
    assert set(page.data["pictures"]) == {"0", "1", "2", "3"}


def test_many_classes(report, monkeypatch):
    monkeypatch.setattr("pml_ext.visualization.report_comparison.MAX_ROWS", 4)
    labels = torch.arange(40) // 4
    page = report(torch.randn(40, 4), labels, other=torch.randn(40, 4), **TITLES)
    rows = [float(row[-1].replace("\u2212", "-")) for row in page.tables["change-table"][1:]]
    assert len(rows) == 4 and rows == sorted(rows) and rows[1] < rows[2]
    assert "the table has the 2 largest losses and gains" in page.text
    assert MAX_ROWS == 2000


def test_titles_cannot_run(report):
    page = report(A, LABELS, other=B, title=EVIL[0], other_title=EVIL[1], about={"x": 1}, other_about={"x": EVIL[2]})
    assert len(page.all("script")) == 2 and not page.all("img", src="x") and not page.all("b", id="bold")


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"other": B[:5]}, ValueError, "other must have the 6 rows of embeddings, got 5"),
        ({"other": B.tolist()}, TypeError, "other must be a tensor or an array with a floating point dtype, got list"),
        ({"other": B * torch.nan}, ValueError, "other must be finite, got nan"),
        ({"other_title": "run B"}, ValueError, "other must come with other_title, got other_title alone"),
        ({"other_about": {"epoch": 3}}, ValueError, "other must come with other_about, got other_about alone"),
        ({"other_gallery": B}, ValueError, "other must come with other_gallery, got other_gallery alone"),
        ({"other": B, "other_gallery": B}, ValueError, "gallery must come with other_gallery, got other_gallery alone"),
        ({"other": B, "gallery": A}, ValueError, "gallery_labels must come with gallery, got gallery alone"),
        (
            {"other": B, "gallery": A, "gallery_labels": LABELS},
            ValueError,
            "other_gallery must come with other, got other alone",
        ),
        (
            {"other": B, "gallery": A, "gallery_labels": LABELS, "other_gallery": A},
            ValueError,
            r"other_gallery must have shape \(N, 5\), got \(6, 2\)",
        ),
        (
            {"other": B, "gallery": A, "gallery_labels": LABELS, "other_gallery": B[:4]},
            ValueError,
            "other_gallery must have the 6 rows of gallery, got 4",
        ),
        ({"other": B, "other_title": 3}, TypeError, "other_title must be a string, got 3"),
        (
            {"other": B, "title": "run", "other_title": "run"},
            ValueError,
            "other_title must differ from title, got 'run' for both",
        ),
    ],
)
def test_bad_runs(report, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        report(A, LABELS, **kwargs)


@pytest.mark.parametrize(
    ("difference", "text"), [(-0.0001, "+0.0"), (0.0, "+0.0"), (-0.002, "\N{MINUS SIGN}0.2"), (0.25, "+25.0")]
)
def test_signs_of_differences(difference, text):
    assert signed_points(difference) == text
