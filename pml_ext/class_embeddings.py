"""Descriptions of classes from a second modality: text, or any features of samples."""

from collections.abc import Mapping, Sequence, Set
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pml_ext.extras import comes_with
from pml_ext.validation import as_tensor

__all__ = ["from_samples", "from_text"]

_NGRAMS = 4096


def from_text(
    names: Sequence[str | None],
    model: str | Path = "all-MiniLM-L6-v2",
    template: str = "{}",
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Tensor:
    """Return an embedding of each class's text.

    Args:
        names: A text for each class, C >= 1. None, or an empty text: a class without description, a row of NaN.
        model: A model of sentence-transformers: its name on the model hub, which is downloaded once; a local folder;
            or the name of an installed package that contains such a folder. Or "tfidf": no model, but how often
            character n-grams of length 2 to 4 occur, the 4096 most frequent ones weighted by rarity; related words
            are close only where they share letters.
        template: What the model reads; the text replaces ``{}``, e.g. "a photo of a {}".
        batch_size: Texts that the model reads at once. A progress bar shows for more than 50 batches.
        device: Where the model runs; None: sentence-transformers chooses.

    Returns:
        ``(C, E)``, float32, on the CPU, rows of length 1.

    Raises:
        TypeError: If ``names`` is a single string, a dictionary or a set, or one is neither a string nor None.
        ValueError: If there is no text, or ``template`` has no ``{}``.
        ImportError: If sentence-transformers is not installed; the message names the extra.

    Examples:
        >>> rows = from_text(["small letter a", "small letter b", "digit one", None], model="tfidf")
        >>> bool(rows[0] @ rows[1] > rows[0] @ rows[2]), rows[3].isnan().all().item()
        (True, True)
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of strings, one for each class, got the string {names!r}")
    if isinstance(names, Mapping | Set):
        rule = "names must be a sequence of strings, one for each class in the order of the labels"
        hint = ", such as [texts[name] for name in dataset.class_names]" if isinstance(names, Mapping) else ""
        raise TypeError(f"{rule}{hint}, got a {type(names).__name__}")
    names = list(names)
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names must be strings or None, got {name!r}")
    if "{}" not in template:
        raise ValueError(f"template must contain {{}}, got {template!r}")
    described = [i for i, name in enumerate(names) if name is not None and name.strip()]
    if not described:
        raise ValueError(f"names must contain at least one text, got {len(names)} without any")
    texts = [template.replace("{}", str(names[i])) for i in described]
    encoded = _tfidf(texts) if model == "tfidf" else _encode(texts, model, batch_size, device)
    rows = torch.full((len(names), encoded.shape[1]), torch.nan)
    rows[described] = torch.nn.functional.normalize(encoded)
    return rows


def from_samples(features: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    """Return the mean features of each class, for instance of pen strokes or sounds.

    Args:
        features: ``(N, ...)``, one description for each sample, floating point or integer; flattened. Samples whose
            features contain NaN do not count.
        labels: ``(N,)``, integers >= 0.
        num_classes: C. None: the largest label + 1.

    Returns:
        ``(C, E)``, float32 or float64; NaN for a class without sample.

    Raises:
        TypeError: If ``features`` are not numbers or ``labels`` no integers.
        ValueError: If lengths differ, there is no sample, or a label is negative or not below ``num_classes``.

    Examples:
        >>> from_samples(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 5.0]]), torch.tensor([0, 0, 2]))
        tensor([[2., 3.],
                [nan, nan],
                [5., 5.]])
    """
    features, labels = as_tensor("features", features), as_tensor("labels", labels)
    if features.is_complex() or features.dtype == torch.bool:
        raise TypeError(f"features must have a floating point or integer dtype, got {features.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must have an integer dtype, got {labels.dtype}")
    if labels.ndim != 1 or features.ndim < 1 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features and labels must have one row for each sample, got shapes {tuple(features.shape)}, "
            f"{tuple(labels.shape)}"
        )
    if num_classes is not None and (not isinstance(num_classes, Integral) or num_classes < 1):
        raise ValueError(f"num_classes must be None or an integer >= 1, got {num_classes}")
    labels = labels.long()  # uint64 has no minimum
    low, high = int(labels.min()), int(labels.max())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be >= 0 and < num_classes = {num_classes}, got {low if low < 0 else high}")
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32
    features = features.to(dtype).flatten(1) if features.ndim > 1 else features.to(dtype)[:, None]
    known = ~features.isnan().any(1)
    features, labels = features[known], labels.to(features.device)[known]
    total = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return total / labels.bincount(minlength=num_classes)[:, None]  # 0 / 0 is NaN


def _tfidf(texts: list[str]) -> Tensor:
    from sklearn.feature_extraction.text import TfidfVectorizer  # on use: scikit-learn

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), max_features=_NGRAMS, sublinear_tf=True)
    return torch.from_numpy(vectorizer.fit_transform(texts).toarray()).float()


def _encode(texts: list[str], model: str | Path, batch_size: int, device: Any) -> Tensor:
    with comes_with("text", "sentence-transformers", "from_text", ', or use model="tfidf"'):
        from sentence_transformers import SentenceTransformer  # on use: it comes with an extra
    encoder = SentenceTransformer(_model_path(model), device=None if device is None else str(device))
    show = len(texts) > 50 * batch_size
    encoded = encoder.encode(texts, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=show)
    return torch.from_numpy(encoded).float()


def _model_path(model: str | Path) -> str:
    """Return the folder of a model that an installed package contains, else ``model``."""
    name = str(model)
    if Path(name).exists():
        return name
    module = name.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:  # not installed, or a module without a folder of its own
        return name
    folders = sorted(
        f for p in spec.submodule_search_locations for f in Path(p).rglob("modules.json")
    )  # of saved models
    return str(folders[0].parent) if folders else name
