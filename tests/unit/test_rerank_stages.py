"""The stages of `slq rerank` in this process: what is planned, gathered, scored, put in order and judged."""

import json
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from pipelines import rerank as flow_module
from pipelines.corpus import Corpus
from pipelines.loading import backbone_of
from pipelines.recipe import Recipe
from pipelines.rerank import plan, rerank
from pipelines.reranking import catalogue
from pipelines.reranking.catalogue import located
from pipelines.reranking.flow import Flow
from pipelines.reranking.plan import POOL, chosen, pairs_of, read_pairs, shared_image
from pipelines.reranking.score import ScorePairs
from pipelines.reranking.windows import windows_of
from pipelines.runs import read_run
from slq.errors import (
    ArtifactError,
    ArtifactMismatchError,
    ConfigError,
    DataError,
    HardwareError,
    StorageError,
)
from slq.files import file_sha256
from slq.media import decode_image
from slq.reranker import Reranker
from slq.reranking.calibration import is_held_out
from slq.reranking.depth import AdaptiveDepth, depth_of
from slq.schema import Item
from tests.faulty_store import faulty_store
from tests.integration.runs import broken_corpus, changed, fingerprints_of_files, write_run

Rows = list[dict[str, Any]]


@pytest.fixture
def recipe(tiny_run: Recipe, tmp_path: Path) -> Recipe:
    settings = {"depth": 4, "shard_pairs": 16, "batch_size": 8}
    return write_run(changed(tiny_run, rerank=settings), tmp_path / "run.parquet")


class Recorder:
    """Stands for a Ray data set: keeps how each step was asked for, and runs the steps in this process."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self.tables = tables
        self.steps: list[tuple[Any, dict[str, Any]]] = []

    def map_batches(self, step: Any, **options: Any) -> "Recorder":
        self.steps.append((step, options))
        call = step(**options["fn_constructor_kwargs"]) if isinstance(step, type) else step
        self.tables = [call(table, **options.get("fn_kwargs", {})) for table in self.tables]
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for table in self.tables:
            yield from table.to_pylist()


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Let `rerank` run in this process."""
    found: list[Recorder] = []

    def from_items(items: Rows, *, override_num_blocks: int) -> Recorder:
        assert override_num_blocks == len(items)
        found.append(Recorder([pa.Table.from_pylist([item]) for item in items]))
        return found[-1]

    def looked_through(corpus: Corpus, wanted: pa.Array) -> list[pa.Table]:
        return [located(corpus, shard, wanted) for shard in corpus.shards(7)]

    monkeypatch.setattr(ray.data, "from_items", from_items)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(catalogue, "_of_corpus", looked_through)
    monkeypatch.setattr(flow_module, "start_journal", lambda: None)
    return found


def items_of(recipe: Recipe, name: str) -> dict[str, Item]:
    return {
        row["id"]: Item(
            text=row["text"], image=decode_image(row["image"]) if row.get("image") else None
        )
        for row in pq.read_table(recipe.data.path(name)).to_pylist()
    }


def by_hand(recipe: Recipe, reranker: Reranker) -> dict[str, list[tuple[str, float | None]]]:
    """Each query's items in order with their margins, one `rank` at a time."""
    queries, items = items_of(recipe, "queries"), items_of(recipe, "corpus")
    assert recipe.rerank.run is not None
    run = read_run(recipe.rerank.run).to_pylist()
    found = {}
    for name in dict.fromkeys(row["query_id"] for row in run):
        rows = [row for row in run if row["query_id"] == name]
        ranking = reranker.rank(
            queries[name],
            [items[row["item_id"]] for row in rows],
            [row["coarse_score"] for row in rows],
            depth=recipe.rerank.depth,
        )
        found[name] = [(rows[one.index]["item_id"], one.fine_score) for one in ranking]
    return found


