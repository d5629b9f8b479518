"""From scores to numbers: rankings, metrics of every subset with intervals, and run files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark
from pipelines.recipe import LENGTH_MARK, VARIANT_MARK, Recipe
from slq.arrow import RUN
from slq.errors import DataError
from slq.index import Hit
from slq.metrics import (
    bootstrap_interval,
    hits,
    paired_permutation,
    pessimistic_order,
    recalls,
    reciprocal_ranks,
)
from slq.reranking.profiles import PROFILES, Profile, Reading, fine_score, ordered


@dataclass(frozen=True)
class Scores:
    """What one system says of every query and item.

    Attributes:
        coarse: (queries, items) float32 similarities; -inf where a query does not rank an item, or an index did not
            give it.
        readings: Of each query, by column of the item, those of pairs that the fine stage scored; None without one.
        profile: Says what readings are ordered by.
        is_whole: Whether every item has a similarity, so that items can also look for queries.
        coarse_weight: Of similarities that are added to margins.
    """

    coarse: NDArray[np.float32]
    readings: Sequence[Mapping[int, Reading]] | None = None
    profile: Profile = PROFILES["default"]
    is_whole: bool = True
    coarse_weight: float = 0.0

    @property
    def scored_per_query(self) -> float:
        """Items that the fine stage scored for a query, on average."""
        return sum(map(len, self.readings or ())) / max(1, len(self.coarse))

    def fine_score(self, query: int, item: int) -> float:
        """What the fine stage ranks an item by that it has scored for a query."""
        assert self.readings is not None
        coarse = float(self.coarse[query, item])
        return fine_score(self.readings[query][item], coarse, self.profile, self.coarse_weight)

    def scored(
        self,
        best: Sequence[NDArray[np.int64]],
        readings: Sequence[Sequence[Reading]],
        profile: Profile,
        *,
        coarse_weight: float = 0.0,
    ) -> "Scores":
        """The same with what a fine stage has read.

        Args:
            best: Of each query the columns of the items that were scored.
            readings: What was read of them; a margin that is not finite counts as none, as in `Reranker.rank`.
            profile: Says what they are ordered by.
            coarse_weight: Of similarities that are added to margins.
        """
        by_column = [
            {n: one for n, one in zip(row.tolist(), found, strict=True) if isfinite(one.margin)}
            for row, found in zip(best, readings, strict=True)
        ]
        return replace(self, readings=by_column, profile=profile, coarse_weight=coarse_weight)

    @classmethod
    def of_hits(cls, benchmark: Benchmark, found: Sequence[Sequence[Hit]]) -> "Scores":
        """What an index gave for each query.

        Raises:
            DataError: It holds an item that is not in the gallery, so that its ranks say nothing of it.
        """
        column = {item.id: n for n, item in enumerate(benchmark.items)}
        coarse = np.full(benchmark.relevant.shape, -np.inf, np.float32)
        for row, ranking in zip(coarse, found, strict=True):
            for hit in ranking:
                if hit.id not in column:
                    raise DataError(
                        f"the index holds item {hit.id!r}, and the gallery does not; measure slq_index with the "
                        "data.corpus that the index was built from"
                    )
                row[column[hit.id]] = hit.score
        return cls(benchmark.masked(coarse), is_whole=False)


def run_file(system: str) -> str:
    """The name of a system's run file; `slq:one` and `slq@48` are those of a variant and of cut vectors."""
    return f"run_{system.replace(VARIANT_MARK, '.variant.').replace(LENGTH_MARK, '.cut.')}.parquet"


