"""Pictures of retrieval: galleries, curves, attention. Matplotlib is imported where it is used."""

from pml_ext.visualization.attention import attention_overlay
from pml_ext.visualization.curves import plot_curves
from pml_ext.visualization.gallery import retrieval_gallery

__all__ = ["attention_overlay", "plot_curves", "retrieval_gallery"]
