"""Weights of networks without their wrappers."""

from typing import Any

from torch import Tensor, nn

from pml_ext.trunks.wrappers import plain_name, unwrapped


def network_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a network without the names that compiling and parallel training add."""
    return {plain_name(name): x for name, x in unwrapped(module).state_dict().items()}


def matched_state(module: nn.Module, state: dict[str, Any], source: Any) -> dict[str, Any]:
    """Return a state under the names that ``unwrapped(module)`` has, whatever wrapper it was written behind.

    Args:
        module: A network or loss.
        state: State dict of the module, or of the module inside wrappers.
        source: Where the state comes from, for the message.

    Raises:
        ValueError: If names or shapes are others.
    """
    own = unwrapped(module).state_dict()
    names = {plain_name(name): name for name in own}
    state = {plain_name(name): x for name, x in state.items()}
    while names and state and names.keys().isdisjoint(state):
        state = {name.partition(".")[2]: x for name, x in state.items() if name.startswith(("module.", "loss."))}
    shapes = [
        {name: _shape(x) for name, x in entries.items()} for entries in (state, {n: own[names[n]] for n in names})
    ]
    if shapes[0] != shapes[1]:
        first = min(name for name in shapes[0].keys() | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        here, there = (entries.get(first, "none") for entries in reversed(shapes))
        raise ValueError(f"{source}, got another: {first} has shape {there}, and here {here}")
    return {names[name]: x for name, x in state.items()}


def _shape(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else "none"
