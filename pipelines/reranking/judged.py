"""What the fine stage gained, against relevance: hit@k before and after, and what is fitted to held-out queries.

Judged queries are parted by a hash of their ids. The calibration is fitted to one part, and everything that uses it is
reported on the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.recipe import Recipe
from slq.errors import DataError
from slq.metrics import bootstrap_interval, hits, paired_permutation, reciprocal_ranks
from slq.reranking.calibration import (
    Calibration,
    expected_calibration_error,
    fit,
    is_held_out,
    reliability,
    sigmoid,
)
from slq.reranking.fusion import Judged
from slq.reranking.profiles import Reading, coarse_order, ordered, profile_by_name

_PRECISION = 0.9
_RELEVANCE = pa.schema(
    [("query_id", pa.string()), ("item_id", pa.string()), ("grade", pa.float64())]
)


@dataclass(frozen=True)
class Ranking:
    """The candidates of one query.

    Attributes:
        items: Their ids, in coarse order.
        coarse: (candidates,) float64, falling.
        readings: Of those that were scored, by place in `items`.
    """

    query_id: str
    items: list[str]
    coarse: NDArray[np.float64]
    readings: dict[int, Reading]


Order = Callable[[Ranking], list[int]]
"""Gives places in `items`, the best first."""


def judge(
    recipe: Recipe, rankings: Sequence[Ranking], scorer: str
) -> tuple[dict[str, Any], Calibration | None]:
    """Figures of the coarse order, the fine one and, on queries that nothing was fitted to, the fused one.

    Args:
        recipe: The resolved recipe.
        rankings: All of the run.
        scorer: Digest of what scored.

    Returns:
        Figures as JSON, and what was fitted; None where held-out queries do not suffice, and then the figures say why.
    """
    relevant = read_relevance(recipe)
    judged = [one for one in rankings if one.query_id in relevant]
    missing = len(relevant) - len(judged)  # as in trec_eval, a run is not blamed for them
    if not judged:
        return {"judged": 0, "judged_without_candidates": missing}, None
    profile = profile_by_name(recipe.rerank.profile)
    systems: dict[str, Order] = {
        "coarse": lambda one: coarse_order(one.coarse.tolist()),
        "fine": lambda one: ordered(one.readings, one.coarse.tolist(), profile),
    }
    found: dict[str, Any] = {"judged": len(judged), "judged_without_candidates": missing}
    found |= _figures(recipe, judged, relevant, systems)
    share = recipe.rerank.held_out_share
    held_out = [one for one in judged if is_held_out(one.query_id, share)]
    reported = [one for one in judged if not is_held_out(one.query_id, share)]
    try:
        fitted = fit(
            [_as_judged(one, relevant) for one in held_out if one.readings],
            scorer=scorer,
            held_out_share=share,
            precision=_PRECISION,
        )
    except DataError as error:
        return {**found, "not_calibrated": str(error)}, None
    if reported:
        weight = fitted.coarse_weight
        systems["fused"] = lambda one: ordered(
            one.readings, one.coarse.tolist(), profile, coarse_weight=weight
        )
        found["held_out"] = {
            "fitted_to": len(held_out),
            **_figures(recipe, reported, relevant, systems),
            "calibration": _calibration(reported, relevant, fitted),
        }
    return found, fitted


def read_relevance(recipe: Recipe) -> dict[str, set[str]]:
    """Relevant items of each judged query.

    Raises:
        DataError: The file cannot be read, or has other columns.
    """
    path, names = recipe.data.path("relevance"), ["query_id", "item_id", "grade"]
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.relevance: {path} cannot be read: {error}") from None
    missing = set(names) - set(table.column_names)
    if missing:
        raise DataError(
            f"data.relevance: {path} has no column {', '.join(sorted(missing))}; it has {table.column_names}"
        )
    table = table.select(names).cast(_RELEVANCE)
    found: dict[str, set[str]] = {}
    for row in table.to_pylist():
        if (row["grade"] or 0) > 0:
            found.setdefault(row["query_id"], set()).add(row["item_id"])
    return found


def _figures(
    recipe: Recipe,
    rankings: Sequence[Ranking],
    relevant: Mapping[str, set[str]],
    systems: Mapping[str, Order],
) -> dict[str, Any]:
    """hit@k with intervals and MRR of each system; an answer outside of the candidates counts as missed."""
    depth = max(*recipe.eval.ks, *(len(one.items) for one in rankings))
    firsts: dict[str, NDArray[np.float64]] = {}
    report: dict[str, Any] = {}
    for name, order in systems.items():
        ranked = np.zeros((len(rankings), depth), dtype=bool)
        for row, one in zip(ranked, rankings, strict=True):
            answers = relevant[one.query_id]
            row[: len(one.items)] = [one.items[n] in answers for n in order(one)]
        firsts[name] = hits(ranked, 1)
        report[name] = {"num_queries": len(rankings), "mrr": float(reciprocal_ranks(ranked).mean())}
        for k in recipe.eval.ks:
            values = hits(ranked, k)
            report[name][f"hit@{k}"] = float(values.mean())
            report[name][f"hit@{k}_interval"] = bootstrap_interval(values)
    tests = {
        f"{name}_against_{other}_p": paired_permutation(firsts[name], firsts[other])
        for name, other in (("fine", "coarse"), ("fused", "fine"))
        if name in firsts
    }
    return {"systems": report, **tests}


def _as_judged(one: Ranking, relevant: Mapping[str, set[str]]) -> Judged:
    """The scored candidates of a query."""
    places = list(one.readings)
    return Judged(
        np.array([one.readings[n].margin for n in places]),
        one.coarse[places],
        np.array([one.items[n] in relevant[one.query_id] for n in places]),
    )


def _calibration(
    rankings: Sequence[Ranking], relevant: Mapping[str, set[str]], fitted: Calibration
) -> dict[str, Any]:
    """How well probabilities hold on queries that nothing was fitted to, before and after the temperature."""
    queries = [_as_judged(one, relevant) for one in rankings if one.readings]
    if not queries:
        return {}
    margins = np.concatenate([one.margins for one in queries])
    matches = np.concatenate([one.relevant for one in queries])
    before, after = sigmoid(margins), fitted.probability(margins)
    kept = None if fitted.threshold is None else margins >= fitted.threshold
    return {
        "temperature": fitted.temperature,
        "coarse_weight": fitted.coarse_weight,
        "pairs": len(margins),
        "matches": int(matches.sum()),
        "expected_calibration_error": {
            "before": expected_calibration_error(before, matches),
            "after": expected_calibration_error(after, matches),
        },
        "reliability": {
            "before": reliability(before, matches),
            "after": reliability(after, matches),
        },
        "threshold": fitted.threshold,
        "precision_asked": fitted.precision,
        "precision_reached": float(matches[kept].mean())
        if kept is not None and kept.any()
        else None,
        "share_above_threshold": None if kept is None else float(kept.mean()),
    }
