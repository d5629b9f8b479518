"""Real faults under the embedding flow: a full disk, a killed actor, two runs at once. Rows out stay rows in."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import pipelines.embed as embedding
from pipelines.embed import embed, write_shard
from pipelines.index import index, read_embeddings
from pipelines.ledger import Commit, Ledger
from pipelines.recipe import Recipe
from slq.arrow import ITEMS
from slq.artifacts import file_sha256
from slq.errors import StorageError
from slq.index import Hit, VectorIndex, current_version
from tests.integration.runs import changed, enlarge, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def committed_bytes(recipe: Recipe) -> dict[str, str]:
    """sha256 of every committed shard; fails where one is not what its record says."""
    ledger = Ledger(recipe.storage.embeddings)
    found = {}
    for shard_id, commit in ledger.commits().items():
        path = ledger.shard_path(shard_id)
        assert file_sha256(path) == commit.sha256
        assert pq.read_metadata(path).num_rows == commit.rows
        found[path.name] = commit.sha256
    return found


@pytest.fixture
def clean(tiny_run: Recipe) -> Recipe:
    """The same corpus embedded without any fault."""
    recipe = with_untrained_adapter(changed(tiny_run, embed={"shard_rows": 2}))
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
    for path in (recipe.storage.embeddings / "shards").glob("part-*.parquet"):
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
    recipe.storage.embeddings.symlink_to(clean.storage.embeddings)
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


def encoder_processes() -> list[psutil.Process]:
    """Live encoder actors of this test session's own Ray: descendants of this process only."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EncodeShard" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def large_corpus(recipe: Recipe, path: Path, copies: int) -> Recipe:
    rows: list[dict[str, Any]] = pq.read_table(recipe.data.path("corpus")).to_pylist()
    many = [{**row, "id": f"{copy}-{row['id']}"} for copy in range(copies) for row in rows]
    pq.write_table(pa.Table.from_pylist(many, schema=ITEMS), path)
    return changed(recipe, data={"corpus": path})


def test_a_killed_encoder_costs_no_row_and_doubles_none(tiny_run: Recipe, tmp_path: Path) -> None:
    recipe = changed(tiny_run, embed={"shard_rows": 32, "batch_size": 8})
    recipe = with_untrained_adapter(large_corpus(recipe, tmp_path / "many.parquet", 24))
    commits, killed = recipe.storage.embeddings / "commits", threading.Event()

    def kill_after_the_first_commit() -> None:
        while not killed.is_set():
            if commits.is_dir() and list(commits.glob("0*.json")):
                victims = encoder_processes()
                if victims:
                    os.kill(victims[0].pid, signal.SIGKILL)
                    killed.set()
            time.sleep(0.02)

    killer = threading.Thread(target=kill_after_the_first_commit, daemon=True)
    killer.start()
    try:
        embed(recipe)
        in_time = killed.is_set()
    finally:
        killed.set()
        killer.join()
    assert in_time, "the run ended before its encoder could be killed"
    rows, _, _ = read_embeddings(recipe.storage.embeddings)
    expected = pq.read_table(recipe.data.path("corpus"), columns=["id"])["id"].to_pylist()
    assert rows["id"].to_pylist() == expected
    again = changed(recipe, storage={"dir": tmp_path / "clean"})
    embed(with_untrained_adapter(again))
    assert committed_bytes(recipe) == committed_bytes(again)


def leftovers(recipe: Recipe) -> list[str]:
    names = [path.name for path in recipe.storage.embeddings.rglob("*") if path.is_file()]
    return [name for name in names if name.startswith(".") or name.endswith(".partial")]


def write_with_bytes_of_its_own(
    rows: pa.Table, root: str, dimension: int, user_schema: bytes | None = None
) -> pa.Table:
    """`write_shard`, but no two attempts at a shard give the same bytes."""
    import secrets

    import pipelines.embed as flow

    genuine = flow.shard_table

    def marked(*arguments: Any) -> pa.Table:
        return genuine(*arguments).replace_schema_metadata({"attempt": secrets.token_hex(8)})

    flow.shard_table = marked
    try:
        return flow.write_shard(
            rows, root, dimension, user_schema
        )  # in a worker nobody has replaced it
    finally:
        flow.shard_table = genuine


def test_two_runs_at_once_end_in_one_data_set(
    clean: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt has other bytes, so a loser that touched a committed file would be seen."""
    recipe = changed(clean, storage={"dir": tmp_path / "shared"}, resources={"embed_workers": 1})
    with_untrained_adapter(recipe)
    problems: list[BaseException] = []

    # by value: a worker cannot import the tests
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(embedding, "write_shard", write_with_bytes_of_its_own)

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


def test_a_zombie_attempt_after_the_end_changes_no_committed_byte(clean: Recipe) -> None:
    before = committed_bytes(clean)
    row: dict[str, Any] = {"shard_id": 0, "row": 0, "id": "late", "uri": "u", "text": "t"}
    row |= {"width": None, "height": None, "content_hash": "", "error": None, "message": None}
    row |= {"columns": embedding.pa_json({}), "vector": bytes(2 * 192), "stage": "decode"}
    bad = {**row, "id": "bad", "error": "corrupt", "message": "m", "vector": None}
    root = clean.storage.embeddings
    (record,) = write_shard(pa.Table.from_pylist([row, bad]), str(root), 192).to_pylist()
    assert committed_bytes(clean) == before
    assert len(leftovers(clean)) == 2
    assert not Ledger(root).commit(Commit(**record))
    assert leftovers(clean) == []
    write_shard(pa.Table.from_pylist([row, bad]), str(root), 192)  # and nobody hears of this one
    embed(clean)
    assert leftovers(clean) == []
    assert committed_bytes(clean) == before
    assert not list((root / "errors").iterdir())
