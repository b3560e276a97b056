"""One embedding from two feature levels of a backbone (MHGL)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pml_ext.pml_internals import ModuleWithRecords
from pml_ext.precision import full_precision, upcast_half
from pml_ext.refused import leaves_no_trace_where_refused
from pml_ext.trunks.backbone_weights import Weights, load_weights, timm_model
from pml_ext.trunks.global_pool import GlobalPool2d, PoolType
from pml_ext.trunks.model_names import (
    check_backbone,
    check_model_name,
    count_levels,
    name_of_timm_model,
    refuse_timm_options,
)
from pml_ext.trunks.second_order_attention import SecondOrderAttention, Style, attention_of_level, check_attention
from pml_ext.validation import check_count


class GlobalLocalTrunk(ModuleWithRecords):
    r"""Put a local head on an early feature level and a global head on a late one, side by side in one embedding.

    Each head has second-order attention, pooling, and a linear map to half of the embedding. The two halves are
    concatenated and normalized once. The global level is computed from the backbone's own features, not from those that
    local attention has changed.

    Args:
        backbone: Name of a timm model (``timm.list_models()``), or a module that returns two feature maps (local,
            global).
        embedding_size: Even, >= 2.
        pretrained: Whether timm downloads weights of the backbone.
        local_level: Which of the backbone's feature levels, counted from the end; ResNet: -2 is conv4, -1 is conv5.
        global_level: Index of the global level, counted in the same way.
        attention: Style of ``SecondOrderAttention``: "printed", "solar" or "normalized" (these with SOLAR's reductions,
            4 and 2), or None.
        pool_type: Kind of pooling, as in ``GlobalPool2d``.
        feature_channels: Channels of the two maps; needed for a module without timm's ``feature_info``.
        collect_stats: Whether to collect statistics, as in PML.
        weights: Weights of the backbone, all names of which must fit: a file (``.pth``, ``.safetensors``), a state
            dict, or "installed", for "tf_efficientnet_lite0" with the extra ``pretrained``.
        **timm_kwargs: Passed to ``timm.create_model``: ``in_chans=1`` for grayscale; ``output_stride=8`` for small
            images, which keeps the maps of a 32 x 32 image at 4 x 4 instead of 2 x 2 and 1 x 1 (ResNets and others with
            dilation); ``img_size`` and ``patch_size`` for vision transformers, whose levels have all the same size.

    Attributes:
        out_features: ``embedding_size``, as in timm.
        backbone: The network without its head.
        local_head: Attention, pooling and linear map.
        global_head: The same for the global level.

    Shape:
        - images: ``(B, in_chans, H, W)``. Output: ``(B, embedding_size)``, rows of length 1.

    Raises:
        TypeError: If ``backbone`` is neither name nor module, or timm's model has no such argument.
        ValueError: If an argument breaks a rule; the message says what is possible.

    Examples:
        >>> trunk = GlobalLocalTrunk("resnet18", embedding_size=64, attention="solar", in_chans=1, output_stride=8)
        >>> embeddings = trunk(torch.randn(2, 1, 32, 32))
        >>> embeddings.shape, torch.allclose(embeddings.norm(dim=1), torch.ones(2))
        (torch.Size([2, 64]), True)

    Source:
        Ebrahimpour, Qian, Beach: "Multi-Head Deep Metric Learning Using Global and Local Representations", WACV 2022.
        Levels, pooling (Eq. 4), sizes and the one normalization are the paper's; that local attention does not feed
        the later layers is our reading. Initialization is PyTorch's: the paper gives none.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        embedding_size: int = 512,
        pretrained: bool = False,
        local_level: int = -2,
        global_level: int = -1,
        attention: Style | None = "printed",
        pool_type: PoolType = "avg+max",
        feature_channels: tuple[int, int] | None = None,
        collect_stats: bool | None = None,
        weights: Weights = None,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__(collect_stats=collect_stats)
        check_count("embedding_size", embedding_size)
        if embedding_size % 2:
            raise ValueError(f"embedding_size must be even and >= 2, got {embedding_size}")
        check_attention(attention)
        check_backbone(backbone)
        if isinstance(backbone, str):
            backbone = _create(backbone, pretrained, weights, (local_level, global_level), timm_kwargs)
        else:
            refuse_timm_options(pretrained, timm_kwargs)
            load_weights(backbone, weights)
        local_channels, global_channels = _two_channels(backbone, feature_channels)
        self.backbone = backbone
        self.out_features = embedding_size
        self.channels_last_maps = getattr(backbone, "output_fmt", None) == "NHWC"

        def head(level: Literal["local", "global"], channels: int) -> nn.Sequential:
            block = attention_of_level(level, channels, attention, collect_stats)
            pool = GlobalPool2d(pool_type, collect_stats=collect_stats)
            return nn.Sequential(block, pool, nn.Linear(channels, embedding_size // 2))

        self.local_head, self.global_head = head("local", local_channels), head("global", global_channels)
        self.local_level, self.global_level = local_level, global_level
        self.record("out_features", "local_level", "global_level")

    @leaves_no_trace_where_refused
    def forward(self, images: Tensor, return_branches: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the embeddings.

        Args:
            images: ``(B, in_chans, H, W)``.
            return_branches: Whether to return the two halves, ``(B, embedding_size / 2)`` each, instead: local, then
                global. Concatenated they are the embeddings.
        """
        maps = self.feature_maps(images)
        halves = [head(features) for head, features in zip((self.local_head, self.global_head), maps, strict=True)]
        with full_precision(images.device):  # in float16 the norm of a row of zeros would give NaN
            embeddings = nn.functional.normalize(upcast_half(torch.cat(halves, 1))).to(halves[0].dtype)
        if return_branches:
            local, glob = embeddings.chunk(2, 1)
            return local, glob
        return embeddings

    @leaves_no_trace_where_refused
    def feature_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the backbone's local and global feature map, ``(B, C, H, W)`` each.

        Raises:
            ValueError: If the backbone gives something else, or a map has no positions.
        """
        maps = self.backbone(images)
        if (
            not isinstance(maps, tuple | list)
            or len(maps) != 2
            or not all(isinstance(x, Tensor) and x.ndim == 4 for x in maps)
        ):
            got = f"of {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"of length {len(maps)}"
            raise ValueError(f"backbone must give two maps (B, C, H, W), got a {type(maps).__name__} {got}")
        local, glob = maps
        if self.channels_last_maps:
            local, glob = local.permute(0, 3, 1, 2), glob.permute(0, 3, 1, 2)
        for level, features in (("local", local), ("global", glob)):
            if not features.shape[2] * features.shape[3]:
                raise ValueError(
                    f"images must be large enough for the {level} level, got {tuple(images.shape)}, which leaves "
                    f"features of {tuple(features.shape)}"
                )
        return local, glob

    @leaves_no_trace_where_refused
    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention that each position of both levels gets, ``(B, H, W)`` each, the mean over positions.

        Raises:
            ValueError: If the trunk has no attention.
        """
        maps = []
        for head, features in zip((self.local_head, self.global_head), self.feature_maps(images), strict=True):
            if not isinstance(head[0], SecondOrderAttention):
                raise ValueError("attention must not be None for attention_maps, got a trunk without attention")
            attention = head[0].attention_map(features).mean(1)
            maps.append(attention.reshape(-1, *features.shape[2:]))
        return maps[0], maps[1]


def _two_channels(backbone: nn.Module, given: tuple[int, int] | None) -> tuple[int, int]:
    """Return the channels of a backbone's two maps, as they are given or as timm describes them."""
    rule = "backbone must return two feature maps, local and global"
    name = name_of_timm_model(backbone)
    cure = f"GlobalLocalTrunk({name}), or timm.create_model({name}, features_only=True, out_indices=(-2, -1))"
    if given is None:
        info: Any = getattr(backbone, "feature_info", None)
        if info is None:
            raise ValueError("feature_channels must be given for a backbone without feature_info, got None")
        if not hasattr(info, "channels"):
            raise ValueError(f"{rule}, got a {type(backbone).__name__}, which returns none: {cure}")
        given = tuple(info.channels())
        if len(given) != 2:
            raise ValueError(f"{rule}, got a {type(backbone).__name__} with {len(given)}: {cure}")
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"feature_channels must be the channels of two maps, (local, global), got {given!r}")
    return given[0], given[1]


def _create(
    name: str, pretrained: bool, weights: Weights, levels: tuple[int, int], timm_kwargs: dict[str, Any]
) -> nn.Module:
    check_model_name(name)
    num_levels = count_levels(name, timm_kwargs)
    for argument, level in zip(("local_level", "global_level"), levels, strict=True):
        if not -num_levels <= level < 0:
            raise ValueError(f"{argument} must lie in {-num_levels} to -1 for {name}, got {level}")
    if levels[0] >= levels[1]:
        raise ValueError(f"local_level must come before global_level, got {levels[0]} and {levels[1]}")
    indices = [num_levels + level for level in levels]
    return timm_model(name, pretrained, weights, features_only=True, out_indices=indices, **timm_kwargs)
