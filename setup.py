"""Gives the package index README.md as text that needs no address: no pictures, and no links into the repository."""

import re
from pathlib import Path

from setuptools import setup


def without_local_links(text):
    """Return a Markdown text without comments and pictures; links to files become the words that they show."""
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"^!\[.*\n+(\*(?:.+\n)+)?", "", text, flags=re.MULTILINE)  # a picture, and the caption below it
    text = re.sub(r"^\[\w+\]: .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]+)\](?:\[\w+\]|\((?!https?:)[^)]*\))", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=without_local_links(readme), long_description_content_type="text/markdown")
