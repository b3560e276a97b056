"""From a feature map to one vector."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pml_ext.pml_internals import ModuleWithRecords
from pml_ext.precision import full_precision, upcast_half
from pml_ext.validation import check_settings, shown

PoolType = Literal["avg", "max", "avg+max", "gem"]

_SMALLEST = 1e-6  # of what "gem" raises to a power


class GlobalPool2d(ModuleWithRecords):
    r"""Pool over all positions: average, maximum, their sum, or a generalized mean.

    "gem" is $(\frac{1}{HW} \sum_i \max(x_i, 10^{-6})^p)^{1/p}$, computed in float32 or wider: $p = 1$ averages what
    is positive, a large $p$ takes the maximum.

    Args:
        pool_type: "avg", "max", "avg+max" or "gem".
        p: Where the exponent of "gem" starts, > 0. It is learned.
        **kwargs: Passed to PML's ``ModuleWithRecords``.

    Attributes:
        p: The exponent, a parameter of shape ``(1,)``, or None.

    Shape:
        - features: ``(B, C, H, W)``, H and W >= 1. Output: ``(B, C)``, the same dtype.

    Raises:
        ValueError: If an argument or the shape breaks a rule.

    Examples:
        >>> GlobalPool2d("avg+max")(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
        tensor([[9.]])

    Source:
        "avg+max" is Eq. 4 of Ebrahimpour et al., WACV 2022 (timm's ``avgmax`` is half of it). "gem": Radenovic et al.,
        "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019.
    """

    def __init__(self, pool_type: PoolType = "avg+max", p: float = 3.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if pool_type not in get_args(PoolType):
            raise ValueError(f"pool_type must be one of {', '.join(get_args(PoolType))}, got {shown(pool_type)}")
        check_settings({"p": p})
        self.pool_type = pool_type
        self.p = nn.Parameter(torch.full((1,), float(p))) if pool_type == "gem" else None

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim != 4 or not features.shape[2] * features.shape[3]:
            raise ValueError(f"features must have shape (B, C, H, W) with H, W >= 1, got {tuple(features.shape)}")
        if self.pool_type == "avg":
            return features.mean((2, 3))
        if self.pool_type == "max":
            return features.amax((2, 3))
        if self.pool_type == "avg+max":
            return features.mean((2, 3)) + features.amax((2, 3))
        assert self.p is not None
        with full_precision(features.device):  # powers overflow half precision
            x = upcast_half(features)
            p = self.p.to(x.dtype)
            return x.clamp_min(_SMALLEST).pow(p).mean((2, 3)).pow(1 / p).to(features.dtype)

    def extra_repr(self) -> str:
        """Show the kind of pooling."""
        return f"pool_type={self.pool_type!r}"
