"""What each level of kept images is worth: pairs a second, passes and bytes."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from jobs.bench.measure import interleaved
from slq.backbones import Backbone
from slq.reranker import Reranker
from slq.schema import Item

_ROOM = 2**36  # for everything
LEVELS: dict[str, Any] = {
    "nothing": {},
    "vision": {"vision_bytes": _ROOM},
    "prefix": {"vision_bytes": _ROOM, "prefix_bytes": _ROOM},
}


def measure_levels(
    backbone: Backbone, framing: str, pairs: Sequence[tuple[Item, Item]], *, repeats: int
) -> dict[str, Any]:
    """Medians of interleaved rounds in which every image is kept already that can be.

    Args:
        backbone: The frozen model.
        framing: Of the pairs.
        pairs: All are scored in one call.
        repeats: Rounds.
    """
    rerankers = {name: Reranker(backbone, framing=framing, **room) for name, room in LEVELS.items()}
    costs = {name: _warm_cost(reranker, pairs) for name, reranker in rerankers.items()}
    times = interleaved(
        {name: partial(reranker.score, pairs) for name, reranker in rerankers.items()},
        repeats=repeats,
        device=backbone.device,
        warm_up=False,
    )
    return {
        name: {
            "pairs": len(pairs),
            "pairs_per_s": round(len(pairs) / statistics.median(times[name]), 1),
            "kept_bytes": reranker.passes.views.num_bytes + reranker.passes.prefixes.num_bytes,
            "cost": costs[name],
        }
        for name, reranker in rerankers.items()
    }


def _warm_cost(reranker: Reranker, pairs: Sequence[tuple[Item, Item]]) -> dict[str, int]:
    """Counts of one call once everything is kept."""
    reranker.score(pairs)
    before = asdict(reranker.counts)
    reranker.score(pairs)
    return {name: value - before[name] for name, value in asdict(reranker.counts).items()}