def placed(scores: Scores, by_coarse: NDArray[np.int64]) -> NDArray[np.int64]:
    """Columns of the items of each query, best first, as the fine stage orders them.

    Args:
        scores: Of the system.
        by_coarse: (queries, items) columns by similarity; also says which of equals comes first after the fine stage.
    """
    if scores.readings is None:
        return by_coarse
    order = by_coarse.copy()
    for q, readings in enumerate(scores.readings):
        is_scored = np.isin(by_coarse[q], list(readings))
        depth = int(is_scored.nonzero()[0].max(initial=-1)) + 1  # what stands below keeps its place
        head = by_coarse[q, :depth]
        of_place = {n: readings[i] for n, i in enumerate(head.tolist()) if i in readings}
        coarse, weight = scores.coarse[q, head].tolist(), scores.coarse_weight
        order[q, :depth] = head[ordered(of_place, coarse, scores.profile, coarse_weight=weight)]
    return order


def scores_of_places(coarse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores that sort into a ranking: the similarity that each place has by coarse order.

    Where it is not below that of the place before, it is the next smaller float32, so that equal similarities do not
    leave it to a reader how the fine stage has ordered them.

    Args:
        coarse: (places,) similarities in descending order.
    """
    scores = coarse.copy()
    for n in range(1, len(scores)):
        scores[n] = min(scores[n], np.nextafter(scores[n - 1], np.float32(-np.inf)))
    return scores


def subsets(benchmark: Benchmark) -> dict[str, NDArray[np.bool_]]:
    """Which queries belong to each reported subset."""

    def column(name: str) -> NDArray[Any]:
        return np.array([query.columns.get(name) for query in benchmark.queries], dtype=object)

    kind, hard, split = column("kind"), column("hard"), column("split")
    masks: dict[str, NDArray[np.bool_]] = {}
    for name in sorted({k for k in kind if k is not None}):
        of_kind = kind == name
        seen = split != "unseen"
        masks[name] = of_kind & seen
        masks[f"{name}, hard subset"] = of_kind & seen & (hard == True)  # noqa: E712 - an object array
        masks[f"{name}, unseen objects"] = of_kind & (split == "unseen")
    overall = benchmark.facts.overall if benchmark.facts else None
    if overall or not masks:  # users' own queries need not have kinds
        masks = {overall or "all": np.ones(len(benchmark.queries), dtype=bool), **masks}
    return {name: mask for name, mask in masks.items() if mask.any()}


def summarise(recipe: Recipe, benchmark: Benchmark, scores: dict[str, Scores]) -> dict[str, Any]:
    """Metrics of every system on every subset, in both directions, with 95% bootstrap intervals."""
    ks = benchmark.depths(recipe.eval.ks)
    results: dict[str, Any] = {
        "num_items": len(benchmark.items),
        "num_queries": len(benchmark.queries),
        "num_unreadable": benchmark.num_unreadable,
        "systems": {},
    }
    if benchmark.facts is not None:
        results["benchmark"] = benchmark.facts.plain()
    per_query: dict[str, NDArray[np.float64]] = {}
    for system, found in scores.items():
        order = placed(found, pessimistic_order(found.coarse, benchmark.relevant))
        ranked = np.take_along_axis(benchmark.relevant, order, axis=1)
        per_query[system] = hits(ranked, 1)
        report = {name: _metrics(ranked[mask], ks) for name, mask in subsets(benchmark).items()}
        results["systems"][system] = {"text_to_image": report}
        results["systems"][system] |= _of_benchmark(benchmark, found, report)
        # The fine stage and an index rank items for a query, not the reverse; nor do benchmarks of one direction.
        both_ways = benchmark.facts is None or benchmark.facts.both_ways
        if both_ways and found.is_whole and found.readings is None:
            reverse = _reverse(benchmark, found.coarse, ks)
            results["systems"][system]["image_to_text"] = reverse
    if {"slq", "slq_fine"} <= set(scores):
        results["fine_against_coarse_p"] = {
            name: paired_permutation(per_query["slq_fine"][mask], per_query["slq"][mask])
            for name, mask in subsets(benchmark).items()
        }
    return results


def _of_benchmark(benchmark: Benchmark, scores: Scores, report: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark asks for beside its subsets: means over kinds, and whether an order of candidates matters."""
    told: dict[str, Any] = {}
    if benchmark.facts is not None and benchmark.facts.groups:
        told["groups"] = group_means(benchmark.facts.groups, report)
    if benchmark.allowed is not None:
        told["depends_on_order"] = num_depending_on_order(scores)
    return told


def group_means(
    groups: Mapping[str, tuple[str, ...]], report: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Means over kinds, each kind once, of every metric; a group lacks one if a kind does.

    Args:
        groups: Name -> kinds.
        report: Metrics by kind.
    """
    means = {}
    for name, kinds in groups.items():
        entries = [report[kind] for kind in kinds if kind in report]
        if len(entries) == len(kinds):
            metrics = [key for key, value in entries[0].items() if isinstance(value, float)]
            means[name] = {key: float(np.mean([one[key] for one in entries])) for key in metrics}
    return means


def num_depending_on_order(scores: Scores) -> int:
    """Queries whose first item would be another one if the items stood in reverse order: those of ties at the top."""
    num_items = scores.coarse.shape[1]
    forward = np.argsort(-scores.coarse, axis=1, kind="stable")
    backward = num_items - 1 - np.argsort(-scores.coarse[:, ::-1], axis=1, kind="stable")
    first, last = (placed(scores, order)[:, 0] for order in (forward, backward))
    return int((first != last).sum())


def _metrics(ranked: NDArray[np.bool_], ks: tuple[int, ...]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "num_queries": len(ranked),
        "mrr": float(reciprocal_ranks(ranked).mean()),
    }
    for k in ks:
        values = hits(ranked, k)
        report[f"hit@{k}"] = float(values.mean())
        report[f"hit@{k}_interval"] = bootstrap_interval(values)
        report[f"recall@{k}"] = float(recalls(ranked, ranked.sum(axis=1), k).mean())
    return report


def _reverse(
    benchmark: Benchmark, coarse: NDArray[np.float32], ks: tuple[int, ...]
) -> dict[str, Any]:
    """Image to text, by coarse score: each item against the queries of one kind."""
    reports = {}
    for name, mask in subsets(benchmark).items():
        relevant = benchmark.relevant[mask].T
        asked = relevant.any(axis=1)
        order = pessimistic_order(coarse[mask].T[asked], relevant[asked])
        reports[name] = _metrics(np.take_along_axis(relevant[asked], order, axis=1), ks)
    return reports


def shared_best(first: Scores, second: Scores, depth: int) -> float:
    """Share of the `depth` best items of each query by the first scores that are among those by the second."""
    depth = min(depth, first.coarse.shape[1])
    best, other = (
        np.argsort(-scores.coarse, axis=1, kind="stable")[:, :depth] for scores in (first, second)
    )
    given = np.isfinite(np.take_along_axis(second.coarse, other, axis=1))
    ranked = np.isfinite(np.take_along_axis(first.coarse, best, axis=1))
    same = (best[:, :, None] == np.where(given, other, -1)[:, None, :]).any(axis=2)
    return float(same[ranked].mean())


def run_table(benchmark: Benchmark, scores: Scores, *, depth: int) -> pa.Table:
    """The ranking as a run file, `depth` items per query."""
    by_coarse = np.argsort(-scores.coarse, axis=1, kind="stable")
    rows = []
    for q, best in enumerate(placed(scores, by_coarse)[:, :depth]):
        of_places = scores.coarse[q, by_coarse[q, :depth]]
        readings = {} if scores.readings is None else scores.readings[q]
        if readings:
            of_places = scores_of_places(of_places)
        for rank, i in enumerate(best[np.isfinite(of_places)].tolist(), start=1):
            reading = readings.get(i)
            rows.append(
                {
                    "query_id": benchmark.queries[q].id,
                    "item_id": benchmark.items[i].id,
                    "rank": rank,
                    "score": float(of_places[rank - 1]),
                    "coarse_score": float(scores.coarse[q, i]),
                    "fine_score": None if reading is None else scores.fine_score(q, i),
                }
            )
    return pa.Table.from_pylist(rows, schema=RUN)
