"""From scores to numbers: rankings, metrics of every subset with intervals, and run files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark
from pipelines.recipe import LENGTH_MARK, VARIANT_MARK, Recipe
from slq.arrow import RANKS, RUN
from slq.errors import ConfigError, DataError
from slq.index import Hit
from slq.metrics import (
    Metric,
    Ranks,
    Relevance,
    compared,
    figures,
    paired_permutation,
    parse_metrics,
    pessimistic_order,
    ranks_of_blocks,
    ranks_of_order,
    values_of,
)
from slq.reranking.profiles import PROFILES, Profile, Reading, fine_score, ordered

RANKS_FILE = "ranks.parquet"


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


def categories(benchmark: Benchmark) -> dict[str, NDArray[np.bool_]]:
    """Which queries belong to each category of knowledge, of objects that the model has seen; empty without any."""
    found = np.array([query.columns.get("category") for query in benchmark.queries], dtype=object)
    split = np.array([query.columns.get("split") for query in benchmark.queries], dtype=object)
    names = sorted({name for name in found if name is not None})
    masks = {name: (found == name) & (split != "unseen") for name in names}
    return {name: mask for name, mask in masks.items() if mask.any()}


def rank_table(benchmark: Benchmark, scores: Mapping[str, Scores]) -> pa.Table:
    """Where each query's first relevant item stands for each system, as RANKS."""
    masks = subsets(benchmark)
    of_query = [
        [name for name, mask in masks.items() if mask[n]] for n in range(len(benchmark.queries))
    ]
    parts = []
    for system, found in scores.items():
        reciprocal = Metric("mrr")(ranks_of(found, benchmark.graded))
        columns = {
            "query_id": [query.id for query in benchmark.queries],
            "system": [system] * len(reciprocal),
            "rank": [round(1 / one) if one else None for one in reciprocal.tolist()],
            "subsets": of_query,
        }
        parts.append(pa.table(columns, schema=RANKS))
    return pa.concat_tables(parts)


def metrics_of(ks: Sequence[int], names: Sequence[str] = ()) -> tuple[Metric, ...]:
    """What is measured: mrr, hit@k and recall@k, and the metrics that are asked for by name."""
    usual = [f"{kind}@{k}" for k in ks for kind in ("hit", "recall")]
    return parse_metrics(["mrr", *usual, *names])


def deepest(metrics: Sequence[Metric]) -> int:
    """How many items of each query the metrics look at that have a depth."""
    return max(metric.depth or 1 for metric in metrics)


