"""Metrics by name, such as `ndcg@10`, each a number per query."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slq.errors import ConfigError
from slq.metrics.ranked import Floats
from slq.metrics.ranks import Integers, Ranks, within
from slq.metrics.significance import bootstrap_intervals

KNOWN = ("hit@k", "recall@k", "precision@k", "ndcg", "ndcg@k", "map", "map@k", "mrr", "mrr@k")
"""What `parse_metric` takes; k is a whole number from 1 on."""
_NAME = re.compile(r"(?P<kind>[a-z]+)(@(?P<depth>[1-9][0-9]*))?")
_EVERYWHERE = np.iinfo(np.int64).max


def _sum(ranks: Ranks, weights: Any) -> Floats:
    sums = np.bincount(ranks.query, weights=weights, minlength=ranks.num_queries)
    return sums.astype(np.float64)  # whole numbers where there are no pairs


def _inside(ranks: Ranks, depth: int) -> Any:
    return (ranks.rank > 0) & (ranks.rank <= depth)


def _hit(ranks: Ranks, depth: int) -> Floats:
    return (_sum(ranks, _inside(ranks, depth)) > 0).astype(np.float64)


def _recall(ranks: Ranks, depth: int) -> Floats:
    return _sum(ranks, _inside(ranks, depth)) / np.maximum(ranks.num_relevant, 1)


def _precision(ranks: Ranks, depth: int) -> Floats:
    return _sum(ranks, _inside(ranks, depth)) / depth


def _mrr(ranks: Ranks, depth: int) -> Floats:
    is_first = _inside(ranks, depth) & (ranks.place == 1)
    return _sum(ranks, is_first / np.maximum(ranks.rank, 1))


def _map(ranks: Ranks, depth: int) -> Floats:
    precisions = ranks.place / np.maximum(ranks.rank, 1)
    return _sum(ranks, precisions * _inside(ranks, depth)) / np.maximum(ranks.num_relevant, 1)


def _ndcg(ranks: Ranks, depth: int) -> Floats:
    gained = _sum(ranks, _gains(ranks.grade, ranks.rank) * _inside(ranks, depth))
    best = ranks.grade[np.lexsort((-ranks.grade, ranks.query))]
    place = within(ranks.query)
    ideal = _sum(ranks, _gains(best, place) * (place <= depth))
    return np.divide(gained, ideal, out=np.zeros_like(gained), where=ideal > 0)


def _gains(grade: Floats, rank: Integers) -> Floats:
    gains: Floats = grade / np.log2(np.maximum(rank, 1) + 1)
    return gains


_KINDS: dict[str, Callable[[Ranks, int], Floats]] = {
    "hit": _hit,
    "recall": _recall,
    "precision": _precision,
    "ndcg": _ndcg,
    "map": _map,
    "mrr": _mrr,
}


@dataclass(frozen=True, order=True)
class Metric:
    """A metric; called with `Ranks` it gives (queries,) numbers in 0..1, 0 where a query has no relevant item.

    - `hit@k`: 1 where a relevant item is among the first k (what papers on COCO and Flickr30K call R@k).
    - `recall@k`: share of the relevant items that are among the first k.
    - `precision@k`: share of the first k places that hold relevant items, of k also where fewer items are ranked.
    - `mrr`, `mrr@k`: 1 / rank of the first relevant item, 0 where it is not there or below k.
    - `map`, `map@k`: mean over *all* relevant items of the precision at the rank of each, 0 for those not there or
      below k (trec_eval's `map_cut`; others divide by k where more items are relevant).
    - `ndcg`, `ndcg@k`: gain grade, discount log2(rank + 1), over that of the best order (Järvelin and Kekäläinen 2002
      as in trec_eval's `ndcg_cut`; others take 2^grade - 1 as gain, the same where grades are 0 and 1).

    Attributes:
        kind: The name without a depth.
        depth: k; None for the whole ranking.
    """

    kind: str
    depth: int | None = None

    @property
    def name(self) -> str:
        """As `parse_metric` takes it."""
        return self.kind if self.depth is None else f"{self.kind}@{self.depth}"

    def __call__(self, ranks: Ranks) -> Floats:
        """(queries,) float64 of each query."""
        return _KINDS[self.kind](ranks, self.depth or _EVERYWHERE)


def parse_metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        ConfigError: There is none of that name; the nearest is named.
    """
    match = _NAME.fullmatch(name)
    if match and match["kind"] in _KINDS:
        depth = match["depth"] and int(match["depth"])
        if depth or match["kind"] in KNOWN:
            return Metric(match["kind"], depth or None)
        raise ConfigError(f"metric {name!r} needs a depth, as in {name}@10")
    kind, at, depth = name.strip().partition("@")
    if kind in _KINDS:
        raise ConfigError(
            f"metric {name!r}: the depth {depth!r} is no whole number from 1 on; write {kind}@10"
        )
    near = difflib.get_close_matches(kind.lower(), _KINDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}{at}{depth}? " if near else ""
    raise ConfigError(f"metric {name!r} is unknown; {hint}there are {', '.join(KNOWN)}")


def parse_metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """Metrics in the order in which their names first come, each once.

    Raises:
        ConfigError: A name is unknown, or there is none.
    """
    found = tuple(dict.fromkeys(map(parse_metric, names)))
    if not found:
        raise ConfigError(f"no metric is named; there are {', '.join(KNOWN)}")
    return found


def values_of(ranks: Ranks, metrics: Sequence[Metric]) -> dict[str, Floats]:
    """(queries,) numbers of each metric, by name."""
    return {metric.name: metric(ranks) for metric in metrics}


def figures(values: Mapping[str, Floats]) -> dict[str, Any]:
    """Means over queries as `NAME`, their 95% bootstrap intervals as `NAME_interval`, and `num_queries`.

    Args:
        values: (queries,) numbers by name; at least one query.
    """
    report: dict[str, Any] = {"num_queries": len(next(iter(values.values())))}
    intervals = bootstrap_intervals(np.stack(list(values.values())))
    for (name, numbers), interval in zip(values.items(), intervals, strict=True):
        report[name] = float(numbers.mean())
        report[f"{name}_interval"] = interval
    return report
