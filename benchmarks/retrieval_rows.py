"""What benchmarks/retrieval.py trains, and what is compared with what."""

import json
from itertools import product
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A recipe, its settings, the values that are tried on validation classes, and what is not a setting of the recipe.

    ``tuned``: two settings with two values each, four trials. ``class_embeddings``: None, "given", or "shuffled": those
    of other classes. ``similarity_gain``: a refiner's attention starts as so many times the cosine; 0: as drawn.
    """

    recipe: str
    settings: dict[str, Any]
    tuned: dict[str, tuple[Any, Any]]
    class_embeddings: str | None = None
    similarity_gain: float = 0.0

    def trials(self) -> list[dict[str, Any]]:
        """Return the settings of the four trials."""
        return [dict(zip(self.tuned, values, strict=True)) for values in product(*self.tuned.values())]


_RATES = {"lr": (1e-3, 3e-3)}
_PLAIN = {"levels": "global", "attention": "none", "pool_type": "avg"}
_SOLAR = {"attention": "solar"}
_BASE = _RATES | {"base": (0.5, 1.0)}
_PROXY_WEIGHT = _RATES | {"proxy_weight": (0.03, 0.3)}
_DIVERGENCE = _RATES | {"divergence_weight": (0.1, 1.0)}
_TEMPERATURE = _RATES | {"temperature": (0.1, 0.3)}
_SCALE = {"scale": (16.0, 32.0)}
_MARGIN = _SCALE | {"margin_scale": (0.1, 0.3)}  # of the margin rows, all of which learn at lr 3e-3
_SOFT = {"scale": (4.0, 8.0)}  # below those of the other rows, all of which chose the smaller one
_SOFT_MARGIN = _SOFT | {"margin_scale": (0.3, 1.0)}
_TWELVE_BY_EIGHT = {"samples_per_class": 8}
_LEARNERS = {"num_learners": 4, "refined_weight": 0.0}

ROWS: dict[str, Row] = {
    "contrastive": Row("contrastive", {}, _RATES | {"neg_margin": (0.5, 1.0)}),
    "triplet": Row("triplet", {}, _RATES | {"margin": (0.1, 0.3)}),
    "multi_similarity": Row("multi_similarity", {}, _BASE),
    "proxy_anchor": Row("proxy_anchor", {}, _RATES | {"proxy_lr": (1e-2, 1e-1)}),
    "cosface": Row("cosface", {}, _RATES | {"margin": (0.2, 0.35)}),
    "normalized_softmax": Row("normalized_softmax", {}, _RATES | {"temperature": (0.05, 0.1)}),
    "cross_entropy": Row("cross_entropy", {}, _RATES | {"proxy_lr": (2e-3, 2e-2)}),
    "hybrid": Row("mhgl", _PLAIN, _PROXY_WEIGHT),
    "hybrid, light proxies": Row("mhgl", _PLAIN, _RATES | {"proxy_weight": (0.003, 0.01)}),
    "hybrid, avg+max": Row("mhgl", _PLAIN | {"pool_type": "avg+max"}, _PROXY_WEIGHT),
    "hybrid, avg+max, attention": Row("mhgl", {"levels": "global"} | _SOLAR, _PROXY_WEIGHT),
    "hybrid, two levels": Row("mhgl", {"attention": "none"}, _PROXY_WEIGHT),
    "mhgl": Row("mhgl", _SOLAR, _PROXY_WEIGHT),
    "mhgl, normalized attention": Row("mhgl", {"attention": "normalized"}, _PROXY_WEIGHT),
    "multi_similarity, width 74": Row("multi_similarity", {"width": 74}, _BASE),
    "4 heads": Row("attention_ensemble", {"masks": False, "divergence_weight": 0.0}, _BASE),
    "4 heads, divergence": Row("attention_ensemble", {"masks": False}, _DIVERGENCE),
    "4 learners": Row("attention_ensemble", {"divergence_weight": 0.0}, _BASE),
    "4 learners, divergence": Row("attention_ensemble", {}, _DIVERGENCE),
    "smoothed cross-entropy": Row("intra_batch", {"refined_weight": 0.0}, _TEMPERATURE),
    "refiner without messages": Row("intra_batch", {"messages": False}, _TEMPERATURE),
    "refiner": Row("intra_batch", {}, _TEMPERATURE),
    "refiner, starts with similarity": Row("intra_batch", {}, _TEMPERATURE, similarity_gain=10.0),
    "smoothed cross-entropy, 12 x 8": Row("intra_batch", {"refined_weight": 0.0} | _TWELVE_BY_EIGHT, _TEMPERATURE),
    "refiner without messages, 12 x 8": Row("intra_batch", {"messages": False} | _TWELVE_BY_EIGHT, _TEMPERATURE),
    "refiner, 12 x 8": Row("intra_batch", _TWELVE_BY_EIGHT, _TEMPERATURE),
    "no margin": Row("adaptive_margin", {"margin_scale": 0.0}, _RATES | _SCALE),
    "constant margin": Row("adaptive_margin", {"margin_scale": 0.0, "lr": 3e-3}, _SCALE | {"base_margin": (0.1, 0.3)}),
    "margin from distance": Row("adaptive_margin", {"lr": 3e-3}, _MARGIN, "given"),
    "margin from similarity": Row("adaptive_margin", {"lr": 3e-3, "direction": "similarity"}, _MARGIN, "given"),
    "margin from shuffled distance": Row("adaptive_margin", {"lr": 3e-3}, _MARGIN, "shuffled"),
    "no margin, soft": Row("adaptive_margin", {"margin_scale": 0.0}, _RATES | _SOFT),
    "constant margin, soft": Row(
        "adaptive_margin", {"margin_scale": 0.0, "lr": 3e-3}, _SOFT | {"base_margin": (0.3, 1.0)}
    ),
    "margin from distance, soft": Row("adaptive_margin", {"lr": 3e-3}, _SOFT_MARGIN, "given"),
    "margin from similarity, soft": Row(
        "adaptive_margin", {"lr": 3e-3, "direction": "similarity"}, _SOFT_MARGIN, "given"
    ),
    "margin from shuffled distance, soft": Row("adaptive_margin", {"lr": 3e-3}, _SOFT_MARGIN, "shuffled"),
    "hybrid, 4 learners": Row("combined", _LEARNERS, _DIVERGENCE),
    "hybrid, refiner": Row("combined", {}, _RATES | {"refined_weight": (0.1, 1.0)}),
    "hybrid with margins, 4 learners, refiner": Row(
        "combined",
        {"num_learners": 4, "proxy_loss": "adaptive_margin", "divergence_weight": 0.1, "lr": 3e-3},
        {"proxy_weight": (0.03, 0.3), "refined_weight": (0.1, 1.0)},
        "given",
    ),
}

QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "recommended": [
        ("recommended", "contrastive"),
        ("recommended", "multi_similarity"),
        ("recommended", "normalized_softmax"),
        ("recommended", "4 learners, divergence"),
    ],
    "pairs and proxies": [
        ("hybrid", "multi_similarity"),
        ("hybrid", "proxy_anchor"),
        ("hybrid, light proxies", "hybrid"),
        ("hybrid, light proxies", "multi_similarity"),
    ],
    "global and local heads, attention": [
        ("hybrid, avg+max", "hybrid"),
        ("hybrid, avg+max, attention", "hybrid, avg+max"),
        ("hybrid, two levels", "hybrid, avg+max"),
        ("mhgl", "hybrid, two levels"),
        ("mhgl", "hybrid"),
        ("mhgl, normalized attention", "mhgl"),
        ("mhgl, normalized attention", "hybrid, two levels"),
        ("mhgl, normalized attention", "hybrid"),
    ],
    "ensembles": [
        ("4 heads", "multi_similarity"),
        ("4 heads, divergence", "4 heads"),
        ("4 learners", "4 heads"),
        ("4 learners, divergence", "4 learners"),
        ("4 learners, divergence", "multi_similarity"),
        ("multi_similarity, width 74", "multi_similarity"),
        ("4 learners, divergence", "multi_similarity, width 74"),
    ],
    "messages": [
        ("refiner without messages", "smoothed cross-entropy"),
        ("refiner", "refiner without messages"),
        ("refiner", "smoothed cross-entropy"),
        ("refiner, starts with similarity", "refiner without messages"),
        ("refiner + refinement at test time", "refiner"),
        ("refiner + mean of 8 neighbours", "refiner"),
        ("refiner, 12 x 8", "refiner without messages, 12 x 8"),
        ("refiner, 12 x 8", "smoothed cross-entropy, 12 x 8"),
        ("multi_similarity + mean of 8 neighbours", "multi_similarity"),
    ],
    "margins": [
        ("constant margin", "no margin"),
        ("margin from distance", "constant margin"),
        ("margin from similarity", "constant margin"),
        ("margin from distance", "margin from shuffled distance"),
        ("no margin, soft", "no margin"),
        ("constant margin, soft", "no margin, soft"),
        ("margin from distance, soft", "constant margin, soft"),
        ("margin from similarity, soft", "constant margin, soft"),
        ("margin from distance, soft", "margin from shuffled distance, soft"),
    ],
    "combinations": [
        ("hybrid, refiner", "hybrid"),
        ("hybrid, 4 learners", "4 learners, divergence"),
        ("hybrid with margins, 4 learners, refiner", "hybrid, 4 learners"),
    ],
}
"""What is compared with what: a row and its baseline, which it shares all else with."""


def row_of(spec):
    """Return a row by its name, or one of "recipe:setting=value,..."."""
    if spec in ROWS:
        return ROWS[spec]
    name, _, settings = spec.partition(":")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    given = {key: value_of(value) for key, _, value in pairs}
    tuned = {key: values for key, values in (_RATES | {"weight_decay": (1e-4, 1e-2)}).items() if key not in given}
    return Row(name, given, tuned, "given" if "adaptive_margin" in spec else None)


def value_of(text):
    """Return a number, True, False or None where the text is one, else the text."""
    try:
        return json.loads(text.replace("True", "true").replace("False", "false").replace("None", "null"))
    except json.JSONDecodeError:
        return text
