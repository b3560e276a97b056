"""The networks of the recipes."""

from collections import OrderedDict
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pml_ext.recipes.conv_net import ConvNet, TwoLevels
from pml_ext.recipes.pooled_trunk import PooledTrunk
from pml_ext.recipes.settings import Settings
from pml_ext.trunks import AttentionEnsemble, GlobalLocalTrunk, GlobalPool2d
from pml_ext.trunks.model_names import check_model_name, count_levels


def pooled_trunk(settings: Settings, num_learners: int = 1, attention: Any = None) -> PooledTrunk:
    """Return a backbone with pooling and a linear map."""
    return PooledTrunk(_last_map(settings), settings.embedding_size, settings.pool_type, attention, num_learners)


def global_local_trunk(settings: Settings, attention: Any) -> GlobalLocalTrunk:
    """Return a backbone with a local and a global head."""
    if settings.backbone == "convnet":
        network = _conv_net(settings)
        return GlobalLocalTrunk(
            TwoLevels(network),
            settings.embedding_size,
            attention=attention,
            pool_type=settings.pool_type,
            feature_channels=(2 * settings.width, 4 * settings.width),
        )
    return GlobalLocalTrunk(
        settings.backbone,
        settings.embedding_size,
        settings.pretrained,
        attention=attention,
        pool_type=settings.pool_type,
        **_timm_options(settings),
    )


def attention_ensemble(settings: Settings, num_learners: int) -> AttentionEnsemble:
    """Return learners with a mask each."""
    size = (settings.in_channels, settings.image_size, settings.image_size)
    if settings.backbone == "convnet":
        network = _conv_net(settings)
        pool: list[nn.Module] = [GlobalPool2d(settings.pool_type)]
        parts: OrderedDict[str, nn.Module] = OrderedDict([*network.named_children(), ("pool", pool[0])])
        return AttentionEnsemble.from_backbone(
            nn.Sequential(parts),
            split="stage2",
            num_learners=num_learners,
            embedding_size=settings.embedding_size,
            input_size=size,
        )
    options = _timm_options(settings) if settings.backbone != "googlenet" else {}
    return AttentionEnsemble.from_backbone(
        settings.backbone,
        num_learners=num_learners,
        embedding_size=settings.embedding_size,
        pretrained=settings.pretrained,
        input_size=size,
        **options,
    )


class LastMap(nn.Module):
    """The last feature map of a timm model, ``(B, C, H, W)``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.num_features = model.feature_info.channels()[-1]
        self.channels_last = getattr(model, "output_fmt", None) == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Return the map."""
        features: Tensor = self.model(images)[-1]
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def _conv_net(settings: Settings) -> ConvNet:
    if settings.pretrained:
        raise ValueError("pretrained must be False for the backbone 'convnet', which has no weights, got True")
    return ConvNet(settings.in_channels, settings.width, settings.depth)


def _last_map(settings: Settings) -> nn.Module:
    if settings.backbone == "convnet":
        return _conv_net(settings)
    check_model_name(settings.backbone, others=("convnet",))
    options = _timm_options(settings)
    last = count_levels(settings.backbone, options) - 1
    model = timm.create_model(settings.backbone, settings.pretrained, features_only=True, out_indices=[last], **options)
    return LastMap(model)


def _timm_options(settings: Settings) -> dict[str, Any]:
    """Return what a timm model is made with: for small images, a stride of 8 where the model takes that."""
    options: dict[str, Any] = {"in_chans": settings.in_channels}
    if settings.preset == "small":
        check_model_name(settings.backbone, others=("convnet",))
        for more in ({"output_stride": 8}, {"img_size": settings.image_size, "patch_size": 4}):
            try:
                _without_memory(settings.backbone, options | more)
            except (TypeError, AssertionError, NotImplementedError, RuntimeError, ValueError):
                continue  # not one of its options
            return options | more
    return options


def _without_memory(name: str, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, features_only=True, **options)
