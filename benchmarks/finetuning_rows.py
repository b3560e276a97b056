"""What benchmarks/finetuning.py trains."""

from retrieval_rows import Row
from retrieval_rows import row_of as small_row_of

_PLAIN = {"levels": "global", "attention": "none", "pool_type": "avg"}
_RATES = {"lr": (3e-4, 1e-3)}

ROWS: dict[str, Row] = {
    "frozen": Row("frozen", {}, {}),
    "contrastive": Row("contrastive", {}, _RATES | {"neg_margin": (0.5, 1.0)}),
    "multi_similarity": Row("multi_similarity", {}, _RATES | {"base": (0.5, 1.0)}),
    "proxy_anchor": Row("proxy_anchor", {}, _RATES | {"proxy_lr": (1e-2, 1e-1)}),
    "normalized_softmax": Row("normalized_softmax", {}, _RATES | {"temperature": (0.05, 0.1)}),
    "cosface": Row("cosface", {}, _RATES | {"margin": (0.2, 0.35)}),
    "hybrid": Row("mhgl", _PLAIN, _RATES | {"proxy_weight": (0.03, 0.3)}),
    "mhgl, no attention": Row("mhgl", {"attention": "none"}, _RATES | {"proxy_weight": (0.03, 0.3)}),
    "mhgl": Row("mhgl", {"attention": "normalized"}, _RATES | {"proxy_weight": (0.03, 0.3)}),
}


def row_of(spec: str) -> Row:
    """Return a row by its name, or one of "recipe:setting=value,..."."""
    return ROWS[spec] if spec in ROWS else small_row_of(spec)
