"""Measures several systems on one gallery, in parallel Ray tasks that share each prefix pass."""

import time
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus import plan_shards, read_shard
from pipelines.loading import backbone_of, encoder_of, use_threads
from pipelines.progress import show
from pipelines.recipe import Recipe, System, require_files
from slq.artifacts import load_adapter_config, write_json
from slq.backbones import Backbone
from slq.encoder import batches_by_length
from slq.errors import DataError, MediaError
from slq.media import decode_image
from slq.metrics import (
    bootstrap_interval,
    hits,
    paired_permutation,
    pessimistic_order,
    reciprocal_ranks,
)
from slq.reranker import Reranker
from slq.schema import RUN, Item

_GALLERY_ROWS = 4096


@dataclass(frozen=True)
class Benchmark:
    """Gallery, queries and relevance, in memory.

    Attributes:
        items: Gallery items.
        queries: Query items; `columns` hold kind, hard, split where given.
        relevant: (queries, items) bool.
    """

    items: list[Item]
    queries: list[Item]
    relevant: NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Similarities of one system: (queries, items) float32, and fine margins where a pair was scored, else NaN."""

    coarse: NDArray[np.float32]
    fine: NDArray[np.float32]


def load_benchmark(recipe: Recipe) -> Benchmark:
    """Read the recipe's corpus, queries and relevance.

    Raises:
        DataError: Relevance names an unknown query or item, or a query has none.
    """
    require_files(recipe, "corpus", "queries", "relevance")
    items = _read_items(recipe.data.path("corpus"))
    queries = _read_items(recipe.data.path("queries"))
    row = {query.id: n for n, query in enumerate(queries)}
    column = {item.id: n for n, item in enumerate(items)}
    relevant = np.zeros((len(queries), len(items)), dtype=bool)
    for entry in pq.read_table(recipe.data.path("relevance")).to_pylist():
        if entry["query_id"] not in row or entry["item_id"] not in column:
            raise DataError(
                f"{recipe.data.path('relevance')}: {entry['query_id']} -> {entry['item_id']} names a query or item "
                "that is not in the files"
            )
        relevant[row[entry["query_id"]], column[entry["item_id"]]] = entry["grade"] > 0
    missing = [queries[n].id for n in np.flatnonzero(~relevant.any(axis=1))]
    if missing:
        raise DataError(f"{len(missing)} queries have no relevant item, first {missing[0]!r}")
    return Benchmark(items, queries, relevant)


def _read_items(path: Path) -> list[Item]:
    items = []
    for plan in plan_shards(path, _GALLERY_ROWS):
        for record in read_shard(plan):
            try:
                image = decode_image(record.image) if record.image is not None else None
            except MediaError as error:
                raise DataError(
                    f"{record.uri}: item {record.id!r} cannot be measured: {error}"
                ) from None
            items.append(Item(id=record.id, text=record.text, image=image, columns=record.columns))
    return items


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Measure every system of the recipe; writes results.json and run files, and returns the results."""
    benchmark = load_benchmark(recipe)
    scores = score_systems(recipe, benchmark)
    results = summarise(recipe, benchmark, scores)
    folder = recipe.storage.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("run_*.parquet"):
        stale.unlink()
    write_json(folder / "results.json", results)
    for system, found in scores.items():
        table = run_table(benchmark, found, depth=max(recipe.eval.ks))
        pq.write_table(table, folder / f"run_{system}.parquet")
    return results


def score_systems(recipe: Recipe, benchmark: Benchmark) -> dict[System, Scores]:
    """Embed gallery and queries in parallel tasks, then score the best candidates in others."""
    vectors = _embed_everything(recipe, benchmark)
    num_items = len(benchmark.items)
    scores: dict[System, Scores] = {}
    for system in recipe.eval.systems:
        found = vectors["slq" if system == "slq_fine" else system]
        coarse = found[num_items:] @ found[:num_items].T
        scores[system] = Scores(coarse, np.full_like(coarse, np.nan))
    if "slq_fine" in scores:
        coarse = scores["slq_fine"].coarse
        best = np.argsort(-coarse, axis=1, kind="stable")[:, : recipe.rerank.depth]
        margins = _score_best(recipe, benchmark, best)
        np.put_along_axis(scores["slq_fine"].fine, best, margins, axis=1)
    return scores


