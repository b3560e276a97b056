"""A refiner whose samples say nothing to each other."""

import torch
from torch import Tensor

from pml_ext.trunks.intra_batch_refiner import IntraBatchRefiner


class SilentRefiner(IntraBatchRefiner):
    """The same layers without messages: the control that tells what messages add."""

    def forward(self, embeddings: Tensor, edge_index: Tensor | None = None, batch: Tensor | None = None) -> Tensor:
        """Return the embeddings as refined by what each sample knows of itself."""
        return super().forward(embeddings, embeddings.new_empty(2, 0, dtype=torch.long), batch)
