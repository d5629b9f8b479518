"""Prometheus counters of embedding, kept by Ray and scraped from every node."""

from functools import cache
from typing import Any

from pipelines.embedding.pieces import Work

_COUNTERS = {
    "input_bytes": "bytes of images and texts that were read",
    "items": "items that were encoded",
    "tokens": "tokens of their sequences",
    "padded_tokens": "tokens of the batches, padding included",
    "busy_s": "seconds in the model",
    "quarantined": "items that were set aside, by reason",
    "written_bytes": "bytes of committed shards",
}


@cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    tags = ("reason",) if name == "quarantined" else ()
    return Counter(f"slq_embed_{name}", description=_COUNTERS[name], tag_keys=tags)


def count(name: str, value: float, **tags: str) -> None:
    """Add to a counter, `slq_embed_NAME`; nothing happens outside of Ray."""
    import ray

    if value > 0 and ray.is_initialized():
        _counter(name).inc(value, tags=tags or None)


def count_work(work: Work) -> None:
    """Add what a piece cost."""
    for name in ("input_bytes", "items", "tokens", "padded_tokens", "busy_s"):
        count(name, getattr(work, name))