def _embed_everything(recipe: Recipe, benchmark: Benchmark) -> dict[str, NDArray[np.float32]]:
    """Vectors of each system, gallery items first, then queries."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=recipe.resources.gpus_per_worker)(embed_part)
    everything = [*benchmark.items, *benchmark.queries]
    recipe_json = recipe.model_dump_json()
    parts = _parts(len(everything))
    found = _collect(
        [task.remote(recipe_json, everything[part]) for part in parts], "eval embedded part"
    )
    return {system: np.concatenate([part[system] for part in found]) for system in found[0]}


def _score_best(
    recipe: Recipe, benchmark: Benchmark, best: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Margins (queries, depth) of each query's best items."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=recipe.resources.gpus_per_worker)(score_part)
    recipe_json = recipe.model_dump_json()
    items = ray.put(benchmark.items)
    tasks = [
        task.remote(recipe_json, benchmark.queries[part], items, best[part])
        for part in _parts(len(best))
    ]
    margins: NDArray[np.float32] = np.concatenate(_collect(tasks, "eval fine stage part"))
    return margins


def _parts(count: int, number: int = 8) -> list[slice]:
    edges = np.linspace(0, count, min(number, count) + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def _collect(tasks: list[Any], what: str) -> list[Any]:
    """Results in order, with a line of progress as tasks end."""
    import ray

    waiting, started = list(tasks), time.monotonic()
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=1)
        ended = len(tasks) - len(waiting)
        eta = (time.monotonic() - started) / ended * len(waiting)
        show(f"{what} {ended}/{len(tasks)}  ETA {eta:.0f} s")
    results: list[Any] = ray.get(tasks)
    return results


@cache
def _loaded(recipe_json: str) -> tuple[Recipe, Backbone]:
    """One backbone per worker process, whatever the number of its tasks."""
    recipe = Recipe.model_validate_json(recipe_json)
    use_threads(recipe.eval.num_threads)
    return recipe, backbone_of(recipe)


def embed_part(recipe_json: str, items: list[Item]) -> dict[System, NDArray[np.float32]]:
    """Vectors of items for every system of the recipe, from one prefix pass."""
    recipe, backbone = _loaded(recipe_json)
    wanted: list[System] = [s for s in recipe.eval.systems if s != "slq_fine"]
    if "slq_fine" in recipe.eval.systems and "slq" not in wanted:
        wanted.append("slq")
    encoders = {system: encoder_of(recipe, system, backbone) for system in wanted}
    shape = (len(items), backbone.hidden_size)
    vectors = {system: np.empty(shape, np.float32) for system in encoders}
    for chunk in batches_by_length(items, recipe.embed.batch_size):
        prefix = backbone.prefix(backbone.prompts([items[n] for n in chunk]))
        for system, encoder in encoders.items():
            vectors[system][chunk] = encoder.encode_prefix(prefix).cpu().numpy()
    return vectors


def score_part(
    recipe_json: str, queries: list[Item], items: list[Item], best: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Margins (queries, depth) of each query's best items."""
    recipe, backbone = _loaded(recipe_json)
    rerank = recipe.rerank
    reranker = Reranker(backbone, framing=rerank.framing, batch_size=rerank.batch_size)
    pairs = [(query, items[int(i)]) for query, row in zip(queries, best, strict=True) for i in row]
    margins: NDArray[np.float32] = reranker.score(pairs).numpy().reshape(best.shape)
    return margins


def final_scores(scores: Scores) -> NDArray[np.float32]:
    """One score that orders as the fine stage says: scored candidates by margin, above all others by similarity."""
    scored = ~np.isnan(scores.fine)
    if not scored.any():
        return scores.coarse
    lowest = np.where(scored, scores.fine, np.inf).min(axis=1, keepdims=True)
    # cosines lie in -1..1, so shifting the rest by 3 below the lowest margin keeps the two blocks apart
    lowest = np.where(np.isfinite(lowest), lowest, 0.0)
    return np.where(scored, scores.fine, lowest - 3.0 + scores.coarse).astype(np.float32)


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
    if not masks:  # users' own queries need not have kinds
        masks["all"] = np.ones(len(benchmark.queries), dtype=bool)
    return {name: mask for name, mask in masks.items() if mask.any()}


def summarise(recipe: Recipe, benchmark: Benchmark, scores: dict[System, Scores]) -> dict[str, Any]:
    """Metrics of every system on every subset, in both directions, with 95% bootstrap intervals."""
    ks = recipe.eval.ks
    adapter = load_adapter_config(recipe.storage.adapter)
    results: dict[str, Any] = {
        "num_items": len(benchmark.items),
        "num_queries": len(benchmark.queries),
        "backbone": {"model": adapter.base_model_name_or_path, "revision": adapter.revision},
        "fingerprint": adapter.fingerprint,
        "systems": {},
    }
    per_query: dict[System, NDArray[np.float64]] = {}
    for system, found in scores.items():
        final = final_scores(found)
        order = pessimistic_order(final, benchmark.relevant)
        ranked = np.take_along_axis(benchmark.relevant, order, axis=1)
        per_query[system] = hits(ranked, 1)
        report = {name: _metrics(ranked[mask], ks) for name, mask in subsets(benchmark).items()}
        results["systems"][system] = {"text_to_image": report}
        if np.isnan(found.fine).all():  # the fine stage ranks items for a query, not the reverse
            reverse = _reverse(benchmark, found.coarse, ks)
            results["systems"][system]["image_to_text"] = reverse
    if {"slq", "slq_fine"} <= set(scores):
        results["fine_against_coarse_p"] = {
            name: paired_permutation(per_query["slq_fine"][mask], per_query["slq"][mask])
            for name, mask in subsets(benchmark).items()
        }
    return results


def _metrics(ranked: NDArray[np.bool_], ks: tuple[int, ...]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "num_queries": len(ranked),
        "mrr": float(reciprocal_ranks(ranked).mean()),
    }
    for k in ks:
        values = hits(ranked, k)
        report[f"hit@{k}"] = float(values.mean())
        report[f"hit@{k}_interval"] = bootstrap_interval(values)
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


def run_table(benchmark: Benchmark, scores: Scores, *, depth: int) -> pa.Table:
    """The ranking as a run file, `depth` items per query."""
    final = final_scores(scores)
    order = np.argsort(-final, axis=1, kind="stable")[:, :depth]
    rows = []
    for q, best in enumerate(order):
        for rank, i in enumerate(best, start=1):
            margin = float(scores.fine[q, i])
            rows.append(
                {
                    "query_id": benchmark.queries[q].id,
                    "item_id": benchmark.items[i].id,
                    "rank": rank,
                    "score": float(final[q, i]),
                    "coarse_score": float(scores.coarse[q, i]),
                    "fine_score": None if np.isnan(margin) else margin,
                }
            )
    return pa.Table.from_pylist(rows, schema=RUN)
