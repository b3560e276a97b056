"""Imports point one way: no circle, no arrow against the layers, and PML's internals in one module.

All imports are read, those under ``TYPE_CHECKING`` and inside functions too.
"""

import ast
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "pml_ext"

LAYERS = [  # lowest first; a module imports from its own sub-package and from the layers below it
    {"types", "version", "extras", "precision", "modes", "validation", "strict_json"},
    {"pml_internals"},
    {"learners", "pairs", "reducers", "refused", "samplers", "class_embeddings", "gradient_cache"},
    {"streaming", "regularizers"},
    {"trunks", "neighbors", "distributed", "datasets"},
    {"losses", "evaluation"},
    {"visualization"},
    {"recipes"},
    {"commands"},
    {"__main__"},
]
UNRELATED = {
    "evaluation": {"trunks", "distributed", "datasets"},
    "visualization": {"trunks", "distributed", "losses"},
    "streaming": {"learners", "reducers", "pml_internals"},
}
"""What a sub-package does not import although it lies in a layer below."""

HEAVY = {  # what functions may import, to spare others the time
    "PIL",
    "faiss",
    "matplotlib",
    "sentence_transformers",
    "sklearn",
    "threadpoolctl",
    "timm",
    "torch_geometric",
    "torchvision",
    "umap",
    "pytorch_metric_learning.datasets",
    "pml_ext.distributed.sharding",  # DTensor
    "pml_ext.trunks",  # timm and torch-geometric
}
HEAVY_OF_PART = {  # names of recipes, their settings and the options of commands are there without torch
    "recipes": {
        *("pytorch_metric_learning", "pml_ext.losses", "pml_ext.recipes.backbones"),
        "pml_ext.recipes.silent_refiner",
    },
    "commands": {"torch", "pml_ext"},
}

PUBLIC = {"distances", "losses", "miners", "reducers", "regularizers", "samplers"}  # in PML 2 and, by its docs, in 3
ONLY_IN_2 = {  # public in PML 2, gone in 3: parts of this package stand on them as wholes
    "recipes/trainer.py": {"trainers"},
    "evaluation/accuracy_calculator.py": {"utils.accuracy_calculator"},
    "datasets/sources.py": {"datasets"},
}
LOADERS = {"__init__.py", "extras.py", "report_map.py", "main.py", "doctor.py"}
"""Files that load modules by a name in a string: parts of the package on first use, and packages of extras."""
INTERNAL = re.compile(
    r"_sub_loss_names|_record_these|add_to_recordable_attributes|reset_stats|regularization_to_loss_dict"
    r"|zero_loss|(?<!self)\.data = |\bc_f\b|\blmu\b"
)
SEAM = PACKAGE / "pml_internals.py"


class Import(NamedTuple):
    """One imported module: where, what, and whether inside a function."""

    path: Path
    line: int
    target: str
    in_function: bool

    def __str__(self):
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.line} imports {self.target}"


def files():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def is_module(name):
    """Return whether a dotted name of this package or of PML is a module."""
    if name.split(".")[0] != "pytorch_metric_learning":
        return name in MODULES
    parent = importlib.import_module(name.rpartition(".")[0])
    return hasattr(parent, "__path__") and importlib.util.find_spec(name) is not None


