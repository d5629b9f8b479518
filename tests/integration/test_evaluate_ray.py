"""Evaluation on the tiny gallery: numbers that a plain loop over the encoder gives, written where it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.results import results_table
from jobs.scoring import scored
from pipelines.benchmark import load_benchmark
from pipelines.evaluate import evaluate
from pipelines.loading import backbone_of, encoder_of, untrained_latents
from pipelines.recipe import Recipe
from slq.arrow import ITEMS, RELEVANCE
from slq.artifacts import save_adapter
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError
from slq.files import file_sha256
from slq.media import decode_image
from tests.integration.runs import changed, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def measured(
    ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, dict[str, Any]]:
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        adapter={"num_latents": 4},
        rerank={"depth": 3},
        eval={"metrics": ("ndcg@10",), "baseline": "slq"},
        storage={"dir": tmp_path_factory.mktemp("evaluate")},
    )
    recipe = with_untrained_adapter(recipe)
    return recipe, evaluate(recipe, command="slq eval mine.yaml")


def test_results_are_written_as_they_are_returned(measured: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, results = measured
    written = json.loads((recipe.storage.evaluation / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert (results["num_items"], results["num_queries"]) == (32, 64)
    assert set(results["systems"]) == set(recipe.eval.systems)
    told = results["provenance"]
    assert told["command"] == "slq eval mine.yaml"
    assert told["data"]["queries"] == file_sha256(recipe.data.path("queries"))
    assert set(told["data"]) == {"dir", "corpus", "queries", "relevance"}
    assert told["hardware"]["cluster"]["nodes"] == 1
    tests = results["paired"]["text_to_image"]["explicit"]["ndcg@10"]
    assert [test["systems"] for test in tests] == [
        (name, "slq") for name in ("last_token", "untrained", "slq_fine")
    ]
    assert tests[1]["difference"] == 0.0  # the same latents
    assert tests[1]["p"] == 1.0


def test_run_files_score_as_the_evaluation_says(measured: tuple[Recipe, dict[str, Any]]) -> None:
    """In TREC's format, by the command's own way; subsets share the queries out between them."""
    recipe, results = measured
    folder = recipe.storage.evaluation
    for system, of in results["systems"].items():
        found = scored([folder / f"run_{system}.trec"], folder / "qrels.trec", "hit@5,ndcg@10")
        (one,) = found["runs"]
        assert (found["num_queries"], one["missing"]["count"], one["unjudged"]["count"]) == (
            64,
            0,
            0,
        )
        disjoint = [of["text_to_image"][k] for k in of["text_to_image"] if "hard" not in k]
        for name in ("hit@5", "ndcg@10"):
            mean = sum(entry[name] * entry["num_queries"] for entry in disjoint) / 64
            assert one["figures"][name] == pytest.approx(mean, abs=1e-9), (system, name)


def test_a_baseline_that_is_not_measured_is_refused_before_any_work(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, _ = measured
    with pytest.raises(ConfigError, match=r"eval\.baseline 'slq@48' is not measured; name one of"):
        evaluate(changed(recipe, eval={"baseline": "slq@48"}))


def test_hits_equal_those_of_a_plain_loop_over_the_encoder(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, results = measured
    gallery = pq.read_table(recipe.data.path("corpus")).to_pylist()
    queries = pq.read_table(recipe.data.path("queries")).to_pylist()
    encoder = encoder_of(recipe)
    items = encoder.encode([decode_image(row["image"]) for row in gallery])
    found = encoder.encode([row["text"] for row in queries]) @ items.T
    report = results["systems"]["slq"]["text_to_image"]
    for kind in ("explicit", "knowledge"):
        chosen = [
            n for n, row in enumerate(queries) if row["kind"] == kind and row["split"] == "test"
        ]
        for k in (1, 5, 10):
            hit = []
            for n in chosen:
                wanted = queries[n]["id"].rsplit("-", 1)[0]
                best = [gallery[i]["id"] for i in np.argsort(-found[n])[:k]]
                hit.append(wanted in best)
            assert report[kind][f"hit@{k}"] == pytest.approx(np.mean(hit))
        low, high = report[kind]["hit@1_interval"]
        assert low <= report[kind]["hit@1"] <= high
        assert report[kind]["num_queries"] == len(chosen) == 24


def test_an_adapter_that_was_never_trained_is_as_good_as_the_untrained_system(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    systems = measured[1]["systems"]
    assert systems["slq"] == systems["untrained"]
    assert systems["last_token"] != systems["slq"]


def test_variants_are_measured_beside_the_adapter(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, before = measured
    variants: dict[str, dict[str, int]] = {"same": {}, "one": {"num_latents": 1}}
    recipe = changed(
        recipe,
        adapter={"variants": variants},
        train={"zero_stage": 0},
        eval={"systems": ("slq",), "dimensions": (48,)},
        storage={"dir": recipe.storage.dir.with_name("variants")},
    )
    recipe = with_untrained_adapter(recipe)
    backbone = backbone_of(recipe)
    for name in variants:
        latents = untrained_latents(recipe, backbone, name)
        save_adapter(recipe.storage.variant(name), backbone, latents)
    systems = evaluate(recipe)["systems"]
    assert list(systems) == ["slq", "slq@48", "slq:same", "slq:one"]
    assert systems["slq:same"] == systems["slq"] == before["systems"]["slq"]
    assert systems["slq:one"] != systems["slq"]
    rows = pq.read_table(recipe.storage.evaluation / "run_slq.cut.48.parquet").to_pylist()
    encoder = encoder_of(recipe)
    texts = {
        row["id"]: row["text"] for row in pq.read_table(recipe.data.path("queries")).to_pylist()
    }
    images = {
        row["id"]: row["image"] for row in pq.read_table(recipe.data.path("corpus")).to_pylist()
    }
    for row in rows[:3]:
        pair = encoder.encode([texts[row["query_id"]], decode_image(images[row["item_id"]])])[
            :, :48
        ]
        cosine = pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])
        assert row["coarse_score"] == pytest.approx(float(cosine), abs=1e-5)
    runs = {path.name for path in recipe.storage.evaluation.glob("run_*.parquet")}
    names = ("", ".cut.48", ".variant.one", ".variant.same")
    assert runs == {f"run_slq{name}.parquet" for name in names}
    with pytest.raises(
        ConfigError, match=r"eval\.dimensions \[192\] must be different lengths below 192"
    ):
        evaluate(changed(recipe, eval={"dimensions": (192,)}))
    shutil.rmtree(recipe.storage.variant("one"))
    with pytest.raises(ArtifactError, match=r"variants/one holds no adapter"):
        evaluate(recipe)


def test_run_files_hold_the_ranking_with_margins_only_where_pairs_were_scored(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, _ = measured
    runs = {
        system: pq.read_table(recipe.storage.evaluation / f"run_{system}.parquet").to_pylist()
        for system in ("slq", "slq_fine")
    }
    for rows in runs.values():
        assert len(rows) == 64 * 10
        for start in range(0, len(rows), 10):
            ranking = rows[start : start + 10]
            assert [row["rank"] for row in ranking] == list(range(1, 11))
            scores = [row["score"] for row in ranking]
            assert scores == sorted(scores, reverse=True)
    assert all(row["fine_score"] is None for row in runs["slq"])
    for start in range(0, 640, 10):
        coarse = [row["item_id"] for row in runs["slq"][start : start + 10]]
        fine = runs["slq_fine"][start : start + 10]
        assert {row["item_id"] for row in fine[:3]} == set(coarse[:3])  # the depth of the recipe
        assert [row["item_id"] for row in fine[3:]] == coarse[3:]
        assert [row["fine_score"] is not None for row in fine] == [True] * 3 + [False] * 7


def test_unreadable_items_are_left_out_and_counted(
    measured: tuple[Recipe, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, whole = measured
    rows = pq.read_table(recipe.data.path("corpus")).to_pylist()
    rows[2]["image"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEMS), tmp_path / "corpus.parquet")
    found = load_benchmark(changed(recipe, data={"corpus": str(tmp_path / "corpus.parquet")}))
    assert len(found.items) == whole["num_items"] - 1
    assert rows[2]["id"] not in {item.id for item in found.items}
    assert not any(query.id.startswith(f"{rows[2]['id']}-") for query in found.queries)
    assert found.num_unreadable == 1 + whole["num_queries"] - len(found.queries)
    assert found.relevant.shape == (len(found.queries), len(found.items))
    assert found.relevant.any(axis=1).all()


def test_what_was_embedded_and_read_is_not_done_again(
    measured: tuple[Recipe, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, results = measured
    kept = sorted(recipe.storage.evaluation.glob("*/part-*.safetensors"))
    assert {path.parent.name for path in kept} == {"vectors", "readings"}
    before = {path: path.stat().st_mtime_ns for path in kept}
    damaged = kept[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = evaluate(changed(recipe, eval={"metrics": ("map",), "ks": (1, 3)}))
    told = capsys.readouterr().err
    assert "eval fine stage part: 7 of 8 are there already" in told
    assert "eval embedded part: 8 of 8 are there already" in told
    made = {path for path in kept if path.stat().st_mtime_ns != before[path]}
    assert made == {damaged}
    for system, report in again["systems"].items():
        for subset, entry in report["text_to_image"].items():
            was = results["systems"][system]["text_to_image"][subset]
            assert (entry["hit@1"], entry["mrr"]) == (was["hit@1"], was["mrr"])


def test_an_adapter_of_another_weight_type_is_refused_with_both_fingerprints(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, _ = measured
    other = changed(recipe, backbone={"dtype": "bfloat16"}, eval={"systems": ("slq",)})
    with pytest.raises(
        ArtifactMismatchError, match=r"fingerprint [0-9a-f]{64}, but .*[0-9a-f]{64}"
    ):
        evaluate(other)


def test_only_trained_systems_need_an_adapter(tiny_run: Recipe) -> None:
    with pytest.raises(ArtifactError, match="holds no adapter"):
        evaluate(changed(tiny_run, eval={"systems": ("slq",)}))
    results = evaluate(changed(tiny_run, eval={"systems": ("last_token",), "ks": (5,)}))
    assert results["backbone"]["model"] == "tiny"
    assert "hit@5" in results["systems"]["last_token"]["text_to_image"]["explicit"]
    assert results_table(results).title == "text -> image, hit@5 in % (95% interval)"


def test_relevance_that_fits_no_file_is_a_data_error(
    measured: tuple[Recipe, dict[str, Any]], tmp_path: Path
) -> None:
    recipe, _ = measured
    rows = pq.read_table(recipe.data.path("relevance")).to_pylist()
    path = tmp_path / "relevance.parquet"
    changed_recipe = changed(recipe, data={"relevance": path})
    unknown = [*rows, {"query_id": rows[0]["query_id"], "item_id": "absent", "grade": 1}]
    pq.write_table(pa.Table.from_pylist(unknown, schema=RELEVANCE), path)
    with pytest.raises(DataError, match="absent names a query or item that is not in the files"):
        evaluate(changed_recipe)
    pq.write_table(pa.Table.from_pylist(rows[1:], schema=RELEVANCE), path)
    with pytest.raises(DataError, match=f"1 queries have no relevant item.*{rows[0]['query_id']}"):
        evaluate(changed_recipe)
