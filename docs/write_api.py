"""Write docs/api.md and the table of docs/losses.md from docstrings; run: python docs/write_api.py."""

import ast
import inspect
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pml_ext
from pml_ext import losses

DOCS = Path(__file__).parent
HEAD = """\
# API reference

Every public name, one line each; the name leads to its description. What is not listed here may change without notice.
`python docs/write_api.py` writes this page from the docstrings.
"""
REST = """
## Described here

What no other page describes.
"""
ENTRY = """
::: {}
    options:
      heading_level: 3
"""
TABLE = re.compile(
    r"(?<=<!-- table of losses: python docs/write_api.py -->\n\n).*?(?=\n<!-- end of table -->)", re.DOTALL
)


def public_names() -> dict[str, list[str]]:
    """Return the names that each module offers."""
    offered = {name: getattr(pml_ext, name) for name in pml_ext.__all__ if not name.startswith("_")}
    modules = {name: value for name, value in offered.items() if isinstance(value, ModuleType)}
    return {
        "pml_ext": sorted(offered.keys() - modules),
        **{f"pml_ext.{name}": module.__all__ for name, module in sorted(modules.items())},
    }


def described_on() -> dict[str, str]:
    """Return the page, relative to docs/, that describes each name; docs/api.md gets what is left."""
    pages = [path for path in sorted(DOCS.rglob("*.md")) if path != DOCS / "api.md"]
    return {
        name: page.relative_to(DOCS).as_posix()
        for page in pages
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }


def summary(module: ModuleType, name: str) -> str:
    """Return the first line of a docstring; that of a constant is the string below it."""
    value = getattr(module, name)
    described = inspect.isclass(value) or inspect.isroutine(value)
    docstring = value.__doc__ if described else _below_assignment(module, name)
    if not docstring:
        raise ValueError(f"{module.__name__}.{name} must have a docstring, got none")
    return inspect.cleandoc(docstring).splitlines()[0]


def _below_assignment(module: ModuleType, name: str) -> str | None:
    path = Path(inspect.getfile(module))
    for source in sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]:
        for node, below in pairwise(ast.parse(source.read_text(encoding="utf-8")).body):
            match node, below:
                case (
                    (ast.Assign(targets=[ast.Name(id=assigned)]) | ast.AnnAssign(target=ast.Name(id=assigned))),
                    ast.Expr(value=ast.Constant(value=str(docstring))),
                ) if assigned == name:
                    return docstring
    return None


def render_api() -> str:
    """Return the text of docs/api.md."""
    pages, parts, undescribed = described_on(), [HEAD], []
    for module_name, names in public_names().items():
        module = import_module(module_name)
        parts.append(f"\n## `{module_name}`\n\n{(module.__doc__ or '').splitlines()[0]}\n\n")
        for name in names:
            full_name = f"{module_name}.{name}"
            if full_name not in pages:
                undescribed.append(full_name)
            parts.append(f"- [`{name}`]({pages.get(full_name, '')}#{full_name}): {summary(module, name)}\n")
    if undescribed:
        parts += [REST, *map(ENTRY.format, undescribed)]
    return "".join(parts)


def render_losses() -> str:
    """Return the text of docs/losses.md, its table made anew."""
    pages, rows = described_on(), ["| loss | what it does | has parameters |\n| --- | --- | --- |\n"]
    for name in losses.__all__:
        full_name, takes = f"{losses.__name__}.{name}", inspect.signature(getattr(losses, name)).parameters
        page = pages.get(full_name, "api.md").removeprefix("losses.md")
        parameters = "yes" if "num_classes" in takes else "as its loss" if "loss" in takes else "no"
        rows.append(f"| [`{name}`]({page}#{full_name}) | {summary(losses, name)} | {parameters} |\n")
    text, times = TABLE.subn(lambda _: "".join(rows), (DOCS / "losses.md").read_text(encoding="utf-8"))
    if times != 1:
        raise ValueError(f"docs/losses.md must have the two comments around its table once, got {times}")
    return text


RENDERERS = {"api.md": render_api, "losses.md": render_losses}

if __name__ == "__main__":
    for name, render in RENDERERS.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
