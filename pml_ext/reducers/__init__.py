"""Reducers: from the losses of elements, pairs or triplets to one number."""

from pml_ext.reducers.batch_average_reducer import BatchAverageReducer

__all__ = ["BatchAverageReducer"]
