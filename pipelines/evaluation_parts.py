"""Parts of an evaluation in Ray tasks: vectors of items, and what the fine stage reads of pairs.

What a part gives is kept in the run folder. An evaluation that was ended goes on from there, and one with other metrics
or depths of them embeds nothing again.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark
from pipelines.kept_parts import Arrays, KeptParts, content_digest
from pipelines.loading import (
    adapter_folder,
    backbone_of,
    encoder_of,
    reranker_of,
    reranking_backbone,
    scorer_digest,
    scorer_of,
    use_processors,
)
from pipelines.progress import show
from pipelines.recipe import EMBED_AS_SLQ, VARIANT_MARK, Recipe
from pipelines.tasks import collect, model_task, parts
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.backbones import Backbone
from slq.backbones.loading import backbone_revision
from slq.encoder import batches_by_length
from slq.reranker import Reranker
from slq.reranking.profiles import Reading, averaged, profile_by_name
from slq.schema import Item

_UNTRAINED = ("last_token", "untrained")
_FIELDS = ("margin", "label_mass", "entropy", "hundredths", "context_free")


def measured_systems(recipe: Recipe) -> list[str]:
    """The systems of the recipe; after the trained one come the variants that were trained with it."""
    systems: list[str] = []
    for system in recipe.eval.systems:
        systems.append(system)
        if system == "slq":
            systems += [f"{system}{VARIANT_MARK}{name}" for name in recipe.adapter.variants]
    return systems


def encoded_systems(recipe: Recipe) -> list[str]:
    """The systems whose vectors are needed."""
    wanted = [system for system in measured_systems(recipe) if system not in EMBED_AS_SLQ]
    if {*EMBED_AS_SLQ} & set(recipe.eval.systems) and "slq" not in wanted:
        wanted.append("slq")
    return wanted


def vectors_of_systems(recipe: Recipe, benchmark: Benchmark) -> dict[str, NDArray[np.float32]]:
    """Vectors of each system, gallery items first, then every wording of the queries."""
    everything = [*benchmark.items, *benchmark.worded]
    section = recipe.backbone
    revision = backbone_revision(section.name, section.revision)
    identity = {
        "backbone": {**section.model_dump(mode="json"), "revision": revision},
        "adapters": {name: _fingerprint(recipe, name) for name in encoded_systems(recipe)},
        "untrained": recipe.adapter.model_dump(mode="json", exclude={"variants"}),
        "batch_size": recipe.embed.batch_size,
        "content": content_digest(everything),
    }
    kept = KeptParts(recipe.storage.evaluation / "vectors", identity)
    task = model_task(_embedded, recipe.resources.gpus_per_worker)
    recipe_json = recipe.model_dump_json()
    slices = parts(len(everything))

    def begin(number: int) -> Any:
        return task.remote(number, recipe_json, everything[slices[number]])

    found = _made(kept, len(slices), begin, "eval embedded part")
    return {system: np.concatenate([part[system] for part in found]) for system in found[0]}


def _fingerprint(recipe: Recipe, system: str) -> str:
    """Of a trained system's adapter; empty of one that needs none."""
    if system in _UNTRAINED:
        return ""
    return load_adapter_config(adapter_folder(recipe, system)).fingerprint


def read_best(
    recipe: Recipe, benchmark: Benchmark, best: Sequence[NDArray[np.int64]]
) -> list[list[Reading]]:
    """Readings of each query with its best items: of several wordings the mean.

    Args:
        recipe: The resolved recipe.
        benchmark: Gallery and queries.
        best: Of each query, columns of the items that are scored.
    """
    import ray

    owner = benchmark.query_of_wording.tolist()
    wordings, of_wording = benchmark.worded, [best[n] for n in owner]
    identity = {
        "scorer": scorer_digest(scorer_of(recipe, reranking_backbone(recipe, weights=False))),
        "vocabulary": profile_by_name(recipe.rerank.profile).needs_vocabulary,
        "batch_size": recipe.rerank.batch_size,
        "content": content_digest(benchmark.items, wordings),
        "pairs": _digest(of_wording),
    }
    kept = KeptParts(recipe.storage.evaluation / "readings", identity)
    task = model_task(_scored, recipe.resources.gpus_per_worker)
    recipe_json, items = recipe.model_dump_json(), ray.put(benchmark.items)
    slices = parts(len(wordings))

    def begin(number: int) -> Any:
        part = slices[number]
        return task.remote(number, recipe_json, wordings[part], items, of_wording[part])

    found = _made(kept, len(slices), begin, "eval fine stage part")
    rows = [_readings(row) for part in found for row in part["readings"].tolist()]
    each = iter(rows)
    by_wording = [list(islice(each, len(row))) for row in of_wording]
    if benchmark.wordings is None:
        return by_wording
    of_query: list[list[list[Reading]]] = [[] for _ in best]
    for n, row in zip(owner, by_wording, strict=True):
        of_query[n].append(row)
    return [[averaged(one) for one in zip(*rows, strict=True)] for rows in of_query]


