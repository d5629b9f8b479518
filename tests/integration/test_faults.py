"""Real faults under the embedding flow: a full disk, a killed actor, two runs at once. Rows out stay rows in."""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.bench.embedding.stand_in import KILLS_ENCODE, KILLS_PREPARE
from pipelines.commits import Commit, shard_name
from pipelines.embed import embed
from pipelines.embedding import sealing
from pipelines.embedding.encode import EncodePieces
from pipelines.embedding.flow import Flow
from pipelines.embedding.models import adapter_configs, new_flow
from pipelines.embedding.prepare import prepare
from pipelines.embedding.seal import seal
from pipelines.embedding.sealing import sealed
from pipelines.embedding.write import WritePieces, Written, written_pieces
from pipelines.index import index
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from slq.arrow import ITEMS
from slq.errors import StorageError
from slq.files import file_sha256
from slq.index import Hit, VectorIndex, current_version
from tests.integration.runs import (
    changed,
    enlarge,
    killing_after_a_commit,
    read_embeddings,
    with_untrained_adapter,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def folder(recipe: Recipe) -> Path:
    return Path(recipe.storage.embeddings)


def committed_bytes(recipe: Recipe) -> dict[str, str]:
    """sha256 of every committed shard; fails where one is not what its record says."""
    ledger = Ledger(recipe.storage.embeddings)
    found = {}
    for shard_id, commit in ledger.commits().items():
        path = folder(recipe) / shard_name(shard_id, commit.generation)
        assert file_sha256(path) == commit.sha256
        assert pq.read_metadata(path).num_rows == commit.rows
        found[path.name] = commit.sha256
    return found


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clean")


@pytest.fixture
def clean(tiny_run: Recipe, storage: Path) -> Recipe:
    """The same corpus embedded without any fault; the first test that asks pays for it."""
    recipe = changed(tiny_run, embed={"shard_rows": 2}, storage={"dir": storage / "run"})
    if not recipe.storage.adapter.is_dir():
        with_untrained_adapter(recipe)
        embed(recipe)
    return recipe


def test_a_full_disk_ends_in_words_shows_no_partial_file_and_the_same_command_finishes(
    clean: Recipe, small_disk: Path
) -> None:
    recipe = with_untrained_adapter(changed(clean, storage={"dir": small_disk / "run"}))
    with pytest.raises(StorageError, match=r"No space left on device.*free space") as caught:
        embed(recipe)
    assert len(str(caught.value).splitlines()) == 1
    survived = committed_bytes(recipe)
    assert len(survived) < 16
    for path in (folder(recipe) / "shards").glob("part-*.parquet"):
        pq.read_table(path)  # whatever has its final name is whole
    assert Ledger(recipe.storage.embeddings).manifest() is None
    enlarge(small_disk)
    embed(recipe)
    assert committed_bytes(recipe) == committed_bytes(clean)
    assert survived.items() <= committed_bytes(recipe).items()


def test_a_full_disk_while_publishing_leaves_the_old_index_in_place(
    clean: Recipe, small_disk: Path
) -> None:
    recipe = changed(clean, storage={"dir": small_disk / "run"})
    recipe.storage.dir.mkdir()
    folder(recipe).symlink_to(clean.storage.embeddings)
    enlarge(small_disk, "400k")
    index(recipe)

    def answer() -> list[list[Hit]]:
        return VectorIndex(recipe.storage.index).search(np.eye(1, 192, dtype=np.float32), 3)

    truth = answer()

    def publish_until_full() -> None:
        for num_lists in range(1, 9):  # with every list probed the answer is always the same
            settings = {"kind": "ivf", "num_lists": num_lists, "num_probes": num_lists}
            index(changed(recipe, index=settings))

    with pytest.raises(StorageError, match=r"index .*No space left on device; free space"):
        publish_until_full()
    assert [[hit.id for hit in hits] for hits in answer()] == [
        [hit.id for hit in hits] for hits in truth
    ]
    before = current_version(recipe.storage.index)
    enlarge(small_disk)
    index(changed(recipe, index={"kind": "ivf", "num_lists": 9}))
    assert current_version(recipe.storage.index) > before


def large_corpus(recipe: Recipe, path: Path, copies: int) -> Recipe:
    rows: list[dict[str, Any]] = pq.read_table(recipe.data.path("corpus")).to_pylist()
    many = [{**row, "id": f"{copy}-{row['id']}"} for copy in range(copies) for row in rows]
    pq.write_table(pa.Table.from_pylist(many, schema=ITEMS), path)
    return changed(recipe, data={"corpus": str(path)})


def test_a_killed_encoder_costs_no_row_and_doubles_none(tiny_run: Recipe, tmp_path: Path) -> None:
    recipe = changed(tiny_run, embed={"shard_rows": 32, "batch_size": 8})
    recipe = with_untrained_adapter(large_corpus(recipe, tmp_path / "many.parquet", 24))
    with killing_after_a_commit(folder(recipe), "EncodePieces"):
        embed(recipe)
    rows, _, _ = read_embeddings(recipe.storage.embeddings)
    expected = pq.read_table(recipe.data.path("corpus"), columns=["id"])["id"].to_pylist()
    assert rows["id"].to_pylist() == expected
    again = changed(recipe, storage={"dir": tmp_path / "clean"})
    embed(with_untrained_adapter(again))
    assert committed_bytes(recipe) == committed_bytes(again)


def leftovers(recipe: Recipe) -> list[str]:
    names = [path.name for path in folder(recipe).rglob("*") if path.is_file()]
    return [name for name in names if name.startswith(".") or name.endswith(".partial")]


class MarkingSealer:
    """A `Sealer`, but no two attempts at a shard give the same bytes."""

    def sealed(self, flow: Flow, pieces: list[Written], before: Commit | None) -> Commit | str:
        import secrets

        mark = {"attempt": secrets.token_hex(8)}
        flow.__dict__["shard_schema"] = flow.shard_schema.with_metadata(mark)
        return sealed(flow, pieces, before)


def test_two_runs_at_once_end_in_one_data_set(
    clean: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt has other bytes, so a loser that touched a committed file would be seen."""
    recipe = changed(clean, storage={"dir": tmp_path / "shared"}, resources={"embed_workers": 1})
    with_untrained_adapter(recipe)
    problems: list[BaseException] = []

    # by value: a worker cannot import the tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(sealing, "Sealer", MarkingSealer)

    def run() -> None:
        try:
            embed(recipe)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert problems == []
    found = committed_bytes(recipe)
    assert found.keys() == committed_bytes(clean).keys()
    assert not set(found.values()) & set(committed_bytes(clean).values())  # the marks were written
    ours, theirs = (read_embeddings(r.storage.embeddings) for r in (recipe, clean))
    assert ours[0]["id"].to_pylist() == theirs[0]["id"].to_pylist()
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert leftovers(recipe) == []


def pieces_of(flow: Flow, shard_id: int) -> list[Written]:
    """A shard embedded in this process, up to the pieces beside the data set."""
    encode, write = EncodePieces(flow), WritePieces(flow)
    asked = pa.table({"shard_id": [shard_id], "generation": pa.nulls(1)})
    blocks = [write(encode(block)) for block in prepare(asked, flow)]
    return list(written_pieces(row for block in blocks for row in block.to_pylist()))


def test_a_zombie_attempt_after_the_end_changes_no_committed_byte(clean: Recipe) -> None:
    before = committed_bytes(clean)
    flow = new_flow(clean, adapter_configs(clean))
    flow.__dict__["shard_schema"] = flow.shard_schema.with_metadata({"late": "yes"})
    commit = seal(flow, pieces_of(flow, 0), None)
    assert committed_bytes(clean) == before
    assert len(leftovers(clean)) == 1
    ledger = Ledger(clean.storage.embeddings)
    assert not ledger.commit(commit)
    assert leftovers(clean) == []
    seal(flow, pieces_of(flow, 0), None)  # and nobody hears of this one
    embed(clean)
    assert leftovers(clean) == []
    assert committed_bytes(clean) == before
    assert not list((folder(clean) / "errors").glob("*"))


def test_quarantined_rows_are_embedded_again_and_only_those(
    clean: Recipe, tmp_path: Path, scenes_dir: Path
) -> None:
    rows = pq.read_table(clean.data.path("corpus")).to_pylist()
    corpus = tmp_path / "pictures"
    corpus.mkdir()
    for row in rows:
        (corpus / f"{row['id']}.png").write_bytes(row["image"])
    names = sorted(path.name for path in corpus.iterdir())
    for number in (3, 12, 13):
        (corpus / names[number]).write_bytes(b"broken")
    recipe = changed(
        clean,
        data={"corpus": str(corpus)},
        embed={"shard_rows": 8, "batch_size": 8},
        storage={"dir": tmp_path / "run"},
    )
    recipe = with_untrained_adapter(recipe)
    embed(recipe)
    first = committed_bytes(recipe)
    assert Ledger(recipe.storage.embeddings).manifest()["num_quarantined"] == 3  # type: ignore[index]
    mended = dict(zip(sorted(f"{row['id']}.png" for row in rows), range(32), strict=True))
    pictures = {f"{row['id']}.png": row["image"] for row in rows}
    for number in (3, 12):  # one stays broken
        (corpus / names[number]).write_bytes(pictures[names[number]])
    embed(recipe, retry_errors=True)
    found, _, _ = read_embeddings(recipe.storage.embeddings)
    assert found["id"].to_pylist() == [name for name in names if mended[name] != 13]
    second = committed_bytes(recipe)
    assert {name for name in second if name not in first} == {
        "part-000000.1.parquet",
        "part-000001.1.parquet",
    }
    manifest = Ledger(recipe.storage.embeddings).manifest()
    assert manifest is not None
    assert (manifest["num_rows"], manifest["num_quarantined"]) == (31, 1)
    whole = with_untrained_adapter(changed(recipe, storage={"dir": tmp_path / "whole"}))
    embed(whole)  # of the corpus as it is now
    ours, theirs = (read_embeddings(r.storage.embeddings) for r in (recipe, whole))
    assert ours[0]["id"].to_pylist() == theirs[0]["id"].to_pylist()
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-3)


def test_an_item_that_kills_its_worker_is_found_and_set_aside(
    tiny_run: Recipe, tmp_path: Path
) -> None:
    """As one that needs more memory than there is: Ray would start its work again for ever."""
    rows = [{"id": f"t{n}", "text": f"a fox {n}"} for n in range(60)]
    rows[17]["text"], rows[41]["text"] = KILLS_PREPARE, KILLS_ENCODE
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    recipe = changed(
        tiny_run,
        data={"corpus": str(tmp_path / "c.parquet")},
        embed={"shard_rows": 30, "piece_rows": 10, "batch_size": 4},
        resources={"embed_workers": 1},
    )
    recipe = with_untrained_adapter(recipe)
    embed(recipe, models="jobs.bench.embedding.stand_in")
    found, _, _ = read_embeddings(recipe.storage.embeddings)
    assert found["id"].to_pylist() == [row["id"] for row in rows if row["id"] not in ("t17", "t41")]
    bad = pa.concat_tables(
        [pq.read_table(path) for path in sorted((folder(recipe) / "errors").glob("part-*"))]
    )
    assert {row["id"]: (row["stage"], row["error"]) for row in bad.to_pylist()} == {
        "t17": ("decode", "killed_worker"),
        "t41": ("encode", "killed_worker"),
    }
    clean = with_untrained_adapter(changed(recipe, storage={"dir": tmp_path / "clean"}))
    harmless = [{**row, "text": row["text"].replace("slq: kill", "a dog")} for row in rows]
    pq.write_table(pa.Table.from_pylist(harmless), tmp_path / "d.parquet")
    clean = changed(clean, data={"corpus": str(tmp_path / "d.parquet")})
    embed(clean, models="jobs.bench.embedding.stand_in")
    ours, theirs = (
        dict(zip(t["id"].to_pylist(), v, strict=True))
        for t, v, _ in (read_embeddings(r.storage.embeddings) for r in (recipe, clean))
    )
    for name, vector in ours.items():
        np.testing.assert_array_equal(vector, theirs[name])
