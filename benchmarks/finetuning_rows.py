"""What benchmarks/finetuning.py trains."""

from retrieval_rows import Row
from retrieval_rows import row_of as small_row_of

_PLAIN = {"levels": "global", "attention": "none", "pool_type": "avg"}
_PROXY_WEIGHT = {"proxy_weight": (0.3, 1.0)}
_MINING = {"epsilon": (None, 0.1)}
_BASE = {"base": (0.5, 1.0)}
_SCALE = {"scale": (8.0, 16.0)}
_TEMPERATURE = {"temperature": (0.1, 0.2)}
_WIDE = {"embedding_size": 256}
_LEARNERS = _WIDE | {"num_learners": 4}
_MULTI_SIMILARITY = {"learner_loss": "multi_similarity"}

ROWS: dict[str, Row] = {
    "frozen": Row("frozen", {}, {}),
    "recommended": Row("recommended", {}, _PROXY_WEIGHT),
    "contrastive": Row("contrastive", {}, {"neg_margin": (0.5, 1.0)}),
    "multi_similarity": Row("multi_similarity", {}, _MINING),
    "proxy_anchor": Row("proxy_anchor", {}, {"proxy_lr": (3e-2, 1e-1)}),
    "normalized_softmax": Row("normalized_softmax", {}, {"temperature": (0.05, 0.1)}),
    "normalized_softmax, 256 dimensions": Row("normalized_softmax", _WIDE, {"temperature": (0.05, 0.1)}),
    "cosface": Row("cosface", {}, _SCALE),
    "hybrid": Row("mhgl", _PLAIN, _PROXY_WEIGHT),
    "hybrid, avg+max": Row("mhgl", _PLAIN | {"pool_type": "avg+max"}, _PROXY_WEIGHT),
    "mhgl, no attention": Row("mhgl", {"attention": "none"}, _PROXY_WEIGHT),
    "mhgl": Row("mhgl", {"attention": "normalized"}, _PROXY_WEIGHT),
    "smoothed cross-entropy": Row("intra_batch", {"refined_weight": 0.0}, _TEMPERATURE),
    "refiner without messages": Row("intra_batch", {"messages": False}, _TEMPERATURE),
    "refiner": Row("intra_batch", {}, _TEMPERATURE),
    "no margin": Row("adaptive_margin", {"margin_scale": 0.0}, _SCALE),
    "constant margin": Row("adaptive_margin", {"margin_scale": 0.0, "base_margin": 0.3}, _SCALE),
    "margin from distance": Row("adaptive_margin", {"margin_scale": 0.3}, _SCALE, "given"),
    "margin from shuffled distance": Row("adaptive_margin", {"margin_scale": 0.3}, _SCALE, "shuffled"),
    "multi_similarity, 256 dimensions": Row("multi_similarity", _WIDE, _BASE),
    "multi_similarity, 256 dimensions, 120 pixels": Row("multi_similarity", _WIDE | {"image_size": 120}, _BASE),
    "4 learners": Row("attention_ensemble", _LEARNERS | _MULTI_SIMILARITY | {"divergence_weight": 0.0}, _BASE),
    "4 learners, divergence": Row(
        "attention_ensemble", _LEARNERS | _MULTI_SIMILARITY | {"base": 1.0}, {"divergence_weight": (0.1, 1.0)}
    ),
    "all together": Row(
        "combined",
        _LEARNERS | {"proxy_loss": "adaptive_margin", "divergence_weight": 0.1},
        _PROXY_WEIGHT,
        "given",
    ),
}
"""Two trials each; "4 learners, divergence" has the base that those of "4 learners" chose. "256 dimensions": as wide as
the four learners together; "120 pixels": as many multiplications as those at 96. "recommended" has been chosen among
more trials than that; see docs/photographs_choices.md."""

QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "what training brings": [("multi_similarity", "frozen"), ("normalized_softmax", "frozen")],
    "recommended": [
        ("recommended", "multi_similarity"),
        ("recommended", "normalized_softmax"),
        ("recommended", "normalized_softmax, 256 dimensions"),
        ("recommended", "proxy_anchor"),
        ("recommended", "proxy_anchor:proxy_lr=0.1"),
        ("recommended", "normalized_softmax:temperature=0.1,embedding_size=256"),
        ("recommended", "recommended:epsilon=None"),
        ("recommended:epochs=15", "proxy_anchor:proxy_lr=0.1,epochs=15"),
        ("recommended:epochs=15", "multi_similarity:epochs=15"),
        ("recommended:epochs=15", "recommended:epochs=15,epsilon=None"),
        ("recommended:epochs=15", "recommended:pair_weight=3,epochs=15"),
        ("recommended:epochs=15", "recommended:pair_weight=1,epochs=15"),
        ("recommended:epsilon=None", "multi_similarity"),
        ("recommended:epsilon=None", "normalized_softmax"),
        ("recommended:epsilon=None", "proxy_anchor"),
        ("recommended:epsilon=None", "proxy_anchor:proxy_lr=0.1"),
        ("recommended:epsilon=None", "recommended:pair_weight=3,epsilon=None"),
        ("recommended:epsilon=None", "recommended:pair_weight=1,epsilon=None"),
        ("recommended:pair_weight=3,epsilon=None", "recommended:pair_weight=1,epsilon=None"),
        ("recommended:pair_weight=1,epsilon=None", "recommended:pair_weight=1,anchor_weight=0,epsilon=None"),
        (
            "recommended:pair_weight=1,anchor_weight=1,epsilon=None",
            "recommended:pair_weight=1,anchor_weight=0,epsilon=None",
        ),
        ("recommended:pair_weight=1,anchor_weight=0,epsilon=None", "proxy_anchor:proxy_lr=0.1"),
        (
            "recommended:num_learners=4,pair_weight=1,anchor_weight=0,epsilon=None",
            "recommended:pair_weight=1,anchor_weight=0,epsilon=None",
        ),
    ],
    "pairs and proxies": [
        ("hybrid", "multi_similarity"),
        ("hybrid", "proxy_anchor"),
        ("hybrid, avg+max", "multi_similarity"),
        ("hybrid, avg+max", "proxy_anchor"),
        ("hybrid, avg+max", "normalized_softmax"),
    ],
    "global and local heads, attention": [
        ("hybrid, avg+max", "hybrid"),
        ("mhgl, no attention", "hybrid, avg+max"),
        ("mhgl", "mhgl, no attention"),
        ("mhgl", "hybrid"),
        ("mhgl", "hybrid, avg+max"),
        ("mhgl", "normalized_softmax"),
    ],
    "ensembles": [
        ("4 learners", "multi_similarity, 256 dimensions"),
        ("4 learners, divergence", "4 learners"),
        ("4 learners, divergence", "multi_similarity, 256 dimensions"),
        ("4 learners, divergence", "multi_similarity, 256 dimensions, 120 pixels"),
    ],
    "messages": [
        ("refiner without messages", "smoothed cross-entropy"),
        ("refiner", "refiner without messages"),
        ("refiner", "smoothed cross-entropy"),
        ("refiner + refinement at test time", "refiner"),
    ],
    "margins": [
        ("constant margin", "no margin"),
        ("margin from distance", "no margin"),
        ("margin from distance", "constant margin"),
        ("margin from distance", "margin from shuffled distance"),
    ],
    "combinations": [("all together", "hybrid"), ("all together", "4 learners, divergence")],
}
"""What is compared with what: a row and its baseline."""


SHORTER = {
    "combined:proxy_loss=adaptive_margin,margin_scale=0,scale=10,proxy_weight=1,refined_weight=0": "pairs and softmax:",
    "mhgl:levels=global,attention=none": "hybrid:",
}
"""What rows begin with, and what tables show for it."""


def full(spec):
    """Return a row with all of its settings, of one as tables show it."""
    begun = next((x for x, short in SHORTER.items() if spec.startswith(f"{short} ")), None)
    return spec if begun is None else f"{begun},{spec.removeprefix(SHORTER[begun]).strip()}"


def row_of(spec: str) -> Row:
    """Return a row by its name, or one of "recipe:setting=value,..."."""
    return ROWS[spec] if spec in ROWS else small_row_of(spec)