def _digest(rows: Sequence[NDArray[np.int64]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(row, dtype=np.int64).data)
    return digest.hexdigest()


def _made(kept: KeptParts, count: int, begin: Callable[[int], Any], what: str) -> list[Arrays]:
    """Arrays of all parts; those that are not kept come from tasks, and are kept as soon as they are there.

    Args:
        kept: Those of before.
        count: How many there are.
        begin: Starts the task of a part, which gives its number and its arrays.
        what: What is done, for people.
    """
    found = {n: part for n in range(count) if (part := kept.get(n)) is not None}
    if found:
        show(f"{what}: {len(found)} of {count} are there already")

    def keep(part: tuple[int, Arrays]) -> None:
        number, arrays = part
        found[number] = arrays
        kept.put(number, arrays)

    missing = [n for n in range(count) if n not in found]
    if missing:
        collect([begin(n) for n in missing], what, keep)
    return [found[n] for n in range(count)]


def _embedded(number: int, recipe_json: str, items: list[Item]) -> tuple[int, Arrays]:
    return number, dict(embed_part(recipe_json, items))


def _scored(
    number: int,
    recipe_json: str,
    queries: list[Item],
    items: list[Item],
    best: list[NDArray[np.int64]],
) -> tuple[int, Arrays]:
    rows = [
        [np.nan if (value := getattr(one, name)) is None else value for name in _FIELDS]
        for readings in score_part(recipe_json, queries, items, best)
        for one in readings
    ]
    return number, {"readings": np.array(rows, np.float64).reshape(-1, len(_FIELDS))}


def _readings(row: list[float]) -> Reading:
    """A reading as `_scored` has told it."""
    margin, *others = row
    told = dict(zip(_FIELDS[1:], others, strict=True))
    known: dict[str, Any] = {name: value for name, value in told.items() if not np.isnan(value)}
    if "hundredths" in known:
        known["hundredths"] = int(known["hundredths"])
    return Reading(margin, **known)


@cache
def _loaded(recipe_json: str) -> tuple[Recipe, Backbone]:
    """One backbone per worker process, whatever the number of its tasks."""
    recipe = Recipe.model_validate_json(recipe_json)
    use_processors(recipe.eval.num_threads)
    return recipe, backbone_of(recipe)


@cache
def _reranker(recipe_json: str) -> Reranker:
    recipe, backbone = _loaded(recipe_json)
    return reranker_of(recipe, reranking_backbone(recipe) if recipe.rerank.backbone else backbone)


def embed_part(recipe_json: str, items: list[Item]) -> dict[str, NDArray[np.float32]]:
    """Vectors of items for every system of the recipe, from one prefix pass."""
    recipe, backbone = _loaded(recipe_json)
    encoders = {system: encoder_of(recipe, system, backbone) for system in encoded_systems(recipe)}
    for system, encoder in encoders.items():
        if system in _UNTRAINED:
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
    recipe_json: str, queries: list[Item], items: list[Item], best: list[NDArray[np.int64]]
) -> list[list[Reading]]:
    """Readings of each query with its best items; as much as the profile orders by."""
    reranker = _reranker(recipe_json)
    pairs = [(query, items[int(i)]) for query, row in zip(queries, best, strict=True) for i in row]
    if reranker.profile.needs_vocabulary:
        readings = reranker.read(pairs)
    else:
        readings = [Reading(margin) for margin in reranker.score(pairs).tolist()]
    found = iter(readings)
    return [list(islice(found, len(row))) for row in best]
