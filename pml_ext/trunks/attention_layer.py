"""One round of messages between samples: attention, projection, feed-forward (IBC)."""

import math
import warnings

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch_geometric calls it
    from torch_geometric.nn import MessagePassing
    from torch_geometric.utils import scatter, to_dense_batch


class AttentionLayer(nn.Module):
    """Post-norm transformer layer whose attention runs over a graph.

    Args:
        embedding_size: D.
        heads: h, divides D.
        dropout: Dropout of attention weights, messages and the feed-forward part, 0 to 1.
        null_message: Whether attention has one more sender, with score 0 and message 0.
    """

    def __init__(self, embedding_size: int, heads: int, dropout: float, null_message: bool) -> None:
        super().__init__()
        self.attend = DotAttention(embedding_size, heads, dropout, null_message)
        self.out = nn.Linear(embedding_size, embedding_size)
        self.linear1 = nn.Linear(embedding_size, 4 * embedding_size)
        self.linear2 = nn.Linear(4 * embedding_size, embedding_size)
        self.norm1 = nn.LayerNorm(embedding_size)
        self.norm2 = nn.LayerNorm(embedding_size)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters afresh: attention and its projection by Xavier's rule, without bias."""
        self.attend.reset_parameters()
        for module in (self.linear1, self.linear2, self.norm1, self.norm2):
            module.reset_parameters()
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, edge_index: Tensor | None, batch: Tensor | None) -> Tensor:
        """Return the new embeddings, ``(B, D)``; without ``edge_index`` over complete graphs."""
        gathered = self.attend.dense(x, batch) if edge_index is None else self.attend(x, edge_index)
        x = self.norm1(x + self.dropout(self.out(gathered)))
        forwarded: Tensor = self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu()))))
        return forwarded


class DotAttention(MessagePassing):
    r"""Scaled dot product attention over senders, on a graph or, faster, on complete ones.

    $$m_i = \sum_j \frac{\exp s_{ij}}{1 + \sum_{j'} \exp s_{ij'}} v_j, \qquad s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}}$$

    for each head of width d = D / h; the 1 stands for the null message. A node without senders gets a zero message.

    Args:
        embedding_size: D.
        heads: h, divides D.
        dropout: Dropout of the weights.
        null_message: Whether there is the 1.
    """

    def __init__(self, embedding_size: int, heads: int, dropout: float, null_message: bool) -> None:
        super().__init__(aggr="add", node_dim=0)
        self.heads = heads
        self.dropout = dropout
        self.null_message = null_message
        self.query = nn.Linear(embedding_size, embedding_size)
        self.key = nn.Linear(embedding_size, embedding_size)
        self.value = nn.Linear(embedding_size, embedding_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the three maps by Xavier's rule, without bias."""
        super().reset_parameters()
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return the messages, ``(B, D)``, along edges from ``edge_index[0]`` to ``edge_index[1]``."""
        query, key, value = (
            linear(x).view(len(x), self.heads, x.shape[1] // self.heads)
            for linear in (self.query, self.key, self.value)
        )
        scores = self.edge_updater(edge_index, query=query, key=key)  # (E, h)
        weights = self._normalize(scores, edge_index[1], len(x))
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        gathered: Tensor = self.propagate(edge_index, value=value, weights=weights, size=(len(x), len(x)))
        return gathered.flatten(1)

    def edge_update(self, query_i: Tensor, key_j: Tensor) -> Tensor:
        return (query_i * key_j).sum(2) / math.sqrt(query_i.shape[2])

    def message(self, value_j: Tensor, weights: Tensor) -> Tensor:
        return value_j * weights.unsqueeze(2)

    def dense(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the messages on the complete graph with self loops, or on that of each mini-batch."""
        dropout = self.dropout if self.training else 0.0
        x, mask = _in_batches(x, batch)
        query, key, value = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        if self.null_message:  # one more sender: score 0 = q . 0, message 0
            key, value = (nn.functional.pad(sent, (0, 0, 0, 1)) for sent in (key, value))
        seen = None if mask is None else self._seen(mask)
        gathered = nn.functional.scaled_dot_product_attention(query, key, value, seen, dropout)
        gathered = gathered.transpose(1, 2).flatten(2)  # (G, N, D)
        return gathered.flatten(0, 1) if mask is None else gathered[mask]

    @torch.no_grad()
    def attention(self, x: Tensor) -> Tensor:
        """Return the weights on the complete graph, ``(h, B, B)``; rows receive, and sum to at most 1."""
        query, key = (self._split(linear(x[None]))[0] for linear in (self.query, self.key))
        scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[2])
        if self.null_message:
            scores = nn.functional.pad(scores, (0, 1))
        weights = scores.softmax(2)
        return weights[:, :, : len(x)]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2)  # (G, h, N, D / h)

    def _seen(self, mask: Tensor) -> Tensor:
        """Return which senders a graph has, ``(G, 1, 1, N)``; the null message is always there."""
        seen = nn.functional.pad(mask, (0, 1), value=True) if self.null_message else mask
        return seen[:, None, None]

    def _normalize(self, scores: Tensor, receiver: Tensor, num_nodes: int) -> Tensor:
        """Return the softmax over the senders of each node, with the null message's 1 in the denominator."""
        highest = scatter(scores.detach(), receiver, 0, num_nodes, reduce="max")
        if self.null_message:
            highest = highest.clamp_min(0)  # the null message's score
        exponentials = (scores - highest[receiver]).exp()
        total = scatter(exponentials, receiver, 0, num_nodes, reduce="sum")
        if self.null_message:
            total = total + (-highest).exp()
        return exponentials / total[receiver]


def _in_batches(x: Tensor, batch: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the nodes as ``(G, N, D)``, and which of them are nodes where mini-batches differ in size."""
    if batch is None or not len(x):
        return x[None], None
    present = torch.unique_consecutive(batch, return_inverse=True)[1]  # room is made for numbers that are there
    dense, mask = to_dense_batch(x, present)
    return (dense, None) if bool(mask.all()) else (dense, mask)
