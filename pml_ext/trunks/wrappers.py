"""What lies inside wrappers: those of ``torch.compile``, of parallel training, of averaging, and ``Sequential``."""

from torch import nn

_INSIDE = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel, AveragedModel and others
_OF_LOSSES = "DistributedLossWrapper"  # PML's and ours, which keep the loss in ``loss``


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, ``DistributedDataParallel``, ``AveragedModel`` and the like.

    A network that has a part called ``module`` beside others is not a wrapper.
    """
    for name in (*_INSIDE, "loss") if type(module).__name__ == _OF_LOSSES else _INSIDE:
        inside = getattr(module, name, None)
        if isinstance(inside, nn.Module) and {*module.children()} <= {inside}:
            return unwrapped(inside)
    return module


def backbone_of(trunk: nn.Module) -> nn.Module | None:
    """Return the attribute ``backbone`` of a network, also of one inside wrappers or of a ``Sequential``, or None.

    Raises:
        ValueError: If a ``Sequential`` has two networks with a backbone.
    """
    trunk = unwrapped(trunk)
    own = getattr(trunk, "backbone", None)
    if isinstance(own, nn.Module):
        return own
    if not isinstance(trunk, nn.Sequential):
        return None
    backbones = [backbone for backbone in map(backbone_of, trunk) if backbone is not None]
    if len(backbones) > 1:
        raise ValueError(f"trunk must have one part with the attribute backbone, got {len(backbones)}")
    return backbones[0] if backbones else None


def timm_model_of(trunk: nn.Module) -> nn.Module | None:
    """Return the timm model that a network is, inside wrappers too, or the only one in a ``Sequential``, or None."""
    trunk = unwrapped(trunk)
    if callable(getattr(trunk, "get_classifier", None)):
        return trunk
    if not isinstance(trunk, nn.Sequential):
        return None
    models = [model for model in map(timm_model_of, trunk) if model is not None]
    return models[0] if len(models) == 1 else None


def plain_name(name: str) -> str:
    """Return the name of a parameter or buffer without ``torch.compile``, which may wrap any part of a network."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
