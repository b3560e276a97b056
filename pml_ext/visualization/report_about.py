"""The head of a report: what the embeddings come from."""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from pml_ext.visualization.report_html import breakable, number_of


class Fact(NamedTuple):
    """A name and what it stands for in one run, or in two; None where a run does not say."""

    name: str
    values: list[str | None]
    inside: "list[Fact]"  # of a mapping, which is folded

    @property
    def differs(self) -> bool:
        """Whether two runs differ in it."""
        return len(set(self.values)) > 1 or any(fact.differs for fact in self.inside)


def facts(abouts: Mapping[str, Mapping[str, Any] | None]) -> list[Fact]:
    """Return what callers say about one run, or two, as texts.

    Args:
        abouts: Argument -> a mapping from names to values, or None. Values that are mappings may hold more of them.

    Raises:
        TypeError: If one is not a mapping, or a name is not a string; the message names the argument.
    """
    for argument, about in abouts.items():
        if about is not None and not isinstance(about, Mapping):
            raise TypeError(f"{argument} must be a mapping from names to texts, got {about!r}")
        for name in about or {}:
            if not isinstance(name, str):
                raise TypeError(f"{argument} must have strings for names, got {name!r}")
    known = [about or {} for about in abouts.values()]
    listed = []
    for name in dict.fromkeys(name for about in known for name in about):
        values = [about.get(name) for about in known]
        if all(isinstance(value, Mapping) or value is None for value in values) and any(values):
            inner = {f"{argument}[{name!r}]": about.get(name) for argument, about in zip(abouts, known, strict=True)}
            listed.append(Fact(name, [], facts(inner)))
        else:
            texts = [str(about[name]) if name in about else None for about in known]
            listed.append(Fact(name, texts, []))
    return listed


def about_section(listed: list[Fact], titles: tuple[str, ...]) -> str:
    """Return the facts as tables, with a column for each run; those in which runs differ are bold.

    Args:
        listed: The facts.
        titles: Titles of the runs; not shown if there is one.
    """
    plain, folded = [x for x in listed if not x.inside], [x for x in listed if x.inside]
    parts = []
    if plain:
        head = ""
        if len(titles) > 1:
            columns = "".join(f'<th scope="col">{breakable(title)}</th>' for title in titles)
            head = f"<thead><tr><td></td>{columns}</tr></thead>"
        rows = "".join(
            f'<tr><th scope="row">{breakable(fact.name)}</th>'
            + "".join(f'<td class="text">{_value(value, fact.differs)}</td>' for value in fact.values)
            + "</tr>"
            for fact in plain
        )
        parts.append(f'<table class="about">{head}<tbody>{rows}</tbody></table>')
    for fact in folded:
        number = number_of(len(fact.inside), "entry", "entries")
        differ = sum(inner.differs for inner in fact.inside)
        more = f", {differ} {'differs' if differ == 1 else 'differ'}" if differ else ""
        parts.append(
            f"<details><summary>{escape(fact.name)} ({number}{more})</summary>"
            f"{about_section(fact.inside, titles)}</details>"
        )
    return "".join(parts)


def _value(value: str | None, differs: bool) -> str:
    text = "—" if value is None else breakable(value)
    return f"<strong>{text}</strong>" if differs else text
