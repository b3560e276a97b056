import re

import pytest
import torch

from pml_ext.visualization.report_about import about_section, facts
from tests.visualization.report_pages import EVIL

X, LABELS = torch.eye(4), [0, 0, 1, 1]


def cells(html):
    return re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", html)


def test_one_run(report):
    about = {"recipe": "mhgl", "epoch": 7, "date": "2024-05-01 12:00", "settings": {"lr": 1e-4, "freeze": None}}
    page = report(X, LABELS, title="run", about=about)
    head = page.text.split("<header>")[1].split("</header>")[0]
    assert cells(head)[:6] == ["recipe", "mhgl", "epoch", "7", "date", "2024-05-01 12:00"]
    assert "<summary>settings (2 entries)</summary>" in head
    assert cells(head)[6:] == ["lr", "0.0001", "freeze", "None"]
    assert "<strong>" not in head
    assert 'class="about"' not in report(X, LABELS).text


def test_two_runs():
    both = {"about": {"recipe": "a", "seed": 0, "of": {"lr": 1, "k": 2}}, "other_about": {"of": {"k": 3}, "seed": 0}}
    html = about_section(facts(both), ("run_A", "run B"))
    found = cells(html)
    assert found[:3] == ["", "run_<wbr>A", "run B"]
    assert found[3:9] == ["recipe", "<strong>a</strong>", "<strong>\u2014</strong>", "seed", "0", "0"]
    assert "<summary>of (2 entries, 2 differ)</summary>" in html
    bold = [f"<strong>{value}</strong>" for value in ("1", "\u2014", "2", "3")]
    assert found[12:] == ["lr", *bold[:2], "k", *bold[2:]]
    assert facts({"about": {"a": {"b": 1}}, "other_about": {"a": 5}})[0].values == ["{'b': 1}", "5"]


def test_it_cannot_run(report):
    about = dict(zip(EVIL, reversed(EVIL), strict=True)) | {"settings" + EVIL[0]: {EVIL[1]: EVIL[1]}}
    page = report(X, LABELS, about=about)
    assert len(page.all("script")) == 2 and not page.all("img") and not page.all("b", id="bold")
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("mhgl", "about must be a mapping from names to texts, got 'mhgl'"),
        ([("recipe", "mhgl")], "about must be a mapping from names to texts, got"),
        ({3: "mhgl"}, "about must have strings for names, got 3"),
        ({"settings": {3: 1}}, r"about\['settings'\] must have strings for names, got 3"),
    ],
)
def test_bad_about(report, about, message):
    with pytest.raises(TypeError, match=message):
        report(X, LABELS, about=about)