def imports_of(path, source=None):
    """Return the imports of a file; ``from package import name`` counts as ``package.name`` if that is a module."""
    imports = []
    waiting = [(ast.parse(path.read_text(encoding="utf-8") if source is None else source), False)]
    while waiting:
        node, in_function = waiting.pop()
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not isinstance(node, ast.expr):
            waiting += [(child, in_function) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} has a relative import"
            targets = [
                whole if is_module(whole) else node.module
                for whole in (f"{node.module}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        imports += [Import(path, node.lineno, target, in_function) for target in dict.fromkeys(targets)]
    return imports


IMPORTS = [imported for path in files() for imported in imports_of(path)]
OURS = [imported for imported in IMPORTS if imported.target.split(".")[0] == "pml_ext"]
"""Imports of the package itself."""


def circles(edges):
    """Return the modules that lie on a circle, or between two: those without importer or import fall away."""
    edges = set(edges)
    while True:
        sources, targets = ({edge[i] for edge in edges} for i in (0, 1))
        kept = {(a, b) for a, b in edges if a in targets and b in sources}
        if kept == edges:
            return sorted(sources)
        edges = kept


def part_of(module):
    """Return the sub-package or module right below ``pml_ext``, "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def against_layers(imported):
    """Return whether an import points upward, sideways, or to a stranger."""
    source, target = part_of(module_of(imported.path)), part_of(imported.target)
    if source in ("", target):  # the package itself only names its parts
        return False
    level = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    if not target:
        return True
    allowed = level[target] < level[source] or (level[source] == level[target] == 0)
    return not allowed or target in UNRELATED.get(source, ())


def test_every_part_has_a_layer():
    parts = {part_of(module) for module in MODULES} - {""}
    listed = [part for layer in LAYERS for part in layer]
    assert parts == set(listed)
    assert len(listed) == len(set(listed))


def test_there_is_no_circle():
    edges = {(module_of(imported.path), imported.target) for imported in OURS}
    assert len(edges) > 100
    assert circles(edges) == []


def test_no_circle_of_parts():
    """Sub-packages as wholes do not need each other either."""
    edges = {(part_of(module_of(imported.path)), part_of(imported.target)) for imported in OURS}
    assert circles((a, b) for a, b in edges if a and a != b) == []


def test_imports_keep_to_the_layers():
    assert [str(imported) for imported in OURS if against_layers(imported)] == []


def test_packages_are_not_imported_from_inside():
    """A module takes what it needs from the module that has it, not from the package that both lie in."""
    inside = [
        str(imported)
        for imported in OURS
        if imported.target == ".".join(module_of(imported.path).split(".")[:2]) and imported.path.name != "__init__.py"
    ]
    assert inside == []


def test_imports_inside_functions_spare_time_and_say_so():
    wrong = []
    for imported in IMPORTS:
        if imported.in_function:
            line = imported.path.read_text(encoding="utf-8").splitlines()[imported.line - 1]
            names = HEAVY | HEAVY_OF_PART.get(part_of(module_of(imported.path)), set())
            heavy = any(f"{imported.target}.".startswith(f"{name}.") for name in names)
            if not heavy or not re.search(r"# on use: \w+", line):
                wrong.append(str(imported))
    assert wrong == []


def test_internals_of_pml_are_in_one_module():
    wrong = []
    for imported in IMPORTS:
        pml, _, name = imported.target.partition(".")
        if pml == "pytorch_metric_learning" and imported.path != SEAM:
            own = ONLY_IN_2.get(imported.path.relative_to(PACKAGE).as_posix(), set())
            wrong += [] if name in PUBLIC | own else [str(imported)]
    assert wrong == []


def strings_that_load(path, source=None):
    """Return the calls that import a module by a string, and attributes of PML's packages that are modules."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "pytorch_metric_learning"
        for alias in node.names
    }
    calls = [
        f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.search(r"(^|\.)(import_module|__import__)$", ast.unparse(node.func))
    ]
    attributes = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in names
        and is_module(f"{names[node.value.id]}.{node.attr}")
    ]
    return [] if path.name in LOADERS else calls, [] if path == SEAM else attributes


def test_no_module_is_loaded_by_a_string_or_reached_through_another():
    assert [entry for path in files() for entries in strings_that_load(path) for entry in entries] == []
    hybrid = PACKAGE / "losses" / "hybrid_loss.py"
    for source in (
        "from pytorch_metric_learning import losses; losses.mixins.WeightMixin",
        'import importlib; importlib.import_module("pytorch_metric_learning.utils.common_functions")',
        '__import__("pml_ext.recipes")',
    ):
        assert any(strings_that_load(hybrid, source)), source


def test_hooks_of_pml_are_named_in_one_module():
    wrong = []
    for path in files():
        if path != SEAM:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                wrong += [f"{path.name}:{number}: {line.strip()}"] if INTERNAL.search(line) else []
    assert wrong == []


@pytest.mark.parametrize(
    ("where", "source", "broken"),
    [
        ("streaming/proxy_anchor.py", "import pml_ext.losses.hybrid_loss", test_imports_keep_to_the_layers),
        ("losses/hybrid_loss.py", "def f():\n    from pml_ext.recipes import recipe", test_imports_keep_to_the_layers),
        ("types.py", "if TYPE_CHECKING:\n    from pml_ext.validation import check_batch", test_there_is_no_circle),
        ("losses/children.py", "from pml_ext.losses import HybridLoss", test_packages_are_not_imported_from_inside),
        ("recipes/building.py", "def f():\n    import json", test_imports_inside_functions_spare_time_and_say_so),
        ("losses/hybrid_loss.py", "def f():\n    import faiss", test_imports_inside_functions_spare_time_and_say_so),
        (
            "losses/hybrid_loss.py",
            "from pytorch_metric_learning.utils import common_functions",
            test_internals_of_pml_are_in_one_module,
        ),
        (
            "losses/hybrid_loss.py",
            "from pytorch_metric_learning.losses import mixins",
            test_internals_of_pml_are_in_one_module,
        ),
        (
            "evaluation/accuracy_calculator.py",
            "from pytorch_metric_learning.utils import common_functions as c",
            test_internals_of_pml_are_in_one_module,
        ),
        ("losses/hybrid_loss.py", "import pytorch_metric_learning", test_internals_of_pml_are_in_one_module),
        ("losses/hybrid_loss.py", "import pml_ext", test_imports_keep_to_the_layers),
        (
            "losses/hybrid_loss.py",
            "from pytorch_metric_learning.losses.mixins import x",
            test_internals_of_pml_are_in_one_module,
        ),
    ],
)
def test_a_wrong_import_is_noticed(where, source, broken, monkeypatch):
    added = imports_of(PACKAGE / where, source)
    monkeypatch.setitem(globals(), "IMPORTS", IMPORTS + added)
    monkeypatch.setitem(
        globals(), "OURS", OURS + [imported for imported in added if imported.target.startswith("pml_ext")]
    )
    with pytest.raises(AssertionError):
        broken()