def ranked(recipe: Recipe) -> dict[str, list[tuple[str, float | None]]]:
    table = pq.read_table(Path(recipe.storage.reranking) / "run.parquet")
    found: dict[str, list[tuple[str, float | None]]] = {}
    for row in table.to_pylist():
        assert row["rank"] == len(found.get(row["query_id"], [])) + 1
        found.setdefault(row["query_id"], []).append((row["item_id"], row["fine_score"]))
    return found


def assert_same(
    found: dict[str, list[tuple[str, float | None]]],
    wanted: dict[str, list[tuple[str, float | None]]],
) -> None:
    assert found.keys() == wanted.keys()
    for query, ranking in wanted.items():
        assert [item for item, _ in found[query]] == [item for item, _ in ranking]
        for (_, ours), (_, theirs) in zip(found[query], ranking, strict=True):
            assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-5))


# ---- the plan ----


@pytest.mark.parametrize("seed", range(5))
def test_the_best_candidates_of_each_query_are_chosen(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {"query_id": f"q{q}", "item_id": f"i{n}", "coarse_score": rng.choice([0.1, 0.2, 0.9])}
        for q in range(7)
        for n in range(rng.randint(1, 9))
    ]
    for query in {row["query_id"] for row in rows}:
        mine = [row for row in rows if row["query_id"] == query]
        mine.sort(key=lambda row: -float(row["coarse_score"]))
        rows = [row for row in rows if row["query_id"] != query] + mine
    run = pa.Table.from_pylist(rows)
    rule = AdaptiveDepth(temperature=0.2) if seed % 2 else None
    wanted = []
    for query in dict.fromkeys(row["query_id"] for row in rows):
        numbers = [n for n, row in enumerate(rows) if row["query_id"] == query]
        coarse = np.array([rows[n]["coarse_score"] for n in numbers])
        wanted += numbers[: depth_of(coarse, 5, rule)]
    assert chosen(run, 5, rule).to_pylist() == wanted


def places(rows: Rows) -> pa.Table:
    blank = dict.fromkeys(("uri", "text", "problem"))
    return pa.Table.from_pylist([{**blank, **row} for row in rows])


def test_pairs_of_one_image_stand_together_and_no_pair_is_lost() -> None:
    rng = random.Random(5)
    queries = places(
        [{"id": f"q{n}", "uri": f"q{n}.png" if n < 3 else None, "text": "t"} for n in range(6)]
    )
    items = places([{"id": f"i{n}", "uri": f"i{n % 4}.png" if n < 8 else None} for n in range(9)])
    rows = [(q, i) for q in range(6) for i in range(9)]
    rng.shuffle(rows)
    run = pa.table(
        {
            "query_id": [f"q{q}" for q, _ in rows],
            "item_id": [f"i{i}" for _, i in rows],
            "coarse_score": [0.5] * len(rows),
        }
    )
    pairs = pairs_of(run, pa.array(range(len(rows))), queries, items)
    assert sorted(pairs["pair"].to_pylist()) == list(range(54))
    for row in pairs.to_pylist():
        q, i = rows[row["pair"]]
        assert (row["query_id"], row["item_id"]) == (f"q{q}", f"i{i}")
        assert row["query_uri"] == (f"q{q}.png" if q < 3 else None)
        assert row["item_uri"] == (f"i{i % 4}.png" if i < 8 else None)
    shared = shared_image(pairs).to_pylist()
    changes = sum(a != b for a, b in pairwise(shared))
    assert changes == len(set(shared)) - 1


def test_a_pair_that_names_nothing_is_planned_with_its_problem() -> None:
    run = pa.table(
        {
            "query_id": ["q", "x", "q"],
            "item_id": ["a", "a", "gone"],
            "coarse_score": [3.0, 2.0, 1.0],
        }
    )
    queries = places([{"id": "q", "text": "t"}])
    items = places([{"id": "a", "text": "t", "problem": "it is broken"}])
    pairs = pairs_of(run, pa.array([0, 1, 2]), queries, items).sort_by("pair")
    assert pairs["problem"].to_pylist() == [
        "it is broken",
        "the query is not there",
        "the item is not there",
    ]


# ---- the whole flow, without a cluster ----


