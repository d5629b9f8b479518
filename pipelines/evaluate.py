"""Measures several systems on one gallery, in parallel Ray tasks that share each prefix pass."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus import plan_shards, read_shard
from pipelines.loading import (
    adapter_folder,
    backbone_of,
    encoder_of,
    require_shorter,
    use_threads,
)
from pipelines.recipe import LENGTH_MARK, VARIANT_MARK, Recipe, require_files
from pipelines.tasks import collect, model_task, parts
from slq.arrow import RUN
from slq.artifacts import load_adapter_config, require_same_fingerprint, write_json
from slq.backbones import Backbone
from slq.backbones.loading import backbone_revision
from slq.encoder import batches_by_length
from slq.errors import DataError, MediaError, StorageError
from slq.media import decode_image
from slq.metrics import (
    bootstrap_interval,
    hits,
    paired_permutation,
    pessimistic_order,
    recalls,
    reciprocal_ranks,
)
from slq.reranker import Reranker
from slq.schema import Item

log = logging.getLogger(__name__)
_GALLERY_ROWS = 4096


@dataclass(frozen=True)
class Benchmark:
    """Gallery, queries and relevance, in memory.

    Attributes:
        items: Gallery items.
        queries: Query items; `columns` hold kind, hard, split where given.
        relevant: (queries, items) bool.
        num_unreadable: Items and queries that could not be read, with the queries that only those answer.
    """

    items: list[Item]
    queries: list[Item]
    relevant: NDArray[np.bool_]
    num_unreadable: int = 0


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
    items, lost_items = _read_items(recipe.data.path("corpus"))
    queries, lost_queries = _read_items(recipe.data.path("queries"))
    row = {query.id: n for n, query in enumerate(queries)}
    column = {item.id: n for n, item in enumerate(items)}
    relevant = np.zeros((len(queries), len(items)), dtype=bool)
    orphaned = set()
    for entry in pq.read_table(recipe.data.path("relevance")).to_pylist():
        if entry["query_id"] in lost_queries:
            continue
        if entry["item_id"] in lost_items and entry["query_id"] in row:
            orphaned.add(entry["query_id"])
            continue
        if entry["query_id"] not in row or entry["item_id"] not in column:
            raise DataError(
                f"{recipe.data.path('relevance')}: {entry['query_id']} -> {entry['item_id']} names a query or item "
                "that is not in the files"
            )
        relevant[row[entry["query_id"]], column[entry["item_id"]]] = entry["grade"] > 0
    answered: NDArray[np.bool_] = np.asarray(relevant.any(axis=1))
    missing = [queries[n].id for n in np.flatnonzero(~answered)]
    unknown = [name for name in missing if name not in orphaned]
    if unknown:
        raise DataError(f"{len(unknown)} queries have no relevant item, first {unknown[0]!r}")
    kept = [queries[n] for n in np.flatnonzero(answered)]
    num_unreadable = len(lost_items) + len(lost_queries) + len(missing)
    if num_unreadable:
        log.warning(
            "%d items and %d queries cannot be read, and %d queries lost their only answer: left out",
            len(lost_items),
            len(lost_queries),
            len(missing),
        )
    if not items or not kept:
        raise DataError("nothing is left to measure: no item or no query can be read")
    return Benchmark(items, kept, relevant[answered], num_unreadable)


def _read_items(path: Path) -> tuple[list[Item], set[str]]:
    """Readable items in order, and the ids of the others; the embedding flow quarantines the same ones."""
    items, lost = [], set()
    for plan in plan_shards(path, _GALLERY_ROWS):
        for record in read_shard(plan):
            try:
                image = decode_image(record.image) if record.image is not None else None
            except MediaError as error:
                log.warning("%s: item %r is left out: %s", record.uri, record.id, error)
                lost.add(record.id)
                continue
            if record.problem or (image is None and not (record.text or "").strip()):
                log.warning(
                    "%s: item %r is left out: %s", record.uri, record.id, record.problem or "empty"
                )
                lost.add(record.id)
                continue
            items.append(Item(id=record.id, text=record.text, image=image, columns=record.columns))
    return items, lost


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Measure every system of the recipe; writes results.json and run files, and returns the results."""
    require_shorter(recipe, "eval.dimensions", recipe.eval.dimensions)
    space = embedding_space(recipe)
    benchmark = load_benchmark(recipe)
    scores = score_systems(recipe, benchmark)
    results = {**space, **summarise(recipe, benchmark, scores)}
    folder = recipe.storage.evaluation
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for system, found in scores.items():
            partial = folder / f".{run_file(system)}.partial"
            pq.write_table(run_table(benchmark, found, depth=max(recipe.eval.ks)), partial)
            partial.replace(folder / run_file(system))
        for stale in folder.glob("run_*.parquet"):
            if stale.name not in map(run_file, scores):
                stale.unlink()
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; free space or choose another folder"
        ) from None
    write_json(folder / "results.json", results)
    return results


def embedding_space(recipe: Recipe) -> dict[str, Any]:
    """What the results speak of: backbone, revision and, where an adapter is measured, its fingerprint.

    Raises:
        ArtifactError: A trained system is asked for and there is no adapter; found before any work is done.
    """
    if not {"slq", "slq_fine"} & set(recipe.eval.systems):
        section = recipe.backbone
        revision = backbone_revision(section.name, section.revision)
        return {"backbone": {"model": section.name, "revision": revision}, "fingerprint": ""}
    adapter = load_adapter_config(recipe.storage.adapter)
    named = {"model": adapter.base_model_name_or_path, "revision": adapter.revision}
    return {"backbone": named, "fingerprint": adapter.fingerprint}


