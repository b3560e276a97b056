"""Attention between all positions of a feature map (MHGL, SOLAR)."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pml_ext.pml_internals import ModuleWithRecords
from pml_ext.refused import leaves_no_trace_where_refused
from pml_ext.validation import as_number, check_count, check_settings, shown

Style = Literal["printed", "solar", "normalized"]

SOLAR_NAMES = {"f": "query", "g": "key", "h": "value", "v": "out"}
"""First part of the parameter names in SOLAR's released weights to ours."""

_SOLAR_REDUCTIONS = {"local": 4, "global": 2}  # as released with SOLAR, for conv4 and conv5


class SecondOrderAttention(ModuleWithRecords):
    r"""Add to each position of a map what it gathers from all positions that resemble it.

    $$A = \mathrm{softmax}(\zeta Q K^\top), \qquad F' = F + \varphi(A V)$$

    $Q, K, V, \varphi$: pointwise linear maps of the feature map $F$, rows are positions. $\zeta$: ``attention_scale``.
    The (HW x HW) matrix $A$ is not stored: PyTorch's fused attention computes it in tiles.

    Args:
        in_features: Channels C of the feature map, >= 1.
        reduction: $k$ >= 1: queries, keys and values have C / k channels; must divide C.
        style: "printed": four bare maps, $\zeta = 1$, as MHGL prints it. "solar": BatchNorm and ReLU after query and
            key, $\zeta = (C / k)^{-1/2}$, and $\varphi$ starts at zero, so that a fresh block is the identity.
            "normalized": as "solar", but BatchNorm, whose weight starts at zero, follows $\varphi$, which starts as
            PyTorch starts it: likewise the identity. In training, what is added has the mean (over batch and positions)
            and the spread that BatchNorm's bias and weight give it: it cannot outgrow them, as in "solar" at a high
            learning rate from scratch. A frozen BatchNorm sets no such limit.
        attention_scale: $\zeta$ > 0. None: that of the style. At the widths of MHGL (1024, 2048) attention without
            scaling saturates.
        **kwargs: Passed to PML's ``ModuleWithRecords`` (``collect_stats``). With statistics,
            ``attention_entropy`` is that of the last forward: 0 if each position looks at one only, 1 if it looks at
            all equally. That needs the explicit matrix.

    Attributes:
        query: 1 x 1 convolution, followed by BatchNorm and ReLU except in style "printed".
        key: 1 x 1 convolution, followed by the same layers as ``query``.
        value: 1 x 1 convolution.
        out: $\varphi$, a 1 x 1 convolution.
        norm: What follows it: BatchNorm in style "normalized", else nothing.

    Shape:
        - features: ``(B, C, H, W)``, floating point. Output: the same.

    Raises:
        TypeError: If ``attention_scale`` is not a number, or requires a gradient, which it would not get.
        ValueError: If an argument or the shape of the features breaks a rule.

    Examples:
        >>> block = SecondOrderAttention(in_features=8, style="solar")
        >>> features = torch.randn(2, 8, 5, 7)
        >>> torch.equal(block(features), features)  # at the start
        True

    Source:
        Ebrahimpour, Qian, Beach, WACV 2022, Eqs. 1 and 2 ("printed"), and the block released with Ng et al., "SOLAR:
        Second-Order Loss and Attention for Image Retrieval", ECCV 2020 ("solar"). Its weights load after the first part
        of each name is replaced as ``SOLAR_NAMES`` says: ``f.0.weight`` is ``query.0.weight``. "normalized" is ours,
        with the last BatchNorm of Wang et al., "Non-local Neural Networks", CVPR 2018.
    """

    def __init__(
        self,
        in_features: int,
        reduction: int = 1,
        style: Style = "printed",
        *,
        attention_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if style not in get_args(Style):
            raise ValueError(f"style must be one of {', '.join(get_args(Style))}, got {shown(style)}")
        check_count("in_features", in_features)
        check_count("reduction", reduction)
        if in_features % reduction:
            raise ValueError(f"reduction must divide in_features = {in_features}, got {reduction}")
        width = in_features // reduction
        if attention_scale is None:
            attention_scale = 1.0 if style == "printed" else width**-0.5
        attention_scale = as_number("attention_scale", attention_scale)
        check_settings({"attention_scale": attention_scale})
        self.in_features = in_features
        self.reduction = reduction
        self.style = style
        self.attention_scale = attention_scale
        self.query = nn.Conv2d(in_features, width, 1) if style == "printed" else _normalized_map(in_features, width)
        self.key = nn.Conv2d(in_features, width, 1) if style == "printed" else _normalized_map(in_features, width)
        self.value = nn.Conv2d(in_features, width, 1)
        self.out = nn.Conv2d(width, in_features, 1, bias=style != "normalized")
        self.norm: nn.Module = nn.Identity()
        if style == "solar":
            for parameter in self.out.parameters():
                nn.init.zeros_(parameter)
        elif style == "normalized":
            norm = nn.BatchNorm2d(in_features)
            nn.init.zeros_(norm.weight)
            self.norm = norm
        self.record("in_features", "reduction", "attention_scale", statistics=["attention_entropy"])

    @leaves_no_trace_where_refused
    def forward(self, features: Tensor) -> Tensor:
        self._check(features)
        query, key, value = (_tokens(m(features)) for m in (self.query, self.key, self.value))
        scale = self.attention_scale
        gathered = nn.functional.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)  # (B, HW, C/k)
        gathered = gathered.transpose(1, 2)  # (B, C/k, HW)
        gathered = gathered.reshape(*gathered.shape[:2], *features.shape[2:])
        if self.collect_stats:
            self.attention_entropy = self._entropy(query, key)
        return features + self.norm(self.out(gathered))

    @leaves_no_trace_where_refused
    def attention_map(self, features: Tensor) -> Tensor:
        """Return $A$, ``(B, HW, HW)``, float32: row i tells where position i looks, and sums to 1."""
        self._check(features)
        return self._explicit(_tokens(self.query(features)), _tokens(self.key(features)))

    def _explicit(self, query: Tensor, key: Tensor) -> Tensor:
        scores = (query.squeeze(1) @ key.squeeze(1).transpose(1, 2)).float()
        return (self.attention_scale * scores).softmax(2)

    @torch.no_grad()
    def _entropy(self, query: Tensor, key: Tensor) -> float:
        attention = self._explicit(query, key)
        positions = attention.shape[2]
        entropy = torch.special.entr(attention).sum(2).mean()
        return entropy.item() / math.log(positions) if positions > 1 else 0.0

    def _check(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.in_features:
            raise ValueError(f"features must have shape (B, {self.in_features}, H, W), got {tuple(features.shape)}")

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"in_features={self.in_features}, reduction={self.reduction}, style={self.style!r}"


def check_attention(attention: Style | None) -> None:
    """Check what a trunk is given as its attention.

    Raises:
        ValueError: If it is neither None nor a style.
    """
    if attention is not None and attention not in get_args(Style):
        raise ValueError(f"attention must be None or one of {', '.join(get_args(Style))}, got {shown(attention)}")


def attention_of_level(
    level: Literal["local", "global"], channels: int, style: Style | None, collect_stats: bool | None
) -> nn.Module:
    """Return the attention of a feature level, with SOLAR's reduction where it divides the channels, or the identity.

    Args:
        level: Level of the map.
        channels: Channels of the map.
        style: Style of the attention; "printed" has no reduction. None: no attention.
        collect_stats: Whether to collect statistics, as in PML.
    """
    if style is None:
        return nn.Identity()
    reduction = 1 if style == "printed" else _SOLAR_REDUCTIONS[level]
    reduction = reduction if channels % reduction == 0 else 1
    return SecondOrderAttention(channels, reduction, style, collect_stats=collect_stats)


def _normalized_map(in_features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_features, width, 1), nn.BatchNorm2d(width), nn.ReLU())


def _tokens(x: Tensor) -> Tensor:
    """Return (B, C, H, W) as (B, 1, HW, C), in one piece of memory: the fused kernels need that to save any."""
    return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)
