"""Nearest neighbors of embeddings: search, graphs, k-reciprocal groups, and what refines embeddings with them."""

from pml_ext.neighbors.graph import knn_graph
from pml_ext.neighbors.reciprocal import neighbor_groups
from pml_ext.neighbors.refinement import refine_with_neighbors

__all__ = ["knn_graph", "neighbor_groups", "refine_with_neighbors"]
