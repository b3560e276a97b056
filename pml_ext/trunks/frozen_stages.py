"""Keep the first stages of a backbone as they are."""

import re

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pml_ext.trunks.batch_norm import freeze_batch_norm
from pml_ext.trunks.conv_net import ConvNet
from pml_ext.trunks.wrappers import backbone_of

_PARTS = re.compile(r"(model_|network_|stem_|head_|\d+_)*")  # what trunks put before the names of a network


def freeze_stages(trunk: nn.Module, backbone: str, num_stages: int) -> list[str]:
    """Keep all of a backbone up to the end of a stage: weights get no gradient, batch norms stay in eval mode.

    Backpropagation ends there, which saves time and memory.

    Args:
        trunk: A network of this package with the attribute ``backbone``. Changed in place.
        backbone: The timm model that it was made from, or "convnet".
        num_stages: How many stages, and all before them, >= 1 and less than the backbone has.

    Returns:
        Names of the parameters.

    Raises:
        ValueError: If the backbone does not have more stages than that, or the stages are not known.

    Examples:
        >>> from pml_ext.trunks import PooledTrunk
        >>> len(freeze_stages(PooledTrunk("resnet18", 8), "resnet18", 2))  # the stem and layer1
        15
    """
    stages = stage_names(backbone)
    if not 1 <= num_stages < len(stages):
        raise ValueError(
            f"frozen_stages must lie in 1 to {len(stages) - 1} for {backbone!r} ({', '.join(stages)}), got {num_stages}"
        )
    network = backbone_of(trunk)
    names = [] if network is None else [name for name, _ in network.named_parameters()]
    stage = stages[num_stages - 1].replace(".", "_") + "_"
    inside = [i for i, name in enumerate(names) if _of_network(name).startswith(stage)]
    later = [
        i
        for i, name in enumerate(names)
        if any(_of_network(name).startswith(s.replace(".", "_") + "_") for s in stages[num_stages:])
    ]
    if network is None or not later:
        raise ValueError(f"frozen_stages must be 0 for a network whose stages are not known, got {num_stages}")
    end = max(inside, default=min(later) - 1) + 1
    frozen = names[:end]
    for name in frozen:
        network.get_parameter(name).requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.weight" in frozen:
            freeze_batch_norm(module)
    return frozen


def stage_names(backbone: str) -> list[str]:
    """Return the modules of a backbone that end its stages, the stem's among them where timm counts it."""
    if backbone == "convnet":
        return [name for name, _ in ConvNet().named_children()]
    if not timm.is_model(backbone):
        raise ValueError(f"frozen_stages must be 0 for the backbone {backbone!r}, whose stages are not known")
    with torch.device("meta"):  # without memory: only to read it
        model: nn.Module = timm.create_model(backbone, num_classes=0)
    return [info["module"] for info in getattr(model, "feature_info", ())]


def _of_network(name: str) -> str:
    return _PARTS.sub("", name.replace(".", "_"), count=1)