def compared_systems(systems: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """Pairs of systems for paired tests: each with the baseline, or each with every one before it.

    Raises:
        ConfigError: The baseline is not measured.
    """
    if baseline is None:
        return [(systems[n], other) for n in range(len(systems)) for other in systems[:n]]
    if baseline not in systems:
        raise ConfigError(
            f"eval.baseline {baseline!r} is not measured; name one of {', '.join(systems)}"
        )
    return [(system, baseline) for system in systems if system != baseline]


PerQuery = dict[str, dict[str, dict[str, NDArray[np.float64]]]]
"""Numbers of each query, by subset, system and metric."""


def summarise(recipe: Recipe, benchmark: Benchmark, scores: dict[str, Scores]) -> dict[str, Any]:
    """Metrics of every system on every subset, in both directions, with 95% bootstrap intervals and paired tests.

    `cut_at` tells of systems that give only the first items of a query how many: their metrics without a depth count no
    others, and are in no test.
    """
    metrics = metrics_of(benchmark.depths(recipe.eval.ks), recipe.eval.metrics)
    both_ways = benchmark.facts is None or benchmark.facts.both_ways
    pairs = compared_systems(list(scores), recipe.eval.baseline)
    masks, by_category = subsets(benchmark), categories(benchmark)
    forward: PerQuery = {name: {} for name in masks}
    of_categories: PerQuery = {name: {} for name in by_category}
    reverse: PerQuery = {name: {} for name in masks}
    first: dict[str, NDArray[np.float64]] = {}
    for system, found in scores.items():
        ranks = ranks_of(found, benchmark.graded)
        values, first[system] = values_of(ranks, metrics), Metric("hit", 1)(ranks)
        for name, mask in masks.items():
            forward[name][system] = {metric: value[mask] for metric, value in values.items()}
        for name, mask in by_category.items():
            of_categories[name][system] = {metric: value[mask] for metric, value in values.items()}
        # The fine stage and an index rank items for a query, not the reverse; nor do benchmarks of one direction.
        if both_ways and found.is_whole and found.readings is None:
            for name, values in _reverse(benchmark, found, metrics).items():
                reverse[name][system] = values
    directions = {"text_to_image": forward, "image_to_text": reverse}
    whole = {name for name, found in scores.items() if found.is_whole}
    results: dict[str, Any] = {
        "num_items": len(benchmark.items),
        "num_queries": len(benchmark.queries),
        "num_unreadable": benchmark.num_unreadable,
        "systems": {
            system: _metrics({**directions, "categories": of_categories}, system)
            for system in scores
        },
        "paired": {name: _paired(values, pairs, whole) for name, values in directions.items()},
    }
    if cut := {name: deepest(metrics) for name in scores if name not in whole}:
        results["cut_at"] = cut
    if benchmark.facts is not None:
        results["benchmark"] = benchmark.facts.plain()
    for system, report in results["systems"].items():
        report.update(_of_benchmark(benchmark, scores[system], report["text_to_image"]))
    if {"slq", "slq_fine"} <= set(scores):
        results["fine_against_coarse_p"] = {
            name: paired_permutation(first["slq_fine"][mask], first["slq"][mask])
            for name, mask in masks.items()
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
    best = np.fmax.reduce(scores.coarse, axis=1)  # passes over NaN
    ties = (scores.coarse == best[:, None]) & (best > -np.inf)[:, None]
    if scores.readings is None:
        return int((ties.sum(axis=1) > 1).sum())
    number = 0
    for q, row in enumerate(ties):
        tied = np.flatnonzero(row)
        if len(tied):
            read = sorted(scores.readings[q])
            first = _first_of(scores, q, int(tied[0]), read)
            number += first != _first_of(scores, q, int(tied[-1]), read[::-1])
    return number


def _first_of(scores: Scores, query: int, top: int, read: Sequence[int]) -> int:
    """Column of the first item, as `placed` would find it.

    Args:
        scores: With readings.
        query: Row.
        top: Column of the best by similarity.
        read: Columns of the items with readings, in the order in which equal ones come.
    """
    assert scores.readings is not None
    readings = scores.readings[query]
    if top not in readings:
        return top  # it keeps its place
    coarse, weight = scores.coarse[query, list(read)].tolist(), scores.coarse_weight
    of_number = {n: readings[i] for n, i in enumerate(read)}
    return read[ordered(of_number, coarse, scores.profile, coarse_weight=weight)[0]]


def _metrics(directions: Mapping[str, PerQuery], system: str) -> dict[str, Any]:
    """Figures of a system by subset, of the directions in which it was measured."""
    found = {
        name: {subset: figures(of[system]) for subset, of in values.items() if system in of}
        for name, values in directions.items()
    }
    return {name: report for name, report in found.items() if report}


def _paired(
    values: PerQuery, pairs: Sequence[tuple[str, str]], whole: Collection[str]
) -> dict[str, Any]:
    """Paired tests by subset and metric; of the pairs whose systems were both measured.

    Metrics without a depth look at every item, and so compare only systems that rank every item.

    Args:
        values: Of one direction.
        pairs: Systems.
        whole: Systems that rank every item.
    """
    found = {}
    for subset, of in values.items():
        both = [pair for pair in pairs if set(pair) <= set(of)]
        both_whole = [pair for pair in both if set(pair) <= set(whole)]
        if both_whole == both:
            found[subset] = compared(of, both)
            continue
        undepthed, depthed = (
            {
                name: {metric: one for metric, one in metrics.items() if ("@" in metric) == is_cut}
                for name, metrics in of.items()
            }
            for is_cut in (False, True)
        )
        found[subset] = compared(undepthed, both_whole) | compared(depthed, both)
    return {subset: tests for subset, tests in found.items() if tests}


def ranks_of(scores: Scores, grades: NDArray[Any]) -> Ranks:
    """Ranks of the relevant items by one system; ties count against it, and what has -inf is not ranked.

    Args:
        scores: Of the system.
        grades: (queries, items) grades or truth values.
    """
    coarse = scores.coarse
    is_ranked = ~np.isneginf(coarse)
    allowed = None if is_ranked.all() else is_ranked
    if scores.readings is not None:
        order = placed(scores, pessimistic_order(coarse, grades))
        return ranks_of_order(order, grades, allowed)
    return ranks_of_blocks(
        lambda rows, columns: torch.tensor(coarse[rows, columns]),
        Relevance.of_matrix(grades),
        allowed=None if allowed is None else lambda rows, columns: is_ranked[rows, columns],
    )


def _reverse(
    benchmark: Benchmark, scores: Scores, metrics: Sequence[Metric]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Image to text, by coarse score: numbers of each item against the queries of one kind."""
    found = {}
    grades = benchmark.graded
    for name, mask in subsets(benchmark).items():
        asked = benchmark.relevant[mask].any(axis=0)
        turned = Scores(np.ascontiguousarray(scores.coarse[mask][:, asked].T))
        ranks = ranks_of(turned, np.ascontiguousarray(grades[mask][:, asked].T))
        found[name] = values_of(ranks, metrics)
    return found


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
    """The ranking as a run file, `depth` items per query; of equal ones the wrong come first, as metrics count them."""
    by_coarse = pessimistic_order(scores.coarse, benchmark.graded)
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
