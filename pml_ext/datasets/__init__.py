"""Data sets that need no download."""

from pml_ext.datasets.glyphs import Glyphs

__all__ = ["Glyphs"]
