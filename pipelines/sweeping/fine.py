"""The fine stage of a sweep: each pair of any cell is scored once, whatever the depth, and its time is taken apart."""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmark import Benchmark
from pipelines.loading import reranking_backbone, scorer_digest, scorer_of
from pipelines.recipe import Recipe
from pipelines.sweeping.cells import spread
from pipelines.sweeping.models import loaded, reranker
from pipelines.tasks import collect, model_task, parts
from slq.errors import ArtifactError
from slq.files import read_json, write_json
from slq.index.exact import NO_ROW
from slq.reranking.profiles import Reading
from slq.schema import Item
from slq.sweeps import Found

_READINGS, _TIMES = "readings", "fine_ms.json"
_KEY = b"slq_sweep"
_PART_PAIRS = 512  # that a run which is ended loses at most, for each worker
Pair = tuple[int, int]
"""Numbers of a query and of an item."""
_SCHEMA = pa.schema([("query", pa.int32()), ("item", pa.int32()), ("margin", pa.float64())])


class FineStage:
    """What the fine stage says of pairs, kept in the run folder.

    Args:
        recipe: The resolved recipe.
        benchmark: Gallery and queries.
        content: Digest of what they hold.
    """

    def __init__(self, recipe: Recipe, benchmark: Benchmark, content: str) -> None:
        self._recipe, self._benchmark = recipe, benchmark
        self._recipe_json = recipe.model_dump_json()
        scorer = scorer_digest(scorer_of(recipe, reranking_backbone(recipe, weights=False)))
        self._key = hashlib.sha256(f"{scorer} {content}".encode()).hexdigest()
        self._folder = recipe.storage.sweep / _READINGS
        self._margins: dict[Pair, float] = {}
        self.scored = 0
        """Pairs that were scored now, and not by an earlier run."""

    def read(self, rankings: Sequence[Found], depth: int) -> list[dict[int, Reading]]:
        """Readings of the first `depth` items of every ranking, by query and row of the item.

        Args:
            rankings: Of the cells, as they are re-ranked.
            depth: The largest; 0 reads nothing.
        """
        self._margins = self._before()
        wanted = {
            (query, item)
            for found in rankings
            for query, rows in enumerate(found.rows[:, :depth].tolist())
            for item in rows
            if item != NO_ROW
        }
        # by item: pairs of one image stand in one part, which opens it once
        todo = sorted(wanted - self._margins.keys(), key=lambda pair: pair[::-1])
        if todo:
            self._score(todo)
        readings: list[dict[int, Reading]] = [{} for _ in self._benchmark.queries]
        for query, item in sorted(wanted):
            margin = self._margins[query, item]
            if np.isfinite(margin):  # one that is not counts as none, as in `Reranker.rank`
                readings[query][item] = Reading(margin)
        return readings

    def _score(self, todo: list[Pair]) -> None:
        import ray

        task = model_task(scored_part, self._recipe.resources.gpus_per_worker)
        items, queries = ray.put(self._benchmark.items), ray.put(self._benchmark.queries)
        tasks = [
            task.remote(self._recipe_json, queries, items, todo[part])
            for part in parts(len(todo), -(-len(todo) // _PART_PAIRS))
        ]
        self._folder.mkdir(parents=True, exist_ok=True)
        collect(tasks, "sweep fine stage part", self._keep)

    def _keep(self, part: list[tuple[int, int, float]]) -> None:
        """Write a part as soon as it is there: a run that is ended then has it."""
        self.scored += len(part)
        self._margins |= {(query, item): margin for query, item, margin in part}
        columns = dict(zip(_SCHEMA.names, map(list, zip(*part, strict=True)), strict=True))
        table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata(
            {_KEY: self._key.encode()}
        )
        name = hashlib.sha256(f"{self._key} {part[0]} {part[-1]}".encode()).hexdigest()[:16]
        partial = self._folder / f".{name}.partial"
        pq.write_table(table, partial)
        partial.replace(self._folder / f"{name}.parquet")

    def _before(self) -> dict[Pair, float]:
        """What earlier runs read of the same model, question, gallery and queries."""
        margins: dict[Pair, float] = {}
        for path in sorted(self._folder.glob("*.parquet")):
            try:
                table = pq.read_table(path)
            except (OSError, pa.ArrowException):
                continue  # what is damaged is read again
            if (table.schema.metadata or {}).get(_KEY) == self._key.encode():
                columns = (table[name].to_pylist() for name in _SCHEMA.names)
                margins |= {(q, i): margin for q, i, margin in zip(*columns, strict=True)}
        return margins

    def times(self, found: Found, depths: Sequence[int]) -> dict[str, Any]:
        """Median milliseconds to embed a query (`embed_ms`) and to re-rank it at each depth (`fine_ms`).

        Args:
            found: A ranking whose candidates are timed; which ones they are hardly matters.
            depths: That are timed in turns; 0 takes no time.
        """
        sweep = self._recipe.sweep
        told = [self._key, sorted(depths), sweep.timed_fine_queries, sweep.rounds]
        digest = hashlib.sha256(json.dumps([*told, self._recipe.eval.num_threads]).encode())
        path = self._recipe.storage.sweep / _TIMES
        before = _read_times(path)
        if before.get("digest") == digest.hexdigest():
            return before
        chosen = spread(len(self._benchmark.queries), sweep.timed_fine_queries)
        queries = [self._benchmark.queries[n] for n in chosen]
        candidates = [
            [self._benchmark.items[row] for row in found.rows[n, : max(depths)] if row != NO_ROW]
            for n in chosen
        ]
        task = model_task(timed_part, self._recipe.resources.gpus_per_worker)
        asked = task.remote(self._recipe_json, queries, candidates, sorted(depths), sweep.rounds)
        (measured,) = collect([asked], "sweep fine stage timed")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**measured, "digest": digest.hexdigest()})
        return _read_times(path)


def _read_times(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
    except ArtifactError:
        return {}
    return found


def scored_part(
    recipe_json: str, queries: list[Item], items: list[Item], pairs: list[Pair]
) -> list[tuple[int, int, float]]:
    """A Ray task: pairs with their margins."""
    found = reranker(recipe_json).score([(queries[q], items[i]) for q, i in pairs])
    return [(*pair, margin) for pair, margin in zip(pairs, found.tolist(), strict=True)]


def timed_part(
    recipe_json: str,
    queries: list[Item],
    candidates: list[list[Item]],
    depths: list[int],
    rounds: int,
) -> dict[str, Any]:
    """A Ray task: median milliseconds of one query alone, embedding and each depth in turns, nothing kept between them.

    Returns:
        `embed_ms`, and `fine_ms` by depth as text.
    """
    _, encoder = loaded(recipe_json)
    stage = reranker(recipe_json)
    times: dict[str, list[float]] = {}

    def take(name: str, call: Any) -> None:
        began = time.perf_counter()
        call()
        times.setdefault(name, []).append(time.perf_counter() - began)

    for number in range(1 + rounds):
        if number == 1:
            times.clear()  # the first round warms up
        for query, of_query in zip(queries, candidates, strict=True):
            take("embed", lambda query=query: encoder.encode([query]))
            for depth in depths:
                if depth:
                    some = of_query[:depth]
                    take(str(depth), lambda query=query, some=some: stage.rank(query, some))
    medians: Mapping[str, float] = {
        name: 1000 * statistics.median(values) for name, values in times.items()
    }
    fine = {str(depth): medians.get(str(depth), 0.0) for depth in depths}
    return {"embed_ms": medians["embed"], "fine_ms": fine}
