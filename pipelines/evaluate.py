"""Measures several systems on one gallery, in parallel Ray tasks that share each prefix pass."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark, load_benchmark
from pipelines.evaluation_files import write_runs
from pipelines.evaluation_parts import measured_systems, read_best, vectors_of_systems
from pipelines.loading import (
    coarse_weight_of,
    require_shorter,
    reranking_backbone,
)
from pipelines.provenance import provenance
from pipelines.ranking import (
    Scores,
    compared_systems,
    deepest,
    metrics_of,
    shared_best,
    summarise,
)
from pipelines.recipe import EMBED_AS_SLQ, LENGTH_MARK, Recipe
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.backbones.loading import backbone_revision
from slq.errors import DataError
from slq.files import write_json
from slq.index import SearchIndex
from slq.quantization import cut
from slq.reranking.calibration import Calibration, is_held_out
from slq.reranking.depth import depth_of
from slq.reranking.profiles import profile_by_name

log = logging.getLogger(__name__)


def evaluate(recipe: Recipe, *, command: str = "") -> dict[str, Any]:
    """Measure every system of the recipe; writes results.json, run files and relevance, and returns the results.

    Args:
        recipe: The resolved recipe.
        command: The command line, for the record.
    """
    require_shorter(recipe, "eval.dimensions", recipe.eval.dimensions)
    # found before any work is done
    compared_systems(system_names(recipe), recipe.eval.baseline)
    space = embedding_space(recipe)
    if "slq_index" in recipe.eval.systems:
        with open_index(recipe):
            pass  # found before any work is done
    benchmark = _without_fitted(recipe, load_benchmark(recipe))
    scores, facts = score_systems(recipe, benchmark)
    results = {**space, **facts, **summarise(recipe, benchmark, scores)}
    results["provenance"] = provenance(recipe, command=command)
    folder = recipe.storage.evaluation
    write_runs(folder, benchmark, scores, depth=_depth(recipe, benchmark))
    write_json(folder / "results.json", results)
    return results


def _without_fitted(recipe: Recipe, benchmark: Benchmark) -> Benchmark:
    """The benchmark without the queries that the weight of coarse scores may have been fitted to, where it is used."""
    section = recipe.rerank
    if not section.fuse or section.calibration is None or "slq_fine" not in recipe.eval.systems:
        return benchmark
    share = Calibration.load(section.calibration).held_out_share
    kept = [n for n, one in enumerate(benchmark.queries) if not is_held_out(one.id, share)]
    if not kept:
        raise DataError(
            f"calibration {section.calibration} was fitted to all queries, so none is left to measure fused scores on; "
            "fit it to a share of them (rerank.held_out_share)"
        )
    fitted = len(benchmark.queries) - len(kept)
    log.info("%d queries are left out: rerank.calibration was fitted to them", fitted)
    return benchmark.of_queries(kept)


def embedding_space(recipe: Recipe) -> dict[str, Any]:
    """What the results speak of: backbone, revision and, where an adapter is measured, its fingerprint.

    Raises:
        ArtifactError: A trained system is asked for and there is no adapter; found before any work is done.
    """
    if not {"slq", *EMBED_AS_SLQ} & set(recipe.eval.systems):
        section = recipe.backbone
        revision = backbone_revision(section.name, section.revision)
        return {"backbone": {"model": section.name, "revision": revision}, "fingerprint": ""}
    adapter = load_adapter_config(recipe.storage.adapter)
    named = {"model": adapter.base_model_name_or_path, "revision": adapter.revision}
    return {"backbone": named, "fingerprint": adapter.fingerprint}


def system_names(recipe: Recipe) -> list[str]:
    """All rows of the results: the measured systems, and SLQ with its vectors cut."""
    cut_ones = [f"slq{LENGTH_MARK}{length}" for length in recipe.eval.dimensions]
    return [
        name
        for system in measured_systems(recipe)
        for name in (system, *(cut_ones if system == "slq" else ()))
    ]


def _depth(recipe: Recipe, benchmark: Benchmark) -> int:
    """How many items of each query any metric looks at."""
    return deepest(metrics_of(benchmark.depths(recipe.eval.ks), recipe.eval.metrics))


def open_index(recipe: Recipe) -> SearchIndex:
    """The index of the recipe, of the space of its adapter.

    Raises:
        ArtifactError: There is no index, or no adapter.
        ArtifactMismatchError: They belong to different embedding spaces; both fingerprints are named.
        HardwareError: `index.search_device` is not here, or has too little memory.
        StorageError: An engine cannot be reached.
    """
    index = recipe.index_place.open(device=recipe.index.search_device)
    try:
        require_same_fingerprint(
            index.fingerprint,
            load_adapter_config(recipe.storage.adapter).fingerprint,
            expected_in=f"index {recipe.index_place}",
            found_in=f"adapter {recipe.storage.adapter}",
            remedy="rebuild it with `slq embed` and `slq index`",
        )
    except BaseException:
        index.close()
        raise
    return index


def score_systems(recipe: Recipe, benchmark: Benchmark) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Embed gallery and queries in parallel tasks, then score the best candidates in others, or ask the index.

    Returns:
        Scores of each system, and what else is told of the index where it was asked.
    """
    vectors = vectors_of_systems(recipe, benchmark)
    num_items = len(benchmark.items)
    scores: dict[str, Scores] = {}
    facts: dict[str, Any] = {}
    for system in measured_systems(recipe):
        found = vectors["slq" if system in EMBED_AS_SLQ else system]
        exact = _exact(benchmark, found)
        if system == "slq_index":
            queries = benchmark.averaged(found[num_items:])
            scores[system], facts = _through_index(recipe, benchmark, queries, exact)
            continue
        scores[system] = exact
        for length in recipe.eval.dimensions if system == "slq" else ():
            scores[f"{system}{LENGTH_MARK}{length}"] = _exact(benchmark, cut(found, length))
    if "slq_fine" in scores:
        scores["slq_fine"] = _ranked_again(recipe, benchmark, scores["slq_fine"])
        facts["scored_per_query"] = scores["slq_fine"].scored_per_query
    return scores, facts


