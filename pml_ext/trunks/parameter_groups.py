"""Parameter groups for any optimizer: backbone, new layers and proxies learn at their own speed."""

from typing import Any

from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import nn

from pml_ext.trunks.wrappers import backbone_of, unwrapped


def param_groups(
    trunk: nn.Module,
    loss_func: nn.Module | None = None,
    lr: float = 1e-4,
    head_lr: float | None = None,
    proxy_lr: float = 1e-2,
    weight_decay: float = 1e-4,
) -> list[dict[str, Any]]:
    """Return the parameters in groups, for any optimizer of PyTorch.

    Each group has its own learning rate and weight decay; those that the optimizer itself is given have no effect.
    Norms and biases, that is all parameters of fewer than two dimensions, get no weight decay. Parameters that do not
    require a gradient are left out.

    Args:
        trunk: Its attribute ``backbone``, if it has one, is the backbone; the rest are new layers. Without such an
            attribute all of it is backbone. ``torch.compile``, ``DistributedDataParallel``, ``AveragedModel`` and
            ``nn.Sequential`` are looked through.
        loss_func: Its parameters are the proxies, also where it is a part of ``trunk`` or shares parameters with it. So
            are those of PML's and our losses that are parts of ``trunk``, given or not.
        lr: Learning rate of the backbone, > 0.
        head_lr: Learning rate of the new layers, which ``trunk`` must then have. None: ``lr``.
        proxy_lr: Learning rate of the loss's parameters.
        weight_decay: Weight decay, >= 0.

    Returns:
        Groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out.

    Raises:
        ValueError: If a rate is not positive, ``weight_decay`` is negative, nothing requires a gradient, ``head_lr``
            differs from ``lr`` and no backbone is there to be told from new layers, or there are two.

    Examples:
        >>> groups = param_groups(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), lr=0.1)
        >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
        [('backbone', 1, 0.0001), ('backbone, no decay', 3, 0.0)]

    Source:
        The learning rates are those of MHGL (WACV 2022): 1e-4, 1e-4, and 1e-2 for proxies. The weight decay is that of
        Proxy-Anchor's code; MHGL gives none.
    """
    for name, rate in (("lr", lr), ("head_lr", lr if head_lr is None else head_lr), ("proxy_lr", proxy_lr)):
        if not rate > 0:
            raise ValueError(f"{name} must be > 0, got {rate}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    backbone = backbone_of(trunk)
    if backbone is None and head_lr not in (None, lr):
        kind = type(unwrapped(trunk)).__name__
        raise ValueError(
            f"head_lr must be None for a trunk whose new layers are not known, got {head_lr} for a {kind} without the "
            "attribute backbone"
        )
    losses = nn.ModuleList(m for m in trunk.modules() if isinstance(m, BaseMetricLossFunction))
    parts = [("proxies", losses), ("backbone", trunk if backbone is None else backbone), ("new layers", trunk)]
    if loss_func is not None:
        # Whoever is first gets a parameter that two of them have: the loss, unless the trunk is a part of it.
        contains_trunk = {id(p) for p in trunk.parameters()} < {id(p) for p in loss_func.parameters()}
        parts.insert(len(parts) if contains_trunk else 0, ("proxies", loss_func))
    rates = {"backbone": lr, "new layers": lr if head_lr is None else head_lr, "proxies": proxy_lr}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {
        (name, decays): [] for name in rates for decays in (True, False)
    }
    seen = set()
    for name, module in parts:
        for parameter in module.parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[name, parameter.ndim > 1].append(parameter)
    groups = [
        {
            "name": name if decays else f"{name}, no decay",
            "params": params,
            "lr": rates[name],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (name, decays), params in members.items()
        if params
    ]
    if not groups:
        raise ValueError("trunk must have a parameter that requires a gradient, got none")
    return groups
