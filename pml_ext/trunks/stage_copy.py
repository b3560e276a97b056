"""The attention trunk of an ensemble: a copy of the backbone's next stage that keeps the grid (ABE)."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, fx, nn

from pml_ext.modes import in_mode


@torch.no_grad()
def copy_stage(head: fx.GraphModule, features: Tensor) -> nn.Sequential:
    """Return copies of the modules behind the cut, up to the next loss of resolution, at the cut's resolution.

    The first module runs at stride 1: its convolutions get stride 1, and pools with a stride are left out. For
    GoogLeNet behind maxpool3 that is inception4a to 4e, for a ResNet behind layer2 it is layer3. Where this does not
    keep the grid (ConvNeXt's 2 x 2 downsampling), it is two 3 x 3 convolutions with BatchNorm and ReLU. Copies start
    with the weights of the originals.

    Args:
        head: What follows the cut.
        features: ``(B, C, H, W)``, what the stem gives.
    """
    stage: OrderedDict[str, nn.Module] = OrderedDict()
    node, current = next(node for node in head.graph.nodes if node.op == "placeholder"), features
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            break
        module = copy.deepcopy(head.get_submodule(str(node.target)))
        if not stage:
            module = _at_stride_one(module)
        for m in module.modules():
            if hasattr(m, "inplace"):
                m.inplace = False  # type: ignore[assignment]  # the stem's features are used again
        try:
            with in_mode(module):
                current = module(current)
        except (RuntimeError, AssertionError):  # branches that no longer fit together, or a grid built in
            break
        if current.ndim != 4 or current.shape[2:] != features.shape[2:]:
            break
        stage[node.name] = module
    if not any(True for module in stage.values() for _ in module.parameters()):
        return _two_convolutions(features.shape[1])
    return nn.Sequential(stage)


def _at_stride_one(module: nn.Module) -> nn.Module:
    if _has_stride(module) and not any(True for _ in module.parameters()):
        return nn.Identity()
    if isinstance(module, nn.Conv2d):
        module.stride = (1, 1)
    for name, child in module.named_children():
        setattr(module, name, _at_stride_one(child))
    return module


def _has_stride(module: nn.Module) -> bool:
    stride = getattr(module, "stride", 1)
    return max(stride if isinstance(stride, tuple | list) else (stride,)) > 1


def _two_convolutions(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)
