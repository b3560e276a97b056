"""Networks that turn images into embeddings, and what training them takes.

What needs torch-geometric loads on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pml_ext.trunks.attention_ensemble import AttentionEnsemble
from pml_ext.trunks.backbone_features import BackboneFeatures
from pml_ext.trunks.batch_norm import freeze_batch_norm
from pml_ext.trunks.global_local_trunk import GlobalLocalTrunk
from pml_ext.trunks.global_pool import GlobalPool2d
from pml_ext.trunks.parameter_groups import param_groups
from pml_ext.trunks.pooled_trunk import PooledTrunk
from pml_ext.trunks.second_order_attention import SOLAR_NAMES, SecondOrderAttention

if TYPE_CHECKING:
    from pml_ext.trunks.intra_batch_refiner import IntraBatchRefiner, rename_ibc_weights

__all__ = [
    "SOLAR_NAMES",
    "AttentionEnsemble",
    "BackboneFeatures",
    "GlobalLocalTrunk",
    "GlobalPool2d",
    "IntraBatchRefiner",
    "PooledTrunk",
    "SecondOrderAttention",
    "freeze_batch_norm",
    "param_groups",
    "rename_ibc_weights",
]


def __getattr__(name: str) -> Any:
    if name in ("IntraBatchRefiner", "rename_ibc_weights"):
        return getattr(import_module("pml_ext.trunks.intra_batch_refiner"), name)
    raise AttributeError(f"module 'pml_ext.trunks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
