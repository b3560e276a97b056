"""Parameter groups for any optimizer: backbone, new layers and proxies learn at their own speed."""

from collections.abc import Iterator
from typing import Any

from pytorch_metric_learning.losses import BaseMetricLossFunction, MultipleLosses
from torch import nn

from pml_ext.trunks.wrappers import backbone_of, timm_model_of, unwrapped
from pml_ext.validation import check_number

_CURES = {
    "backbone": "keep the pretrained part in its attribute backbone",
    "head": "add one, as in timm.create_model(..., num_classes=embedding_size) or nn.Sequential(model, nn.Linear(...))",
}


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
        trunk: The network. Its attribute ``backbone`` is the backbone, and the rest are new layers. Without that
            attribute, a timm model is the backbone and its classifier is new
            (``timm.create_model(..., num_classes=embedding_size)``), as are the layers that follow it in an
            ``nn.Sequential``. All of any other network is backbone. ``torch.compile``, ``DistributedDataParallel``,
            ``AveragedModel`` and ``nn.Sequential`` are looked through.
        loss_func: Its parameters are the proxies, also where it is a part of ``trunk`` or shares parameters with it. So
            are those of PML's and our losses that are parts of ``trunk``, given or not.
        lr: Learning rate of the backbone, > 0.
        head_lr: Learning rate of the new layers, which ``trunk`` must then have. None: ``lr``.
        proxy_lr: Learning rate of the loss's parameters.
        weight_decay: Weight decay, >= 0.

    Returns:
        Groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out.

    Raises:
        TypeError: If ``trunk`` or ``loss_func`` is not a module, ``trunk`` is a loss, or a rate is not a number.
        ValueError: If a rate is not positive, ``weight_decay`` is negative, nothing requires a gradient, ``head_lr``
            differs from ``lr`` in a network without known new layers, or the network has two backbones.

    Examples:
        >>> groups = param_groups(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), lr=0.1)
        >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
        [('backbone', 1, 0.0001), ('backbone, no decay', 3, 0.0)]

    Source:
        The learning rates are those of MHGL (WACV 2022): 1e-4, 1e-4, and 1e-2 for proxies. The weight decay is that of
        Proxy-Anchor's code; MHGL gives none.
    """
    _check_modules(trunk, loss_func)
    for name, rate in (("lr", lr), ("head_lr", lr if head_lr is None else head_lr), ("proxy_lr", proxy_lr)):
        check_number(name, rate)
        if not rate > 0:
            raise ValueError(f"{name} must be > 0, got {rate}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    backbone, classifier = _backbone_and_classifier(trunk)
    if head_lr not in (None, lr) and not _new_layers(trunk, backbone, classifier):
        raise ValueError(
            f"head_lr must be None for a trunk without known new layers, got {head_lr} for a "
            f"{type(unwrapped(trunk)).__name__}: {_CURES['backbone' if backbone is None else 'head']}"
        )
    losses = nn.ModuleList(m for m in trunk.modules() if isinstance(m, BaseMetricLossFunction))
    parts = [("proxies", losses), ("new layers", classifier)]
    parts += [("backbone", trunk if backbone is None else backbone), ("new layers", trunk)]
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


def _check_modules(trunk: Any, loss_func: Any) -> None:
    for name, module, several in (("trunk", trunk, "Sequential"), ("loss_func", loss_func, "ModuleList")):
        if isinstance(module, nn.Module) or (module is None and name == "loss_func"):
            continue
        cure = ""
        if isinstance(module, Iterator):
            cure = ": the module itself, not its parameters()"
        elif isinstance(module, list | tuple):
            cure = f": torch.nn.{several}(...)"
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}{cure}")
    if isinstance(unwrapped(trunk), BaseMetricLossFunction | MultipleLosses):
        kind = type(unwrapped(trunk)).__name__
        raise TypeError(f"trunk must be the network, got the loss {kind}: param_groups(trunk, loss_func)")


def _backbone_and_classifier(trunk: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """Return the backbone, and what of it is new: the classifier of a timm model that stands for its own backbone."""
    backbone = backbone_of(trunk)
    if backbone is not None:
        return backbone, nn.ModuleList()
    model: Any = timm_model_of(trunk)
    if model is None:
        return None, nn.ModuleList()
    classifier = model.get_classifier()  # distilled transformers have two
    return model, nn.ModuleList(classifier if isinstance(classifier, list | tuple) else [classifier])


def _new_layers(trunk: nn.Module, backbone: nn.Module | None, classifier: nn.Module) -> bool:
    if backbone is None:
        return False
    inside = {id(p) for p in backbone.parameters()} - {id(p) for p in classifier.parameters()}
    return any(id(p) not in inside for p in trunk.parameters())
