"""Losses over very many proxies or pairs, exactly, a chunk at a time. Plain tensor functions."""

from pml_ext.streaming.class_margins import ClassMargins
from pml_ext.streaming.margin_softmax import margin_softmax_loss
from pml_ext.streaming.multi_similarity import multi_similarity_loss
from pml_ext.streaming.proxy_anchor import proxy_anchor_loss

__all__ = ["ClassMargins", "margin_softmax_loss", "multi_similarity_loss", "proxy_anchor_loss"]
