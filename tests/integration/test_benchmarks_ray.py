"""Benchmarks from publishers' files to results, with the tiny backbone: as loops over encoder and reranker say."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from jobs.console import generate_files
from pipelines.embed import embed
from pipelines.evaluate import evaluate
from pipelines.index import index
from pipelines.loading import backbone_of, encoder_of, reranker_of
from pipelines.recipe import Recipe
from slq.media import decode_image
from slq.schema import Item
from tests.integration.runs import changed, with_untrained_adapter
from tests.unit.benchmark_files import WRITERS

pytestmark = [pytest.mark.ray, pytest.mark.slow]
Rows = list[dict[str, Any]]


def recipe_of(folder: Path, name: str, **eval_keys: Any) -> Recipe:
    """The recipe of a small benchmark, its tables written and an untrained adapter saved."""
    data = folder / "data"
    data.mkdir()
    recipe = changed(
        Recipe(),
        data={"dir": data, "benchmark": WRITERS[name](data)},
        adapter={"num_latents": 4},
        rerank={"depth": 3},
        eval={"ks": (1, 2), **eval_keys},
        storage={"dir": folder / "run"},
    )
    generate_files(recipe.data)
    return with_untrained_adapter(recipe)


def table(recipe: Recipe, name: str) -> Rows:
    rows: Rows = pq.read_table(recipe.data.dir / f"{name}.parquet").to_pylist()
    return rows


def items(recipe: Recipe, name: str) -> list[Item]:
    """The table's rows as items, images read by hand."""
    return [
        Item(
            id=row["id"],
            text=row["text"],
            image=decode_image((recipe.data.dir / row["uri"]).read_bytes()) if row["uri"] else None,
        )
        for row in table(recipe, name)
    ]


def similarities(recipe: Recipe) -> NDArray[np.float32]:
    """(rows of queries, items)."""
    encoder = encoder_of(recipe)
    return encoder.encode(items(recipe, "queries")) @ encoder.encode(items(recipe, "gallery")).T


def run(recipe: Recipe, system: str) -> dict[str, list[str]]:
    """Items of each query in the order of the run file."""
    found: dict[str, list[str]] = {}
    path = recipe.storage.evaluation / f"run_{system}.parquet"
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["query_id"], []).append(row["item_id"])
    return found


def test_sugar_crepe_in_either_order_of_its_captions(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    recipe = recipe_of(tmp_path / "first", "sugar_crepe", systems=("slq", "slq_fine"))
    results = evaluate(recipe)
    scores = similarities(recipe)
    column = {row["id"]: n for n, row in enumerate(table(recipe, "gallery"))}
    right = {
        row["id"]: scores[n, column[f"{row['id']}-true"]] > scores[n, column[f"{row['id']}-false"]]
        for n, row in enumerate(table(recipe, "queries"))
    }
    report = results["systems"]["slq"]["text_to_image"]
    for kind in ("replace_obj", "swap_att"):
        of_kind = [value for name, value in right.items() if name.startswith(kind)]
        assert report[kind]["hit@1"] == pytest.approx(np.mean(of_kind))
        assert report[kind]["hit@2"] == 1.0  # only two are ranked
    assert results["systems"]["slq"]["groups"]["swap"]["hit@1"] == report["swap_att"]["hit@1"]
    for found in (run(recipe, "slq"), run(recipe, "slq_fine")):
        for name, ranking in found.items():
            assert set(ranking) == {f"{name}-true", f"{name}-false"}
    (tmp_path / "second").mkdir()
    other = recipe_of(tmp_path / "second", "sugar_crepe", systems=("slq", "slq_fine"))
    section = other.data.benchmark
    assert section is not None
    other = changed(other, data={"benchmark": section.model_dump() | {"positive": "second"}})
    generate_files(other.data)
    turned = evaluate(other)
    for system in ("slq", "slq_fine"):
        assert results["systems"][system]["depends_on_order"] == 0
        assert turned["systems"][system] == results["systems"][system]
        assert run(other, system) == run(recipe, system)


def test_cirr_masks_the_reference_for_both_stages_and_the_index(
    ray_cluster: None, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, "cirr", systems=("slq", "slq_fine", "slq_index"))
    embed(recipe)
    index(recipe)
    results = evaluate(recipe)
    scores = similarities(recipe)
    names = [row["id"] for row in table(recipe, "gallery")]
    queries = table(recipe, "queries")
    answers = {row["query_id"]: row["item_id"] for row in table(recipe, "relevance")}
    places: dict[str, list[int]] = {"all images": [], "subset": []}
    for n, query in enumerate(queries):
        reference = Path(query["uri"]).stem
        pool = names if query["kind"] == "all images" else names[:6]
        ranking = [names[i] for i in np.argsort(-scores[n]) if names[i] in pool]
        ranking.remove(reference)
        assert run(recipe, "slq")[query["id"]] == ranking
        assert run(recipe, "slq_index")[query["id"]] == ranking
        fine = run(recipe, "slq_fine")[query["id"]]
        assert set(fine[:3]) == set(ranking[:3])
        assert fine[3:] == ranking[3:]
        places[query["kind"]].append(1 + ranking.index(answers[query["id"]]))
    for system in ("slq", "slq_index"):
        for kind, found in places.items():
            entry = results["systems"][system]["text_to_image"][kind]
            for k in (1, 2, 3, 5, 10, 50):  # of the recipe, and of the benchmark's own metrics
                assert entry[f"recall@{k}"] == pytest.approx(np.mean([p <= k for p in found]))
    assert results["index"]["kept@2"] == 1.0
    assert results["benchmark"]["headline"]["subset"] == ["recall@1", "recall@2", "recall@3"]


def test_fashion_iq_averages_the_scores_of_both_wordings_in_both_stages(
    ray_cluster: None, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, "fashion_iq", systems=("slq", "slq_fine"))
    results = evaluate(recipe)
    scores = similarities(recipe)
    gallery, queries = items(recipe, "gallery"), items(recipe, "queries")
    reranker = reranker_of(recipe, backbone_of(recipe))
    names = [item.id for item in gallery]
    groups = [row["query_group"] for row in table(recipe, "queries")][::2]
    for n, group in enumerate(groups):
        total = scores[2 * n] + scores[2 * n + 1]
        pool = group.split("-")[0]
        ranked = [i for i in np.argsort(-total).tolist() if names[i].startswith(pool)]
        assert run(recipe, "slq")[group] == [names[i] for i in ranked]
        margins = {
            i: sum(float(reranker.score([(queries[2 * n + w], gallery[i])])[0]) for w in (0, 1))
            for i in ranked[:3]
        }
        best = sorted(margins, key=lambda i: -margins[i]) + ranked[3:]
        assert run(recipe, "slq_fine")[group] == [names[i] for i in best]
    system = results["systems"]["slq"]
    kinds = [system["text_to_image"][kind]["recall@10"] for kind in ("dress", "shirt")]
    assert system["groups"]["mean"]["recall@10"] == pytest.approx(np.mean(kinds))
