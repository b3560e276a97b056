"""Messages between the samples of a batch, for training only (IBC)."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pml_ext.modes import in_mode
from pml_ext.pml_internals import ModuleWithRecords
from pml_ext.refused import leaves_no_trace_where_refused
from pml_ext.trunks.attention_layer import AttentionLayer
from pml_ext.validation import as_number, check_count, check_edge_index, check_embeddings, check_mini_batches

Output = Literal["last", "cat"]

# Parts of parameter names in the authors' released weights to ours; the rest of a layer's names are the same.
_IBC_NAMES = {
    "dim_red.": "input.",
    "gnn_model.node_model.layers.": "layers.",
    ".att.q_linear.": ".attend.query.",
    ".att.k_linear.": ".attend.key.",
    ".att.v_linear.": ".attend.value.",
    ".att.out.": ".out.",
}


class IntraBatchRefiner(ModuleWithRecords):
    r"""Refine each embedding by messages from the other samples of its batch.

    L layers of multi-head attention over senders j (h heads, of width $d = D / h$), a projection, and a feed-forward
    part of width 4 D, each with a residual and LayerNorm after it:

    $$m_i = W_o \Big[ \sum_j \frac{\exp s_{ij}}{1 + \sum_{j'} \exp s_{ij'}} v_j \Big]_\text{heads}, \qquad
    s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}}$$

    $$y_i = \mathrm{LN}(x_i + m_i), \qquad x'_i = \mathrm{LN}(y_i + W_2 [W_1 y_i]_+)$$

    Without ``edge_index`` attention is computed densely, as one fused product, else along edges.

    It belongs in a loss (``IntraBatchLoss``): gradients then depend on the whole batch, and at test time the
    trunk's embeddings are used as they are.

    Args:
        embedding_size: D >= 1.
        num_layers: L >= 1.
        heads: h >= 1, divides D.
        dropout: Dropout of attention weights, messages and the feed-forward part, 0 to 1.
        null_message: Whether the denominator has the 1: a sender with score 0 and message 0.
        output: "last" layer's embeddings, or all layers' side by side ("cat").
        input_projection: Whether a linear map D to D comes first, as in the authors' code.
        collect_stats: Whether to collect statistics, as in PML. With statistics, ``self_weight`` is the mean weight
            that a sample of the last batch gives to itself in the last layer, and ``null_weight`` what it leaves to the
            null message; without ``edge_index`` and ``batch`` only.

    Attributes:
        in_features: D.
        out_features: D, or L * D with "cat".
        layers: The layers.

    Shape:
        - embeddings: ``(B, D)``, floating point. edge_index: ``(2, E)``, integers. batch: ``(B,)``, sorted integers.
        - output: ``(B, D)``, or ``(B, L * D)`` with "cat".

    Raises:
        TypeError: If embeddings are not a floating point tensor, ``edge_index`` or ``batch`` no integers, or
            ``dropout`` no number or one that requires a gradient.
        ValueError: If an argument or a shape breaks a rule; the message names it.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> refiner = IntraBatchRefiner(embedding_size=8).eval()
        >>> embeddings = torch.randn(4, 8)
        >>> refined = refiner(embeddings)
        >>> everyone = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T  # the complete graph, edge by edge
        >>> refined.shape, torch.allclose(refiner(embeddings, edge_index=everyone), refined, atol=1e-5)
        (torch.Size([4, 8]), True)

    Source:
        Seidenschwarz, Elezi, Leal-Taixe: "Learning Intra-Batch Connections for Deep Metric Learning", ICML 2021, and
        the authors' code, which has the 1 in the denominator; the paper prints an ordinary softmax
        (``null_message=False``). Released weights load after ``rename_ibc_weights``.
    """

    def __init__(
        self,
        embedding_size: int,
        num_layers: int = 1,
        heads: int = 2,
        dropout: float = 0.1,
        null_message: bool = True,
        output: Output = "last",
        input_projection: bool = True,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(collect_stats=collect_stats)
        if output not in get_args(Output):
            raise ValueError(f"output must be one of {', '.join(get_args(Output))}, got {output!r}")
        for name, number in (("embedding_size", embedding_size), ("num_layers", num_layers), ("heads", heads)):
            check_count(name, number)
        if embedding_size % heads:
            raise ValueError(f"heads must divide embedding_size = {embedding_size}, got {heads}")
        dropout = as_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in 0 to 1, 1 excluded, got {dropout}")
        self.in_features = embedding_size
        self.out_features = num_layers * embedding_size if output == "cat" else embedding_size
        self.num_layers = num_layers
        self.heads = heads
        self.null_message = null_message
        self.output = output
        self.input = nn.Linear(embedding_size, embedding_size) if input_projection else nn.Identity()
        self.layers = nn.ModuleList(
            AttentionLayer(embedding_size, heads, dropout, null_message) for _ in range(num_layers)
        )
        self.record("in_features", "num_layers", "heads", statistics=["self_weight", "null_weight"])

    def reset_parameters(self) -> None:
        """Draw all parameters afresh."""
        for module in (self.input, *self.layers):
            if not isinstance(module, nn.Identity):
                module.reset_parameters()

    @leaves_no_trace_where_refused
    def forward(self, embeddings: Tensor, edge_index: Tensor | None = None, batch: Tensor | None = None) -> Tensor:
        """Return the refined embeddings.

        Args:
            embeddings: ``(B, D)``, of length 1 as ``IntraBatchLoss`` gives them.
            edge_index: ``(2, E)``: messages go from samples ``edge_index[0]`` to ``edge_index[1]``. None: everyone
                sends to everyone, itself included. A sample without senders gets a zero message.
            batch: ``(B,)``, sorted: the mini-batch of each sample, for several in one call. Without ``edge_index``,
                messages stay inside a mini-batch.
        """
        self._check(embeddings, edge_index, batch)
        edge_index, batch = (None if x is None else x.long() for x in (edge_index, batch))
        x, outputs = self.input(embeddings), []
        for layer in self.layers:
            if self.collect_stats and layer is self.layers[-1] and edge_index is None and batch is None:
                self._record(x, layer)
            x = layer(x, edge_index, batch)
            outputs.append(x)
        return torch.cat(outputs, 1) if self.output == "cat" else x

    @torch.no_grad()
    def attention_weights(self, embeddings: Tensor) -> Tensor:
        """Return the attention weights of a batch, ``(L, h, B, B)``: rows receive, columns send.

        Rows sum to 1 less what the null message gets. Without dropout. The embeddings should have length 1, as
        ``IntraBatchLoss`` gives them.
        """
        self._check(embeddings, None, None)
        x, weights = self.input(embeddings), []
        with in_mode(self):
            for layer in self.layers:
                weights.append(layer.attend.attention(x))  # type: ignore[operator, union-attr]
                x = layer(x, None, None)
        return torch.stack(weights)

    @torch.no_grad()
    def _record(self, x: Tensor, layer: Any) -> None:
        if len(x):
            weights = layer.attend.attention(x)
            self.self_weight = weights.diagonal(dim1=1, dim2=2).mean().item()
            self.null_weight = 1 - weights.sum(2).mean().item()

    def _check(self, embeddings: Tensor, edge_index: Tensor | None, batch: Tensor | None) -> None:
        check_embeddings("embeddings", embeddings, self.in_features)
        if edge_index is not None:
            check_edge_index(edge_index, len(embeddings))
        if batch is not None:
            check_mini_batches(batch, len(embeddings))

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"in_features={self.in_features}, heads={self.heads}, null_message={self.null_message}, "
            f"output={self.output!r}"
        )


def rename_ibc_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the authors' released weights under the names of ``IntraBatchRefiner``.

    Classifier and batch norm (``fc``, ``bottleneck``) are left out: they belong to the loss.

    Args:
        state_dict: Weights of the authors' ``GNNReID``.

    Examples:
        >>> list(rename_ibc_weights({"gnn_model.node_model.layers.0.att.q_linear.bias": torch.zeros(2)}))
        ['layers.0.attend.query.bias']
    """
    renamed = {}
    for name, x in state_dict.items():
        if name.split(".")[0] in ("fc", "bottleneck"):
            continue
        for theirs, ours in _IBC_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = x
    return renamed
