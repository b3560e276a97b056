"""PML's calculator of metrics, by the exact search of this package."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_metric_learning.utils import accuracy_calculator
from torch import Tensor

from pml_ext.evaluation.class_codes import class_codes
from pml_ext.evaluation.metrics import as_embeddings, averaged, check_together, in_one_dtype, rank_queries
from pml_ext.evaluation.ranking import RANKED
from pml_ext.validation import check_count


class AccuracyCalculator(accuracy_calculator.AccuracyCalculator):
    """PML's ``AccuracyCalculator`` for any labels, in little memory: for its testers and for your own calls.

    The values are PML's, but labels are compared as they are, not as float32, embeddings must be finite, and memory
    does not grow with the number of classes nor with their sizes. R-precision and MAP@R look at R neighbors, whatever
    ``k`` is. PML's ``label_comparison_fn`` and ``knn_func`` are not taken.

    Args:
        include: Names of metrics, as in PML. Empty: all.
        exclude: Names of metrics that are left out.
        avg_of_avgs: Whether to return the mean over classes of the means over their queries.
        return_per_class: Whether to return a list with the mean of each class that has a match, in the order of labels.
        k: Up to which rank "mean_average_precision" and "mean_reciprocal_rank" look: an integer >= 1, "max_bin_count"
            (the most right samples that a query has), or None: to the last.
        device: Where to search. None: cuda if there is one.
        kmeans_func: The k-means function for "NMI" and "AMI", as in PML.
        chunk_size: Number of queries that are searched at a time, as in ``retrieval_metrics``.

    Raises:
        TypeError: If ``include`` or ``exclude`` is not a tuple or list.
        ValueError: If a name or a setting breaks a rule.

    Examples:
        >>> calculator = AccuracyCalculator(include=("precision_at_1",), device=torch.device("cpu"))
        >>> points = torch.tensor([[0.0], [1.0], [1.5], [4.0]])
        >>> calculator.get_accuracy(points, torch.tensor([0, 0, 1, 1]))
        {'precision_at_1': 0.5}
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        avg_of_avgs: bool = False,
        return_per_class: bool = False,
        k: int | str | None = None,
        *,
        device: torch.device | str | None = None,
        kmeans_func: Any = None,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        device = None if device is None else torch.device(device)
        super().__init__(include, exclude, avg_of_avgs, return_per_class, k, device=device, kmeans_func=kmeans_func)
        own = [name for name in self.original_function_dict if name not in (*RANKED, "precision_at_1", "NMI", "AMI")]
        if own:
            raise TypeError(f"a subclass must not add metrics, which PML computes from all neighbors, got {own[0]}")
        self.chunk_size = chunk_size

    def get_accuracy(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the metrics.

        Args:
            query: ``(N, D)``, floating point, finite: a tensor or an array.
            query_labels: ``(N,)``, as in ``retrieval_metrics``.
            reference: ``(M, D)``, what is searched. None: every query searches all other queries.
            reference_labels: ``(M,)``.
            ref_includes_query: Whether the first N rows of the reference are the queries, which do not find themselves.
            include: Names of metrics. Empty: those of the calculator.
            exclude: Names of metrics that are left out.

        Returns:
            A float for each metric, or a list with one for each class.

        Raises:
            TypeError: If embeddings are not floating point, or labels of another kind.
            ValueError: If embeddings are not finite, shapes do not match, no query has a match, or the first rows of
                ``reference`` are not ``query`` where they should be.
        """
        check_together("reference", reference, "reference_labels", reference_labels)
        queries, gallery = as_embeddings("query", query, self.device), None
        if reference is not None:
            gallery = as_embeddings("reference", reference, self.device, queries.shape[1])
            queries, gallery = in_one_dtype(queries, gallery)
        num_gallery = None if gallery is None else len(gallery)
        names_of_labels = ("query_labels", "reference_labels")
        codes = class_codes(query_labels, len(queries), reference_labels, num_gallery, names=names_of_labels)
        if gallery is not None and ref_includes_query:
            count = len(queries)
            first, of_first = gallery[:count], codes.gallery[:count]
            if len(first) < count or not torch.allclose(queries, first) or not torch.equal(codes.queries, of_first):
                raise ValueError(
                    "reference must begin with the rows of query where ref_includes_query=True, got others"
                )
        self.curr_function_dict = self.get_function_dict(include, exclude)
        names = self.get_curr_metrics()
        ranked = [name for name in names if name not in self.requires_clustering()]
        itself = torch.arange(len(queries)) if ref_includes_query else None
        values: dict[str, Any] = {}
        if ranked:
            max_rank = self.k
            if self.k == "max_bin_count":
                sizes = codes.gallery.bincount(minlength=len(codes.classes))
                max_rank = int(sizes[codes.queries].max()) - int(gallery is None or ref_includes_query)
            result = rank_queries(queries, gallery, codes, ranked, itself, max_rank, self.chunk_size)
            average = None if self.return_per_class else "macro" if self.avg_of_avgs else "micro"
            for name, of_query in result.values.items():
                mean = averaged(of_query, result.codes, codes.classes, average)
                values[name] = list(mean.values()) if self.return_per_class else mean
        if len(ranked) < len(names):
            values |= self._clustering(queries, codes.queries, [name for name in names if name not in ranked])
        return {name: values[name] for name in names}

    def _clustering(self, queries: Tensor, codes: Tensor, names: list[str]) -> dict[str, float]:
        clusters = self.get_cluster_labels(queries.float(), codes)
        return {
            name: float(self.curr_function_dict[name](query_labels=codes, cluster_labels=clusters)) for name in names
        }
