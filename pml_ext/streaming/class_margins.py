"""Margins between classes: from descriptions in a second modality to margins, formed for some classes at a time."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pml_ext.streaming.proxy_chunks import Shard, rows_of
from pml_ext.validation import as_number, as_tensor, check_embeddings, check_settings

ClassMetric = Literal["cosine", "euclidean", "squared_euclidean"]
Kind = Literal["squared", "euclidean", "table"]
_MOST_EXACT = 20_000  # described classes, up to which the largest distance is exact
_ROWS = 1024


class ClassMargins(NamedTuple):
    r"""Margins $m_{yj} = a + b \, d_{yj}$ for two classes that are both described, 0 for the others.

    Attributes:
        table: ``(C, E)``, rows whose squared distance or distance is $d$, zeros for a class that is not described;
            or ``(C, C)``, $d$ itself. ``prepare_embeddings`` and ``prepare_distances`` make them. Of a shard of n
            classes their rows, ``(n, E)``, or the columns that are theirs, ``(C, n)``.
        described: ``(C,)`` or ``(n,)``, bool.
        kind: What ``table`` holds: "squared", "euclidean" or "table".
        constant: $a$.
        slope: $b$.
    """

    table: Tensor
    described: Tensor
    kind: Kind
    constant: float
    slope: float

    def without_gradients(self) -> "ClassMargins":
        """Return the same with plain numbers.

        Raises:
            TypeError: If the table or a number requires a gradient, which it would not get, or is not a number.
        """
        if not isinstance(self.table, Tensor):
            raise TypeError(f"class_margins.table must be a torch.Tensor, got {type(self.table).__name__}")
        if self.table.requires_grad:
            raise TypeError(
                "class_margins.table must not require a gradient, which it would not get, got one that does"
            )
        numbers = {name: as_number(f"class_margins.{name}", getattr(self, name)) for name in ("constant", "slope")}
        return self._replace(**numbers)

    def check(self, num_here: int, num_classes: int) -> None:
        """Check kind, numbers, shapes and dtypes.

        Args:
            num_here: Classes that the proxies are of.
            num_classes: All classes.

        Raises:
            TypeError: If the table is not floating point, or ``described`` not bool.
            ValueError: If a shape is wrong, the kind unknown, or a number not finite.
        """
        if self.kind not in get_args(Kind):
            raise ValueError(f"class_margins.kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        check_settings({}, {f"class_margins.{name}": getattr(self, name) for name in ("constant", "slope")})
        check_embeddings("class_margins.table", self.table)
        if not isinstance(self.described, Tensor) or self.described.dtype != torch.bool:
            got = getattr(self.described, "dtype", type(self.described).__name__)
            raise TypeError(f"class_margins.described must be a bool tensor, got {got}")
        shape: tuple[Any, ...] = (num_here, *self.table.shape[1:])
        if self.kind == "table":
            shape = (num_classes, num_here)
        for name, x, expected in (("table", self.table, shape), ("described", self.described, (num_here,))):
            if x.shape != expected:
                raise ValueError(f"class_margins.{name} must have shape {expected}, got {tuple(x.shape)}")
        if not bool(torch.isfinite(self.table.sum())):
            raise ValueError("class_margins.table must be finite, got NaN or an infinite value")

    def of(self, labels: Tensor, dtype: torch.dtype, scale: float = 1.0, shard: Shard | None = None) -> "BatchMargins":
        """Return the margins of the classes of a batch, ``(B,)``, times ``scale``, against those that are here."""
        return BatchMargins(self, labels, dtype, scale, shard)


class BatchMargins:
    """The rows of ``ClassMargins`` that belong to a batch. What all chunks need is computed once."""

    def __init__(
        self, margins: ClassMargins, labels: Tensor, dtype: torch.dtype, scale: float, shard: Shard | None
    ) -> None:
        self.margins, self.labels = margins, labels
        self.constant, self.slope = margins.constant * scale, margins.slope * scale
        self.described = rows_of(margins.described.to(dtype), labels, shard)[:, None]  # (B, 1)
        if margins.kind == "table":
            return
        self.own = rows_of(margins.table, labels, shard).to(dtype)  # (B, E)
        if margins.kind == "squared":  # |t|^2 + |u|^2 - 2 t.u: the margins are matrix products
            weight = self.constant + self.slope * _square(self.own)[:, None]
            self.weights = torch.cat([weight, torch.full_like(weight, self.slope)], 1) * self.described
            self.own = self.own * (-2 * self.slope)

    def add_to(self, block: Tensor, start: int) -> None:
        """Add the margins against the classes from ``start`` on to ``block``, ``(B, n)``, in place."""
        stop = start + block.shape[1]
        kind, table = self.margins.kind, self.margins.table
        described = self.margins.described[start:stop].to(block.dtype)
        if kind == "squared":
            other = table[start:stop].to(block.dtype)
            block.addmm_(self.own, other.T)  # zeros where one is not described
            block.addmm_(self.weights, torch.stack([described, _square(other)]))
            return
        if kind == "table":
            distances = table[:, start:stop].index_select(0, self.labels).to(block.dtype)
        else:  # not by matrix products, which cancel for classes that are close together
            other = table[start:stop].to(block.dtype)
            distances = torch.cdist(self.own, other, compute_mode="donot_use_mm_for_euclid_dist")
        block += distances.mul_(self.slope).add_(self.constant).mul_(self.described).mul_(described)


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).square_()


def prepare_embeddings(
    class_embeddings: Any, num_classes: int, metric: ClassMetric, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return rows whose squared distances (metric "euclidean": whose distances) are those of the classes.

    Rows are centered: that changes no distance, and keeps differences of large numbers out of the margins.

    Args:
        class_embeddings: ``(C, E)``, a tensor or an array of numbers. A row with NaN, or of zeros, describes nothing.
        num_classes: C.
        metric: "cosine" is 1 - cosine.
        normalize: Whether to divide by the largest distance: exact up to 20,000 described classes; beyond, that of
            20,000 drawn at random, always the same ones.

    Returns:
        ``(C, E)``, with zeros for classes that are not described, and which are, ``(C,)``, bool.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If the shape is wrong, or a number is infinite.
    """
    embeddings = _as_floats("class_embeddings", class_embeddings)
    if embeddings.ndim != 2 or len(embeddings) != num_classes or not embeddings.shape[1]:
        raise ValueError(f"class_embeddings must have shape ({num_classes}, E), got {tuple(embeddings.shape)}")
    described = ~embeddings.isnan().any(1) & embeddings.any(1)
    rows = embeddings.nan_to_num(nan=0.0).double() * described[:, None]
    if metric == "cosine":  # half the squared distance of unit vectors; of any length, so that no square is lost
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        rows = torch.nn.functional.normalize(rows) / 2**0.5
    rounding = (8 * torch.finfo(embeddings.dtype).eps) ** 2 * rows.square().sum(1).max()
    center = rows.sum(0) / described.sum().clamp_min(1)
    rows = (rows - center) * described[:, None]
    largest = _largest_square(rows[described])
    if largest <= rounding:  # all equal: dividing by the largest would blow rounding up
        rows = torch.zeros_like(rows)
    elif normalize:
        rows = rows / largest**0.5
    return rows.to(embeddings.dtype), described


