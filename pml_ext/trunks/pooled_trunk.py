"""The usual network of metric learning: backbone, pooling, one linear map."""

from typing import Any

from torch import Tensor, nn

from pml_ext.learners import split_learners
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
from pml_ext.trunks.second_order_attention import Style, attention_of_level, check_attention
from pml_ext.validation import check_count


class PooledTrunk(ModuleWithRecords):
    r"""Pool a backbone's last feature map and map it linearly to the embedding: the plain head of metric learning.

    $$e(x) = W \, \mathrm{pool}(F(x)) + b$$

    $F$: the last feature map, after second-order attention, if there is any. The embedding is not normalized: PML's
    distances do that. For an ensemble without masks it is: each learner's slice of ``num_learners`` has length 1.

    Args:
        backbone: Name of a timm model (``timm.list_models()``), or a module that returns one feature map
            ``(B, C, H, W)``.
        embedding_size: Size of the embedding, a multiple of ``num_learners``.
        pretrained: Whether timm downloads weights of the backbone.
        attention: Style of ``SecondOrderAttention`` before pooling, as on the global level of ``GlobalLocalTrunk``:
            "printed", "solar" or "normalized" (these with SOLAR's reduction, 2), or None.
        pool_type: Kind of pooling, as in ``GlobalPool2d``.
        num_learners: Number of slices of the embedding, each of which is normalized by itself, >= 1. With 1, the
            embedding is not normalized.
        feature_channels: C; needed for a module without timm's ``num_features``.
        collect_stats: Whether to collect statistics, as in PML.
        weights: Weights of the backbone, all names of which must fit: a file (``.pth``, ``.safetensors``), a state
            dict, or "installed", for "tf_efficientnet_lite0" with the extra ``pretrained``.
        **timm_kwargs: Passed to ``timm.create_model``: ``in_chans=1`` for grayscale, ``output_stride=8`` for small
            images, as in ``GlobalLocalTrunk``.

    Attributes:
        out_features: ``embedding_size``, as in timm.
        backbone: The network without its head.
        attention: The attention block, or the identity.
        pool: The pooling.
        linear: $W$ and $b$.

    Shape:
        - images: ``(B, in_chans, H, W)``. Output: ``(B, embedding_size)``.

    Raises:
        TypeError: If ``backbone`` is neither name nor module, or timm's model has no such argument.
        ValueError: If an argument breaks a rule, or the backbone does not return one map with positions.

    Examples:
        >>> import torch
        >>> trunk = PooledTrunk("resnet18", embedding_size=64, in_chans=1, output_stride=8)
        >>> trunk(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 64])
        >>> sliced = PooledTrunk(nn.Conv2d(3, 6, 3), 8, num_learners=2, feature_channels=6)(torch.randn(2, 3, 9, 9))
        >>> torch.allclose(sliced.view(2, 2, 4).norm(dim=2), torch.ones(2, 2))
        True

    Source:
        Not from a paper; this is the head of the field's baselines. Initialization is PyTorch's.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        embedding_size: int = 512,
        pretrained: bool = False,
        attention: Style | None = None,
        pool_type: PoolType = "avg",
        num_learners: int = 1,
        feature_channels: int | None = None,
        collect_stats: bool | None = None,
        weights: Weights = None,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__(collect_stats=collect_stats)
        check_count("num_learners", num_learners)
        check_count("embedding_size", embedding_size)
        if embedding_size % num_learners:
            rule = f"a multiple of num_learners = {num_learners}"
            raise ValueError(f"embedding_size must be {rule}, got {embedding_size}")
        check_attention(attention)
        check_backbone(backbone)
        if isinstance(backbone, str):
            check_model_name(backbone)
            backbone = _LastMap(backbone, pretrained, weights, timm_kwargs)
        else:
            refuse_timm_options(pretrained, timm_kwargs)
            load_weights(backbone, weights)
        if feature_channels is None:
            if not isinstance(getattr(backbone, "num_features", None), int):
                raise ValueError("feature_channels must be given for a backbone without num_features, got None")
            feature_channels = int(backbone.num_features)  # type: ignore[arg-type]
        self.backbone = backbone
        self.attention = attention_of_level("global", feature_channels, attention, collect_stats)
        self.pool = GlobalPool2d(pool_type, collect_stats=collect_stats)
        self.linear = nn.Linear(feature_channels, embedding_size)
        self.out_features = embedding_size
        self.num_learners = num_learners
        self.record("out_features", "num_learners")

    @leaves_no_trace_where_refused
    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings."""
        embeddings: Tensor = self.linear(self.pool(self.attention(self.feature_map(images))))
        if self.num_learners == 1:
            return embeddings
        with full_precision(images.device):  # in float16 the norm of a row of zeros would give NaN
            slices = split_learners(upcast_half(embeddings), self.num_learners)
            return nn.functional.normalize(slices, dim=2).flatten(1).to(embeddings.dtype)

    @leaves_no_trace_where_refused
    def feature_map(self, images: Tensor) -> Tensor:
        """Return the backbone's last feature map, ``(B, C, H, W)``.

        Raises:
            ValueError: If it is none, or has no positions.
        """
        features = self.backbone(images)
        if not isinstance(features, Tensor) or features.ndim != 4:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            name, cure = name_of_timm_model(self.backbone), ""
            if hasattr(self.backbone, "pretrained_cfg"):
                cure = f": PooledTrunk({name}), or timm.create_model({name}, num_classes=0, global_pool='')"
            raise ValueError(f"backbone must give one map (B, C, H, W), got {got}{cure}")
        if not features.shape[2] * features.shape[3]:
            raise ValueError(
                f"images must be large enough for the backbone, got {tuple(images.shape)}, which leaves features of "
                f"{tuple(features.shape)}"
            )
        return features


class _LastMap(nn.Module):
    """The last feature map of a timm model, ``(B, C, H, W)``."""

    def __init__(self, name: str, pretrained: bool, weights: Weights, timm_kwargs: dict[str, Any]) -> None:
        super().__init__()
        last = count_levels(name, timm_kwargs) - 1
        model: Any = timm_model(name, pretrained, weights, features_only=True, out_indices=[last], **timm_kwargs)
        self.model = model
        self.num_features: int = model.feature_info.channels()[-1]
        self.channels_last = getattr(model, "output_fmt", None) == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Return the map."""
        features: Tensor = self.model(images)[-1]
        return features.permute(0, 3, 1, 2) if self.channels_last else features
