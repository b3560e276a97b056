"""Regularizers: what any PML loss takes as its ``embedding_regularizer``."""

from pml_ext.regularizers.divergence_regularizer import DivergenceRegularizer

__all__ = ["DivergenceRegularizer"]