def prepare_distances(class_distances: Any, num_classes: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the matrix, zero where a class is not described, and which are.

    Args:
        class_distances: ``(C, C)``, a tensor or an array of numbers >= 0, zero on the diagonal. A class whose row and
            column are zeros or NaN, but for the diagonal, is not described.
        num_classes: C.
        normalize: Whether to divide by the largest distance.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If the shape is wrong, a number breaks a rule, or a distance between two described classes is NaN.
    """
    distances = _as_floats("class_distances", class_distances)
    if distances.shape != (num_classes, num_classes):
        got = tuple(distances.shape)
        raise ValueError(f"class_distances must have shape ({num_classes}, {num_classes}), got {got}")
    known = distances.nan_to_num(nan=0.0)
    tolerance = 1e-4 * known.max().item()  # for rounding, as in 1 - T @ T.T
    if known.min() < -tolerance:
        raise ValueError(f"class_distances must be >= 0, got {known.min().item()}")
    diagonal = known.diagonal().abs().max().item()
    if diagonal > tolerance:
        raise ValueError(f"class_distances must be zero on the diagonal (distances, not similarities), got {diagonal}")
    distances = distances.clamp_min(0.0)
    others = ~torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    known = distances.nan_to_num(nan=0.0) * others
    described = known.any(1) | known.any(0)
    valid = others & described & described[:, None]
    missing = (distances.isnan() & valid).nonzero()
    if len(missing):
        row, column = missing[0].tolist()
        raise ValueError(
            "class_distances must be NaN for a whole class (its row and column) or not at all, got NaN in row "
            f"{row}, column {column} alone"
        )
    distances = distances.masked_fill(~valid, 0.0)
    if normalize and distances.any():
        distances = distances / distances.max()
    return distances, described


def _largest_square(rows: Tensor) -> float:
    """Return the largest squared distance of two rows, without a matrix of all of them."""
    if len(rows) > _MOST_EXACT:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[order[:_MOST_EXACT].to(rows.device)]
    largest = 0.0
    squares = rows.square().sum(1)
    for start in range(0, len(rows), _ROWS):  # distances are symmetric: from the diagonal on
        block = torch.addmm(squares[start:], rows[start : start + _ROWS], rows[start:].T, alpha=-2)
        largest = max(largest, (block + squares[start : start + _ROWS, None]).max().item())
    return largest


def _as_floats(name: str, x: Any) -> Tensor:
    """Return descriptions of classes as float32 or float64, a copy."""
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(
            f"{name} must not require a gradient, which a buffer does not get, got one that does: .detach()"
        )
    x = as_tensor(name, x)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must have a floating point or integer dtype, got {x.dtype}")
    x = x.clone() if x.dtype == torch.float64 else x.float().clone()
    if x.isinf().any():
        raise ValueError(f"{name} must be finite, or NaN for a class without description, got an infinite value")
    return x