def _exact(benchmark: Benchmark, vectors: NDArray[np.float32]) -> Scores:
    """Similarities of queries and items, given the vectors of all items and then of all wordings."""
    num_items = len(benchmark.items)
    queries = benchmark.averaged(vectors[num_items:])
    return Scores(benchmark.masked(queries @ vectors[:num_items].T))


def _ranked_again(recipe: Recipe, benchmark: Benchmark, scores: Scores) -> Scores:
    """The same scores with what the fine stage says of each query's best items."""
    section = recipe.rerank
    by_coarse = np.argsort(-scores.coarse, axis=1, kind="stable")
    best = [
        order[: depth_of(coarse[coarse > -np.inf], section.depth, section.adaptive)]
        for coarse, order in zip(scores.coarse, by_coarse, strict=True)
    ]
    weight = 0.0
    if section.fuse:
        weight = coarse_weight_of(recipe, reranking_backbone(recipe, weights=False))
    readings = read_best(recipe, benchmark, best)
    return scores.scored(best, readings, profile_by_name(section.profile), coarse_weight=weight)


def _through_index(
    recipe: Recipe, benchmark: Benchmark, queries: NDArray[np.float32], exact: Scores
) -> tuple[Scores, dict[str, Any]]:
    """What the index gives for (queries, dimension) vectors, and how much of the exact ranking is in it.

    An index knows nothing of what a query may rank, so it is asked for as many items more as that may cut.
    """
    depth = _depth(recipe, benchmark)
    if benchmark.allowed is not None:
        depth += int((~benchmark.allowed).sum(axis=1).max())
    with open_index(recipe) as index:
        hits = index.search(queries, min(depth, len(benchmark.items)))
        found = Scores.of_hits(benchmark, hits)
        told = {"engine": recipe.index.engine, "version": index.version, "num_vectors": len(index)}
    kept = {f"kept@{k}": shared_best(exact, found, k) for k in recipe.eval.ks}
    return found, {"index": {**told, **kept}}
