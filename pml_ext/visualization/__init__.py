"""Pictures of retrieval: galleries and curves. Matplotlib is imported where it is used."""

from pml_ext.visualization.curves import plot_curves
from pml_ext.visualization.gallery import retrieval_gallery

__all__ = ["plot_curves", "retrieval_gallery"]
