"""Data sets, and how to open them for zero-shot retrieval: training and test classes are disjoint."""

from pml_ext.datasets.class_subset import ClassSubset
from pml_ext.datasets.glyphs import Glyphs
from pml_ext.datasets.image_arrays import ImageArrays
from pml_ext.datasets.image_folder import ImageFolder
from pml_ext.datasets.image_reader import ImageReader
from pml_ext.datasets.in_shop import InShop
from pml_ext.datasets.retrieval_data import RetrievalData
from pml_ext.datasets.sources import open_data

__all__ = ["ClassSubset", "Glyphs", "ImageArrays", "ImageFolder", "ImageReader", "InShop", "RetrievalData", "open_data"]
