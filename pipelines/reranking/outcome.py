"""The end of a run: scored pairs in order, as Parquet and in TREC's format, and what the fine stage gained."""

import json
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.commits import shard_name
from pipelines.ledger import Ledger
from pipelines.ledger_reader import remake
from pipelines.loading import calibration_of_scorer
from pipelines.ranking import scores_of_places
from pipelines.recipe import Recipe
from pipelines.reranking.judged import Ranking, judge
from pipelines.reranking.plan import parquet_bytes, read_pairs, read_pool
from pipelines.runs import trec_lines
from slq.arrow import RUN
from slq.errors import ArtifactError, DataError
from slq.reranking.profiles import Reading, fine_score, ordered, profile_by_name

log = logging.getLogger(__name__)
RUN_FILE, TREC_FILE, CALIBRATION = "run.parquet", "run.trec", "calibration.json"
RERANKED = pa.schema([*RUN, ("label_mass", pa.float32()), ("probability", pa.float32())])
"""A run with how likely the model was to answer at all (below 0.5 the score means little), and the probability of a
match; both null where a candidate was not scored."""


def assemble(recipe: Recipe, ledger: Ledger, scorer: str) -> dict[str, Any]:
    """Write the re-ranked run, judge it where there is relevance, and tell of both.

    Args:
        recipe: The resolved recipe.
        ledger: With all shards committed.
        scorer: Digest of what scored.
    """
    pool = read_pool(ledger.store)
    readings = read_readings(ledger)
    rankings = _rankings(pool, readings)
    calibration = calibration_of_scorer(recipe, scorer)
    weight = calibration.coarse_weight if calibration and recipe.rerank.fuse else 0.0
    temperature = calibration.temperature if calibration else 1.0
    table = _table(recipe, rankings, weight, temperature)
    ledger.store.write(RUN_FILE, parquet_bytes(table, 2**20))
    try:
        ledger.store.write(TREC_FILE, trec_lines(table, "slq_fine"))
    except DataError as error:
        ledger.store.remove(TREC_FILE)
        log.warning("no %s: %s", TREC_FILE, error)
    found: dict[str, Any] = {
        "run": ledger.store.url(RUN_FILE),
        "queries": len(rankings),
        "candidates": pool.num_rows,
        "scored": len(readings),
        "unscored": sum(commit.quarantined for commit in ledger.commits().values()),
        "scored_per_query": round(len(readings) / len(rankings), 3),
        "doubtful": sum(bool(reading.is_doubtful) for reading in readings.values()),
    }
    if recipe.data.path("relevance").is_file():
        judged, fitted = judge(recipe, rankings, scorer)
        found |= judged
        if fitted is None:
            ledger.store.remove(CALIBRATION)  # it would be of other queries
        else:
            text = json.dumps(fitted.model_dump(), indent=2, sort_keys=True)
            ledger.store.write(CALIBRATION, text.encode() + b"\n")
            found["calibration_file"] = ledger.store.url(CALIBRATION)
    return found


def read_readings(ledger: Ledger) -> dict[int, Reading]:
    """What was read, by row of the run.

    Raises:
        ArtifactError: A shard is damaged, or does not hold the pairs that were planned for it.
    """
    found: dict[int, Reading] = {}
    for commit in ledger.commits().values():
        ledger.require_shard(commit)
        planned = set(read_pairs(ledger.store, commit.shard_id, ["pair"])["pair"].to_pylist())
        with ledger.store.open(shard_name(commit.shard_id, commit.generation)) as file:
            rows = pq.read_table(
                file, columns=["pair", "margin", "label_mass", "entropy", "hundredths"]
            )
        columns = [rows[name].to_pylist() for name in rows.column_names]
        if len(set(columns[0])) < len(columns[0]) or not planned.issuperset(columns[0]):
            raise ArtifactError(
                f"shard {commit.shard_id} of {ledger.store.location} holds other pairs than were planned for it; "
                f"{remake(commit.shard_id, ledger.command)}"
            )
        found |= {pair: Reading(*values) for pair, *values in zip(*columns, strict=True)}
    return found


def _rankings(pool: pa.Table, readings: dict[int, Reading]) -> list[Ranking]:
    """The candidates of each query in coarse order, with what was read of them."""
    names, items = pool["query_id"].to_pylist(), pool["item_id"].to_pylist()
    coarse: NDArray[np.float64] = pool["coarse_score"].to_numpy()
    starts = [n for n, name in enumerate(names) if n == 0 or name != names[n - 1]]
    return [
        Ranking(
            names[start],
            items[start:stop],
            coarse[start:stop],
            {n - start: readings[n] for n in range(start, stop) if n in readings},
        )
        for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)
    ]


def _table(recipe: Recipe, rankings: list[Ranking], weight: float, temperature: float) -> pa.Table:
    profile = profile_by_name(recipe.rerank.profile)
    columns: dict[str, list[Any]] = {name: [] for name in RERANKED.names}
    for one in rankings:
        coarse = one.coarse.tolist()
        order = ordered(one.readings, coarse, profile, coarse_weight=weight)
        found = [one.readings.get(n) for n in order]
        fine = [
            None if reading is None else fine_score(reading, coarse[n], profile, weight)
            for n, reading in zip(order, found, strict=True)
        ]
        columns["query_id"] += [one.query_id] * len(order)
        columns["item_id"] += [one.items[n] for n in order]
        columns["rank"] += range(1, len(order) + 1)
        columns["score"] += scores_of_places(one.coarse.astype(np.float32)).tolist()
        columns["coarse_score"] += [coarse[n] for n in order]
        columns["fine_score"] += fine
        columns["label_mass"] += [reading and reading.label_mass for reading in found]
        columns["probability"] += [
            reading and Reading(reading.margin / temperature).probability for reading in found
        ]
    return pa.table(columns, schema=RERANKED)