def test_a_run_is_ranked_as_the_reranker_ranks_each_query(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    result = rerank(recipe)
    reranker = Reranker(backbone_of(recipe))
    assert_same(ranked(recipe), by_hand(recipe, reranker))
    ((_, options),) = recorders[0].steps
    assert options["batch_size"] is None  # a shard is a block, and stays one
    assert options["num_cpus"] == 1
    assert options["num_gpus"] is None
    queries = len(ranked(recipe))
    assert (result["queries"], result["candidates"]) == (queries, 6 * queries)
    assert (result["scored"], result["unscored"]) == (4 * queries, 0)
    shards = -(-4 * queries // 16)
    assert result["cost"]["shards"] == len(recorders[0].tables) == shards > 2
    # An image is opened once in each shard that shows it.
    store = Flow(recipe, "").ledger().store
    shown = [len(pc.unique(shared_image(read_pairs(store, n)))) for n in range(shards)]
    assert result["cost"]["vision_passes"] == sum(shown)


def test_scores_fall_down_every_ranking_so_that_other_tools_rank_alike(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    rerank(recipe)
    table = pq.read_table(Path(recipe.storage.reranking) / "run.parquet")
    for query in set(table["query_id"].to_pylist()):
        scores = table.filter(pc.equal(table["query_id"], query))["score"].to_pylist()
        assert all(a > b for a, b in pairwise(scores))
    again = read_run(Path(recipe.storage.reranking) / "run.trec")
    assert again["item_id"].to_pylist() == table["item_id"].to_pylist()


def test_a_second_run_scores_nothing_and_changes_no_file(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    first = rerank(recipe)
    folder = Path(recipe.storage.reranking)
    shards = {k: v for k, v in fingerprints_of_files(folder).items() if k.startswith("shards/")}
    content = {name: (folder / name).read_bytes() for name in ("run.parquet", "run.trec")}
    second = rerank(recipe)
    assert len(recorders) == 1
    assert second["cost"]["pairs"] == 0
    assert (second["scored"], second["systems"]) == (first["scored"], first["systems"])
    assert {
        k: v for k, v in fingerprints_of_files(folder).items() if k.startswith("shards/")
    } == shards
    assert {name: (folder / name).read_bytes() for name in content} == content


def test_a_chained_run_re_ranks_what_another_model_ranked(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    """A cascade: the second one looks at the best of the first, and the rest keeps the first one's order."""
    rerank(recipe)
    first = ranked(recipe)
    second = changed(
        recipe,
        rerank={
            "run": Path(recipe.storage.reranking) / "run.parquet",
            "depth": 2,
            "framing": "true_false",
        },
        storage={"dir": tmp_path / "second"},
    )
    rerank(second)
    changes = 0
    for query, ranking in ranked(second).items():
        changes += [item for item, _ in ranking[:2]] != [item for item, _ in first[query][:2]]
        before = [item for item, _ in first[query]]
        assert [item for item, _ in ranking[2:]] == before[2:]
        assert {item for item, _ in ranking[:2]} == set(before[:2])
        assert all((score is not None) == (n < 2) for n, (_, score) in enumerate(ranking))
    assert changes


def test_items_of_an_embedding_data_set_are_those_of_the_corpus(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerank(recipe)
    other = changed(recipe, storage={"dir": tmp_path / "other"})
    data_set_of(other)
    monkeypatch.setattr("pipelines.reranking.catalogue.corpus_of", None)  # it may not be asked
    rerank(other)
    assert ranked(other) == ranked(recipe)


def data_set_of(recipe: Recipe) -> None:
    """A finished embedding data set of the corpus, with vectors that nobody reads."""
    from pipelines.commits import Commit, shard_name
    from pipelines.images import row_uri
    from slq.arrow import embedding_schema
    from slq.files import file_sha256

    rows = pq.read_table(recipe.data.path("corpus")).to_pylist()
    place = str(recipe.data.path("corpus"))
    blank = {"embedding": [0.0, 1.0], "width": 1, "height": 1, "content_hash": "", "shard_id": 0}
    stored = [
        {
            **blank,
            "id": row["id"],
            "text": row["text"],
            "modality": "image" if row["text"] is None else "image+text",
            "uri": row_uri(place, n),
            "row_in_shard": n,
        }
        for n, row in enumerate(rows)
    ]
    folder = Path(recipe.storage.embeddings)
    (folder / "shards").mkdir(parents=True)
    path = folder / shard_name(0)
    pq.write_table(pa.Table.from_pylist(stored, schema=embedding_schema(2, [])), path)
    commit = Commit(0, len(rows), 0, file_sha256(path), path.stat().st_size, "a")
    (folder / "commits").mkdir()
    (folder / "commits" / "000000.json").write_text(commit.to_json())
    (folder / "manifest.json").write_text(json.dumps({"num_shards": 1, "num_rows": len(rows)}))


def test_an_object_store_holds_what_a_disk_holds(
    recipe: Recipe, recorders: list[Recorder], object_store: str
) -> None:
    rerank(recipe)
    other = changed(recipe, storage={"rerank_dir": f"s3://{object_store}/ranked"})
    found = rerank(other)
    assert found["run"] == f"s3://{object_store}/ranked/run.parquet"
    store, folder = Flow(other, "").ledger().store, Path(recipe.storage.reranking)
    shards = [f"shards/{path.name}" for path in sorted((folder / "shards").iterdir())]
    for name in (*shards, "plan.parquet", "run.parquet", "run.trec", "calibration.json"):
        assert store.read(name) == (folder / name).read_bytes()
    assert len(shards) == found["cost"]["shards"]


# ---- what cannot be scored ----


def test_a_candidate_that_cannot_be_read_keeps_its_coarse_place_and_is_named(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    wanted = by_hand(recipe, Reranker(backbone_of(recipe)))
    worse = broken_corpus(recipe, tmp_path / "corpus.parquet", [3, 11])
    worse = changed(worse, rerank={"max_error_share": 0.5})
    names = pq.read_table(worse.data.path("corpus"))["id"].to_pylist()
    lost = {names[3], names[11]}
    result = rerank(worse)
    assert worse.rerank.run is not None
    pool = read_run(worse.rerank.run).to_pylist()
    met = []
    for query, ranking in ranked(worse).items():
        coarse = [row["item_id"] for row in pool if row["query_id"] == query]
        margins = dict(wanted[query])
        for place, (item, score) in enumerate(ranking):
            if item in lost:
                assert score is None
                assert coarse[place] == item
                met += [item] if place < 4 else []
            elif margins[item] is not None:
                assert score == pytest.approx(margins[item], abs=1e-5)
    assert result["unscored"] == len(met) > 0
    folder = Path(worse.storage.reranking) / "errors"
    errors = pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])
    assert sorted(errors["id"].to_pylist()) == sorted(met)
    assert all("query '" in text for text in errors["message"].to_pylist())


def test_too_many_unreadable_candidates_end_the_run_in_words(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    worse = broken_corpus(recipe, tmp_path / "corpus.parquet", list(range(12)))
    with pytest.raises(
        DataError,
        match=r"pairs \(.*%\) cannot be scored, more than rerank.max_error.*--retry-errors",
    ):
        rerank(worse)
    with pytest.raises(DataError, match="cannot be scored"):  # and it does not go on with the rest
        rerank(worse)


def test_another_question_may_not_go_on_with_what_is_begun(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    rerank(recipe)
    with pytest.raises(ArtifactMismatchError, match=r"begun with other settings.*scorer"):
        rerank(changed(recipe, rerank={"framing": "rate"}))
    with pytest.raises(ArtifactMismatchError, match="depth: 4 -> 3"):
        rerank(changed(recipe, rerank={"depth": 3}))
    assert recipe.rerank.run is not None
    write_run(recipe, recipe.rerank.run, seed=2)
    with pytest.raises(ArtifactMismatchError, match="run_sha256"):
        rerank(recipe)


def test_a_cluster_without_room_is_refused_before_anything_is_loaded(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    with pytest.raises(ConfigError, match="rerank_workers is 5, but the cluster has 4 CPUs"):
        rerank(changed(recipe, resources={"rerank_workers": 5}))
    with pytest.raises(HardwareError, match="the cluster has 0 GPUs"):
        rerank(changed(recipe, resources={"gpus_per_worker": 1}))
    assert recorders == []


def test_a_dry_run_counts_and_writes_nothing(recipe: Recipe) -> None:
    found = plan(recipe)
    queries = len(pc.unique(read_run(Path(found["run"]))["query_id"]))
    assert (found["queries"], found["pairs"]) == (queries, 4 * queries)
    assert found["shards"] == -(-4 * queries // 16)
    assert not Path(recipe.storage.reranking).exists()


def test_mended_images_are_scored_again_and_the_other_shards_stay(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    worse = broken_corpus(recipe, tmp_path / "corpus.parquet", [3])
    worse = changed(worse, rerank={"max_error_share": 0.5})
    first = rerank(worse)
    assert first["unscored"] > 0
    folder = Path(worse.storage.reranking)
    before = fingerprints_of_files(folder)
    bad = {path.name for path in (folder / "errors").iterdir()}
    (tmp_path / "corpus.parquet").write_bytes(recipe.data.path("corpus").read_bytes())
    with pytest.raises(ArtifactMismatchError, match="items"):
        rerank(worse)
    again = rerank(worse, retry_errors=True)
    assert again["unscored"] == 0
    assert again["scored"] == first["scored"] + first["unscored"]
    assert_same(ranked(worse), by_hand(recipe, Reranker(backbone_of(recipe))))
    after = fingerprints_of_files(folder)
    kept = [name for name in before if name.startswith("shards/") and Path(name).name not in bad]
    assert kept
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert len(recorders[-1].tables) == len(bad)
    assert not list((folder / "errors").iterdir())


def test_other_items_or_queries_are_not_taken_for_those_that_were_planned(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    rerank(recipe)
    other = broken_corpus(recipe, tmp_path / "corpus.parquet", [])
    with pytest.raises(ArtifactMismatchError, match=r"items: .*corpus.parquet"):
        rerank(other)
    queries = tmp_path / "queries.parquet"
    queries.write_bytes(recipe.data.path("queries").read_bytes())
    with pytest.raises(ArtifactMismatchError, match=r"queries: .*queries.parquet"):
        rerank(changed(recipe, data={"queries": queries}))


def test_a_run_of_other_items_is_refused_before_a_model_is_loaded(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    table = pq.read_table(recipe.rerank.run)
    ids = pa.array([f"x{name}" for name in table["item_id"].to_pylist()])
    pq.write_table(table.set_column(1, "item_id", ids), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="the item is not there; is the run of these queries"):
        rerank(changed(recipe, rerank={"run": tmp_path / "other.parquet"}))
    assert recorders == []


def test_a_corpus_that_is_gone_for_a_while_costs_no_pair(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    """The file of all images is away when shards are scored: that is no image's fault, and nothing is committed."""
    here, away = tmp_path / "corpus.parquet", tmp_path / "away.parquet"
    moved = broken_corpus(recipe, here, [])
    started = ray.data.from_items

    def losing(items: Rows, *, override_num_blocks: int) -> Recorder:
        here.rename(away)
        recorder: Recorder = started(items, override_num_blocks=override_num_blocks)
        return recorder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.data, "from_items", losing)
        with pytest.raises(StorageError, match=r"corpus.parquet cannot be read.*same command"):
            rerank(moved)
    assert not list((Path(moved.storage.reranking) / "commits").glob("*.json"))
    away.rename(here)
    rerank(moved)
    assert ranked(moved) == ranked_of(recipe, tmp_path)


def ranked_of(recipe: Recipe, tmp_path: Path) -> dict[str, list[tuple[str, float | None]]]:
    """The ranking of a run of its own."""
    other = changed(recipe, storage={"dir": tmp_path / "whole"})
    rerank(other)
    return ranked(other)


def test_an_object_store_that_fails_now_and_then_changes_nothing(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    wanted = ranked_of(recipe, tmp_path)
    with faulty_store(share=0.2) as store:
        other = changed(recipe, storage={"rerank_dir": f"s3://{store.bucket}/ranked"})
        found = rerank(other)
        assert store.count.total() > store.count["none"]
        table = pq.read_table(pa.BufferReader(Flow(other, "").ledger().store.read("run.parquet")))
    assert found["scored"] == sum(score is not None for one in wanted.values() for _, score in one)
    assert table["item_id"].to_pylist() == [item for one in wanted.values() for item, _ in one]


def test_a_shard_of_other_pairs_than_were_planned_is_refused(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    rerank(recipe)
    folder = Path(recipe.storage.reranking)
    path, record = folder / "shards/part-000001.parquet", folder / "commits/000001.json"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, table.num_rows - 1), table.slice(0, 1)]), path)
    told = {**json.loads(record.read_text()), "sha256": file_sha256(path)}
    record.write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match=r"shard 1 of .* other pairs than were planned"):
        rerank(recipe)


# ---- what the fine stage gained ----


def test_judged_queries_without_candidates_are_told_and_not_counted(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    """As trec_eval does by default; the run holds a third of the queries."""
    result = rerank(recipe)
    judged = set(pq.read_table(recipe.data.path("relevance"))["query_id"].to_pylist())
    assert result["judged"] + result["judged_without_candidates"] == len(judged)
    assert result["judged_without_candidates"] > 0


def test_figures_are_those_of_counting(recipe: Recipe, recorders: list[Recorder]) -> None:
    result = rerank(recipe)
    answers = {
        row["query_id"]: row["item_id"]
        for row in pq.read_table(recipe.data.path("relevance")).to_pylist()
    }
    assert recipe.rerank.run is not None
    pool = read_run(recipe.rerank.run).to_pylist()
    coarse: dict[str, list[str]] = {}
    for row in pool:
        coarse.setdefault(row["query_id"], []).append(row["item_id"])
    fine = {query: [item for item, _ in ranking] for query, ranking in ranked(recipe).items()}
    for name, order in (("coarse", coarse), ("fine", fine)):
        for k in (1, 5):
            share = sum(answers[q] in items[:k] for q, items in order.items()) / len(order)
            assert result["systems"][name][f"hit@{k}"] == pytest.approx(share)
        mrr = sum(1 / (1 + items.index(answers[q])) for q, items in order.items()) / len(order)
        assert result["systems"][name]["mrr"] == pytest.approx(mrr)
    assert result["judged"] == len(fine)


def test_a_calibration_is_fitted_to_one_half_and_told_of_the_other(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    result = rerank(recipe)
    names = list(ranked(recipe))
    held_out = [name for name in names if is_held_out(name, 0.5)]
    assert 0 < len(held_out) < len(names)
    assert result["held_out"]["fitted_to"] == len(held_out)
    reported = result["held_out"]["systems"]["fused"]["num_queries"]
    assert reported == len(names) - len(held_out)
    stored = json.loads((Path(recipe.storage.reranking) / "calibration.json").read_text())
    assert stored["num_queries"] == len(held_out)
    # What is reported does not move when the half that it is fitted to is judged otherwise.
    relevance = pq.read_table(recipe.data.path("relevance")).to_pylist()
    items = pq.read_table(recipe.data.path("corpus"))["id"].to_pylist()
    for row in relevance:
        if is_held_out(row["query_id"], 0.5):
            row["item_id"] = items[zlib.crc32(row["query_id"].encode()) % len(items)]
    other = tmp_path / "relevance.parquet"
    pq.write_table(pa.Table.from_pylist(relevance), other)
    again = rerank(changed(recipe, data={"relevance": other}, storage={"dir": tmp_path / "again"}))
    for name in ("coarse", "fine"):
        assert again["held_out"]["systems"][name] == result["held_out"]["systems"][name]
    assert json.loads(Path(again["calibration_file"]).read_text()) != stored


def test_a_calibration_gives_probabilities_and_fuses_and_fits_only_its_own_scorer(
    recipe: Recipe, recorders: list[Recorder], tmp_path: Path
) -> None:
    rerank(recipe)
    path = Path(recipe.storage.reranking) / "calibration.json"
    values = {**json.loads(path.read_text()), "temperature": 2.5, "coarse_weight": 50.0}
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(values))
    plain = pq.read_table(Path(recipe.storage.reranking) / "run.parquet").to_pylist()
    fused = changed(
        recipe,
        rerank={"calibration": mine, "fuse": True},
        storage={"dir": tmp_path / "fused"},
    )
    rerank(fused)
    margins = {(row["query_id"], row["item_id"]): row["fine_score"] for row in plain}
    rows = pq.read_table(Path(fused.storage.reranking) / "run.parquet").to_pylist()
    for row in rows:
        margin = margins[row["query_id"], row["item_id"]]
        if margin is not None:
            total = margin + 50.0 * row["coarse_score"]
            assert row["fine_score"] == pytest.approx(total, abs=1e-3)
            wanted = 1 / (1 + np.exp(-margin / 2.5))
            assert row["probability"] == pytest.approx(wanted, abs=1e-5)
    assert [row["item_id"] for row in rows] != [row["item_id"] for row in plain]
    with pytest.raises(ArtifactMismatchError, match="another model, type or question"):
        rerank(changed(fused, rerank={"framing": "yes_no"}, storage={"dir": tmp_path / "x"}))
    with pytest.raises(Exception, match="fuse needs the weight"):
        changed(recipe, rerank={"fuse": True, "calibration": None})


# ---- bits ----


def test_a_shard_does_not_depend_on_what_was_scored_before_it(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    result = rerank(recipe)
    assert result["cost"]["shards"] > 2
    scorer = json.loads((Path(recipe.storage.reranking) / "run.json").read_text())["scorer"]
    flow = Flow(recipe, scorer)
    rows, _ = ScorePairs(flow).scored(1)
    stored = pq.read_table(Path(recipe.storage.reranking) / "shards/part-000001.parquet")
    assert [np.float32(row["margin"]) for row in rows] == stored["margin"].to_pylist()
    assert pq.read_table(Path(recipe.storage.reranking) / POOL).num_rows == result["candidates"]


class Deadly:
    """An announcer that remembers deaths over some work, as if workers had died before."""

    def __init__(self, *works: str) -> None:
        self._works = works
        self.announced_works: list[str] = []

    @contextmanager
    def announced(self, work: str) -> Iterator[bool]:
        self.announced_works.append(work)
        yield work in self._works


def test_a_pair_that_has_killed_its_workers_is_set_aside_and_its_neighbours_are_scored(
    recipe: Recipe, recorders: list[Recorder]
) -> None:
    rerank(recipe)
    scorer = json.loads((Path(recipe.storage.reranking) / "run.json").read_text())["scorer"]
    flow = Flow(recipe, scorer)
    scoring = ScorePairs(flow)
    calm, _ = scoring.scored(1)
    victim = calm[3]["pair"]
    blank = [{**row, "problem": None} for row in calm]
    cuts = windows_of(blank, recipe.rerank.batch_size, 1.0)
    (number,) = [w.number for w in cuts if victim in [row["pair"] for row in w.rows]]
    deadly = Deadly("rerank 1", f"rerank 1 {number}", f"rerank 1 {number} {victim}")
    scoring._announcer = deadly  # type: ignore[assignment]
    careful, work = scoring.scored(1)
    assert f"rerank 1 {number} {victim}" in deadly.announced_works
    assert [row["pair"] for row in careful if row["problem"]] == [victim]
    assert (work.scored, work.unscored) == (len(calm) - 1, 1)
    for row, before in zip(careful, calm, strict=True):
        if row["pair"] == victim:
            assert row["error"] == "killed_worker"
            assert "workers died while they scored this item" in row["problem"]
        else:
            assert row["margin"] == pytest.approx(before["margin"], abs=1e-5)
