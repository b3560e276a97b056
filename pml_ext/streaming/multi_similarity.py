"""Multi-Similarity without a matrix of all pairs."""

from typing import Any

import torch
from torch import Tensor

from pml_ext.streaming.pair_sums import pair_sums
from pml_ext.streaming.pair_tiles import Pairs
from pml_ext.streaming.proxy_chunks import check_chunk_size
from pml_ext.validation import as_number, check_settings, validation_wanted


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    negative_base: float | None = None,
    epsilon: float | None = None,
    normalize: bool = True,
    own: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Return each sample's exact Multi-Similarity loss, in memory that does not grow with the square of the batch.

    $$\ell_i = \frac1\alpha \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (s_{ij} - \lambda)}\Big)
             + \frac1\beta \log\Big(1 + \sum_{j \in N_i} e^{\beta (s_{ij} - \lambda)}\Big)$$

    Forward walks over the pairs once, with ``epsilon`` twice; backward once more. Between them a few numbers for each
    sample are kept.

    Args:
        embeddings: ``(B, D)``, finite. Half precision is raised to float32.
        labels: ``(B,)``, integers.
        ref_emb: ``(R, D)``, what the samples are compared with. They get gradients too. None: the batch itself, in
            which no sample is compared with itself.
        ref_labels: ``(R,)``, their labels.
        alpha: $\alpha$ > 0.
        beta: $\beta$ > 0.
        base: $\lambda$.
        negative_base: $\lambda$ of the second sum. None: ``base``.
        epsilon: Only pairs that PML's ``MultiSimilarityMiner(epsilon)`` finds are in the sums: positives with
            $s - \epsilon$ below the sample's most similar negative, negatives with $s + \epsilon$ above its least
            similar positive. None: all pairs.
        normalize: $s$ is the cosine (True) or the dot product (False).
        own: ``(B,)``, where in the references each sample itself lies, which it is not compared with. None: nowhere.
        chunk_size: Rows and columns of a tile of similarities. None: as many as stay in the cache.

    Returns:
        ``(B,)``, float32, or float64 if an argument is; 0 for a sample without pairs. It has first derivatives only:
        differentiating a gradient raises NotImplementedError.

    Raises:
        TypeError: If an argument has the wrong type or dtype, or a setting requires a gradient, which
            ``MultiSimilarityLoss`` can give.
        ValueError: If a shape or value breaks a rule: ``alpha`` that is not positive, embeddings that are not finite, a
            ``chunk_size`` that is not an integer >= 1.

    Examples:
        >>> multi_similarity_loss(torch.eye(3), torch.tensor([0, 0, 1])).mean()
        tensor(0.4378)
    """
    check_chunk_size(chunk_size)
    given: dict[str, Any] = {"alpha": alpha, "beta": beta, "base": base}
    given["negative_base"] = base if negative_base is None else negative_base
    numbers = {name: as_number(name, setting) for name, setting in given.items()}
    alpha, beta, base, negative_base = numbers.values()
    epsilon = None if epsilon is None else as_number("epsilon", epsilon)
    pairs = Pairs(embeddings, labels, ref_emb, ref_labels, own, normalize)
    if validation_wanted():
        finite = {"base": base, "negative_base": negative_base, "epsilon": 0.0 if epsilon is None else epsilon}
        check_settings({"alpha": alpha, "beta": beta}, finite)
        pairs.check()
    sums = pair_sums(pairs.widened(), -alpha, beta, epsilon, chunk_size, "Multi-Similarity")
    one = sums.positive.new_zeros(())  # log(1)
    pos = torch.logaddexp(sums.positive + alpha * base, one) / alpha
    return pos + torch.logaddexp(sums.negative - beta * negative_base, one) / beta
