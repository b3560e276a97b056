"""The networks of the recipes, from their settings."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from pml_ext.recipes.settings import Settings
from pml_ext.trunks.attention_ensemble import AttentionEnsemble
from pml_ext.trunks.conv_net import ConvNet
from pml_ext.trunks.global_local_trunk import GlobalLocalTrunk
from pml_ext.trunks.global_pool import GlobalPool2d
from pml_ext.trunks.model_names import check_model_name
from pml_ext.trunks.pooled_trunk import PooledTrunk

_FEATURES = {"features_only": True}
_POOLING_OF_TIMM = {"avg+max": "avgmax"}  # half of the sum; embeddings are normalized behind it
_REFUSED = (TypeError, AssertionError, KeyError, NotImplementedError, RuntimeError, ValueError)  # by timm, an option


def pooled_trunk(settings: Settings, num_learners: int = 1, attention: Any = None) -> PooledTrunk:
    """Return a backbone with pooling and a linear map."""
    backbone, options = _backbone(settings)
    return PooledTrunk(
        backbone,
        settings.embedding_size,
        attention=attention,
        pool_type=settings.pool_type,
        num_learners=num_learners,
        **options,
    )


def global_local_trunk(settings: Settings, attention: Any) -> GlobalLocalTrunk:
    """Return a backbone with a local and a global head."""
    backbone, options = _backbone(settings)
    if isinstance(backbone, ConvNet):
        backbone, options = backbone.two_levels(), {"feature_channels": (2 * settings.width, 4 * settings.width)}
    return GlobalLocalTrunk(
        backbone, settings.embedding_size, attention=attention, pool_type=settings.pool_type, **options
    )


def attention_ensemble(settings: Settings, num_learners: int) -> AttentionEnsemble:
    """Return learners with a mask each."""
    if settings.split is not None and settings.backbone == "convnet":
        raise ValueError(f"split must be None for the backbone 'convnet', got {settings.split!r}")
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
    backbone, options = _whole(settings)
    return AttentionEnsemble.from_backbone(
        backbone,
        settings.split,
        num_learners,
        settings.embedding_size,
        input_size=size,
        **options,
    )


def _whole(settings: Settings) -> tuple[str | nn.Module, dict[str, Any]]:
    """Return a network that pools for itself, and its options."""
    form = {"num_classes": 0}  # not features_only, which more networks know
    weights = {name: settings[name] for name in ("pretrained", "weights")}
    google = settings.backbone == "googlenet"  # torchvision's
    backbone, options = ("googlenet", weights) if google else _backbone(settings, form)
    if settings.pool_type == "avg":  # as networks have it
        return backbone, options
    if google or not isinstance(backbone, str):
        raise ValueError(f"pool_type must be 'avg' for the backbone {settings.backbone!r}, got {settings.pool_type!r}")
    pooling = {"global_pool": _POOLING_OF_TIMM.get(settings.pool_type, settings.pool_type)}
    made_with = {name: value for name, value in options.items() if name not in weights}
    try:
        _without_memory(backbone, made_with | form | pooling)
    except _REFUSED as error:
        rule = f"one that timm's {backbone} has, or 'avg', for learners with masks"
        raise ValueError(f"pool_type must be {rule}, got {settings.pool_type!r}") from error
    return backbone, options | pooling


def _backbone(settings: Settings, form: Mapping[str, Any] = _FEATURES) -> tuple[str | nn.Module, dict[str, Any]]:
    """Return a module, or the name of a timm model and what it is made with; ``form``: what trunks give timm, too."""
    if settings.module is not None:
        return settings.module, {"weights": settings.weights}
    if settings.backbone == "convnet":
        return _conv_net(settings), {}
    check_model_name(settings.backbone, others=("convnet",))
    return settings.backbone, {name: settings[name] for name in ("pretrained", "weights")} | _timm_options(
        settings, form
    )


def _conv_net(settings: Settings) -> ConvNet:
    if settings.pretrained:
        raise ValueError("pretrained must be False for the backbone 'convnet', which has no weights, got True")
    if settings.weights is not None:
        got = settings.weights if isinstance(settings.weights, str) else "a state dict"
        raise ValueError(f"weights must be None or a run's folder for the backbone 'convnet', got {got}")
    return ConvNet(settings.in_channels, settings.width)


def _timm_options(settings: Settings, form: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a timm model is made with: the size of images where it has one, a stride of 8 for small images."""
    options: dict[str, Any] = {"in_chans": settings.in_channels}
    of_size = {"img_size": settings.image_size}
    usual: dict[str, list[dict[str, Any]]] = {"small": [{"output_stride": 8}, of_size | {"patch_size": 4}]}
    if settings.preset in ("small", "finetune"):
        check_model_name(settings.backbone, others=("convnet",))
        for more in usual.get(settings.preset, [of_size]):
            try:
                _without_memory(settings.backbone, {**options, **more, **form})
            except _REFUSED:
                continue  # not one of its options
            return options | more
    return options


def _without_memory(name: str, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **options)