def run_file(system: str) -> str:
    """The name of a system's run file; `slq:one` and `slq@48` are those of a variant and of cut vectors."""
    return f"run_{system.replace(VARIANT_MARK, '.variant.').replace(LENGTH_MARK, '.cut.')}.parquet"


def _cut(vectors: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """The first values of each vector, (rows, length), as unit vectors again."""
    cut = vectors[:, :length]
    lengths: NDArray[np.float32] = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / lengths


def measured_systems(recipe: Recipe) -> list[str]:
    """The systems of the recipe; after the trained one come the variants that were trained with it."""
    systems: list[str] = []
    for system in recipe.eval.systems:
        systems.append(system)
        if system == "slq":
            systems += [f"{system}{VARIANT_MARK}{name}" for name in recipe.adapter.variants]
    return systems


def score_systems(recipe: Recipe, benchmark: Benchmark) -> dict[str, Scores]:
    """Embed gallery and queries in parallel tasks, then score the best candidates in others."""
    vectors = _embed_everything(recipe, benchmark)
    num_items = len(benchmark.items)
    scores: dict[str, Scores] = {}
    for system in measured_systems(recipe):
        found = vectors["slq" if system == "slq_fine" else system]
        coarse = found[num_items:] @ found[:num_items].T
        scores[system] = Scores(coarse, np.full_like(coarse, np.nan))
        for length in recipe.eval.dimensions if system == "slq" else ():
            cut = _cut(found, length)
            coarse = cut[num_items:] @ cut[:num_items].T
            name = f"{system}{LENGTH_MARK}{length}"
            scores[name] = Scores(coarse, np.full_like(coarse, np.nan))
    if "slq_fine" in scores:
        coarse = scores["slq_fine"].coarse
        best = np.argsort(-coarse, axis=1, kind="stable")[:, : recipe.rerank.depth]
        margins = _score_best(recipe, benchmark, best)
        np.put_along_axis(scores["slq_fine"].fine, best, margins, axis=1)
    return scores


def _embed_everything(recipe: Recipe, benchmark: Benchmark) -> dict[str, NDArray[np.float32]]:
    """Vectors of each system, gallery items first, then queries."""
    task = model_task(embed_part, recipe.resources.gpus_per_worker)
    everything = [*benchmark.items, *benchmark.queries]
    recipe_json = recipe.model_dump_json()
    found = collect(
        [task.remote(recipe_json, everything[part]) for part in parts(len(everything))],
        "eval embedded part",
    )
    return {system: np.concatenate([part[system] for part in found]) for system in found[0]}


def _score_best(
    recipe: Recipe, benchmark: Benchmark, best: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Margins (queries, depth) of each query's best items."""
    import ray

    task = model_task(score_part, recipe.resources.gpus_per_worker)
    recipe_json = recipe.model_dump_json()
    items = ray.put(benchmark.items)
    tasks = [
        task.remote(recipe_json, benchmark.queries[part], items, best[part])
        for part in parts(len(best))
    ]
    margins: NDArray[np.float32] = np.concatenate(collect(tasks, "eval fine stage part"))
    return margins


@cache
def _loaded(recipe_json: str) -> tuple[Recipe, Backbone]:
    """One backbone per worker process, whatever the number of its tasks."""
    recipe = Recipe.model_validate_json(recipe_json)
    use_threads(recipe.eval.num_threads)
    return recipe, backbone_of(recipe)


def embed_part(recipe_json: str, items: list[Item]) -> dict[str, NDArray[np.float32]]:
    """Vectors of items for every system of the recipe, from one prefix pass."""
    recipe, backbone = _loaded(recipe_json)
    wanted = [s for s in measured_systems(recipe) if s != "slq_fine"]
    if "slq_fine" in recipe.eval.systems and "slq" not in wanted:
        wanted.append("slq")
    encoders = {system: encoder_of(recipe, system, backbone) for system in wanted}
    for system, encoder in encoders.items():
        if system in ("last_token", "untrained"):
            continue
        folder = adapter_folder(recipe, system)
        require_same_fingerprint(
            load_adapter_config(folder).fingerprint,
            encoder.fingerprint,
            expected_in=f"adapter {folder}",
            found_in="the recipe's backbone with it",
            remedy="measure with the backbone section that it was trained with",
        )
    shape = (len(items), backbone.hidden_size)
    vectors = {system: np.empty(shape, np.float32) for system in encoders}
    for chunk in batches_by_length(items, recipe.embed.batch_size):
        batch = [items[n] for n in chunk]
        prefix = backbone.prefix(backbone.prompts(batch))
        for system, encoder in encoders.items():
            shared = encoder.backbone is backbone  # not where a baseline has changed its own
            found = encoder.encode_prefix(prefix) if shared else encoder.encode_items(batch)
            vectors[system][chunk] = found.cpu().numpy()
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


def summarise(recipe: Recipe, benchmark: Benchmark, scores: dict[str, Scores]) -> dict[str, Any]:
    """Metrics of every system on every subset, in both directions, with 95% bootstrap intervals."""
    ks = recipe.eval.ks
    results: dict[str, Any] = {
        "num_items": len(benchmark.items),
        "num_queries": len(benchmark.queries),
        "num_unreadable": benchmark.num_unreadable,
        "systems": {},
    }
    per_query: dict[str, NDArray[np.float64]] = {}
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
