"""Keep the statistics of pretrained batch norms."""

from functools import partial
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pml_ext.validation import shown

T = TypeVar("T", bound=nn.Module)


def freeze_batch_norm(module: T) -> T:
    """Keep all batch norms of a module in eval mode permanently, even after ``train()``.

    They normalize with their running statistics and do not change them; weight and bias are still trained. Proxy-Anchor
    and its successors do so on small data sets (CUB, Cars), where batch statistics are noisy. ``timm``'s function of
    this name also stops the training of weight and bias.

    Args:
        module: Changed in place. Copies and pickles of it stay frozen, and so do batch norms that take the place of
            others in it, as those of ``nn.SyncBatchNorm.convert_sync_batchnorm`` do.

    Returns:
        The module.

    Raises:
        TypeError: If it is not a module.
        ValueError: If it has no batch norm.

    Examples:
        >>> norm = freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train()[1]
        >>> norm.training, norm.weight.requires_grad
        (False, True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {shown(module)}")
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        raise ValueError(f"module must contain a batch norm, got a {type(module).__name__} without")
    kept: list[nn.Module] = [module, *norms]  # the norms too: somebody may call their train() alone
    for m in kept:
        m.train = partial(_train_but_norms, m)  # type: ignore[method-assign]
    for norm in norms:
        norm.eval()
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a module contains a batch norm."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _train_but_norms(module: nn.Module, mode: bool = True) -> nn.Module:
    type(module).train(module, mode)
    for m in module.modules():
        if isinstance(m, _BatchNorm):
            m.training = False
    return module
