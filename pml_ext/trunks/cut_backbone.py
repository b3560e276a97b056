"""Cut a network in two at a named module."""

import copy
from typing import Any

from torch import fx, nn

from pml_ext.modes import in_mode
from pml_ext.validation import shown


def cut_backbone(model: nn.Module, split: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return what a network computes up to a module, and what it computes from there on.

    The parts hold the network's own modules. One after the other they are the network, in training and in evaluation:
    only the modules around the cut are traced through, all others are called as they are.

    Args:
        model: A network of one input.
        split: Name of the module behind which to cut, as in ``model.named_modules()``.

    Returns:
        Stem and head.

    Raises:
        ValueError: If there is no such module, it does not run exactly once, the network cannot be traced, or something
            from before the cut is used behind it.
    """
    if split not in dict(model.named_modules()) or not split:
        raise ValueError(
            f"split must be one of {', '.join(cut_points(model))} (or a module in one), got {shown(split)}"
        )
    stem, stem_root = _trace(model, split)
    end = _find(stem, split)
    for node in reversed(_behind(stem, end)):
        stem.erase_node(node)
    stem.output(end)

    head, head_root = _trace(model, split)
    cut = _find(head, split)
    before = _up_to(head, cut)
    with head.inserting_before(cut):
        features = head.placeholder("features")
    cut.replace_all_uses_with(features)
    for node in reversed(before):
        if not node.users:
            head.erase_node(node)
        elif node.op != "get_attr":  # parameters of the network itself may be used on both sides
            raise ValueError(
                f"split must be the only input of the layers behind it, got {split!r}, which {_name(node)} bypasses"
            )
    return fx.GraphModule(stem_root, stem, "Stem"), fx.GraphModule(head_root, head, "Head")


def cut_points(model: nn.Module) -> list[str]:
    """Return the names of the modules that a network calls one after the other."""
    names: list[str] = []
    for node in _trace(model, "")[0].nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            names.append(str(node.target))
            if isinstance(module, nn.Sequential):
                names += [f"{node.target}.{name}" for name, _ in module.named_children()]
    return names


class _Tracer(fx.Tracer):
    """Calls every module as it is but those that contain the cut."""

    def __init__(self, split: str = "") -> None:  # without: for the unpickling of parts
        super().__init__()
        self.split = split

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.split.startswith(module_qualified_name + ".")


def _trace(model: nn.Module, split: str) -> tuple[fx.Graph, nn.Module]:
    """Return the graph, and a shallow copy of the model with the constants that tracing attaches to it."""
    traces = []
    for training in (True, False):
        with in_mode(model, training):
            root = copy.copy(model)
            try:
                traces.append((_bind_defaults(_Tracer(split).trace(root)), root))
            except Exception as error:  # whatever a forward makes of a symbol
                name = type(model).__name__
                raise ValueError(f"backbone must be traceable by torch.fx, got a {name}: {error}") from error
    if str(traces[0][0]) != str(traces[1][0]):
        raise ValueError(
            f"backbone must do the same in training and in evaluation outside its modules, got a "
            f"{type(model).__name__} that does not (dropout of the head: drop_rate=0; auxiliary outputs: turn them off)"
        )
    return traces[0]


def _bind_defaults(graph: fx.Graph) -> fx.Graph:
    """Put the default values of all arguments but the first in their places."""
    for optional in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if optional.args:

            def bound(node: fx.Node, optional: fx.Node = optional) -> Any:
                return optional.args[0] if node is optional else node

            for user in list(optional.users):
                user.args, user.kwargs = fx.node.map_arg(user.args, bound), fx.node.map_arg(user.kwargs, bound)
            graph.erase_node(optional)
    return graph


def _find(graph: fx.Graph, split: str) -> fx.Node:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == split]
    if len(calls) != 1:
        raise ValueError(f"split must be a module that runs once, got {split!r}, which runs {len(calls)} times")
    return calls[0]


def _up_to(graph: fx.Graph, cut: fx.Node) -> list[fx.Node]:
    nodes = list(graph.nodes)
    return nodes[: nodes.index(cut) + 1]


def _behind(graph: fx.Graph, cut: fx.Node) -> list[fx.Node]:
    nodes = list(graph.nodes)
    return nodes[nodes.index(cut) + 1 :]


def _name(node: fx.Node) -> Any:
    return repr(node.target) if node.op == "call_module" else f"the value {node.name!r}"
