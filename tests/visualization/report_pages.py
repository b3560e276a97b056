"""What the tests of reports have in common."""

import json
import re
from html.parser import HTMLParser

import torch

EVIL = [
    "<script>hacked=1</script>",
    "</script><img src=x onerror='hacked=1'>",
    '"><b id="bold">&amp;',
    "a_b \u2028 <!-- </script ",
]


class Page(HTMLParser):
    """What is in a report: start tags with attributes, the JSON, and the rows of each table."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.tables, self.open = [], {}, None
        self.feed(self.text)
        self.data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.text)[1])
        self.metrics = tuple(self.data["metrics"].values())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.open = self.tables[dict(attrs).get("id")] = []
        elif tag == "tr" and self.open is not None:
            self.open.append([])
        elif tag in ("td", "th") and self.open:
            self.open[-1].append("")

    def handle_data(self, data):
        if self.open and self.open[-1]:
            self.open[-1][-1] += data

    def handle_endtag(self, tag):
        if tag == "table":
            self.open = None

    def all(self, tag, **attributes):
        return [attrs for name, attrs in self.tags if name == tag and attributes.items() <= attrs.items()]


def clusters(num_images=300, num_classes=12, dim=16, spread=1.0):
    labels = torch.randint(num_classes, (num_images,))
    return torch.randn(num_classes, dim)[labels] + spread * torch.randn(num_images, dim), labels
