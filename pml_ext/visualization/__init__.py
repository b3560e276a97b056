"""Pictures of retrieval: galleries, curves, attention, masks. Matplotlib is imported where it is used."""

from pml_ext.visualization.attention import attention_overlay
from pml_ext.visualization.curves import plot_curves
from pml_ext.visualization.gallery import retrieval_gallery
from pml_ext.visualization.masks import mask_grid
from pml_ext.visualization.message_attention import batch_attention
from pml_ext.visualization.report import retrieval_report

__all__ = ["attention_overlay", "batch_attention", "mask_grid", "plot_curves", "retrieval_gallery", "retrieval_report"]
