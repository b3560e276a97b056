"""How well embeddings retrieve: exact metrics for any labels, in little memory.

``AccuracyCalculator`` loads on first use (PEP 562), since PML's brings scikit-learn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pml_ext.evaluation.metrics import METRICS, retrieval_metrics

if TYPE_CHECKING:
    from pml_ext.evaluation.accuracy_calculator import AccuracyCalculator

__all__ = ["METRICS", "AccuracyCalculator", "retrieval_metrics"]


def __getattr__(name: str) -> Any:
    if name == "AccuracyCalculator":
        return import_module("pml_ext.evaluation.accuracy_calculator").AccuracyCalculator
    raise AttributeError(f"module 'pml_ext.evaluation' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
