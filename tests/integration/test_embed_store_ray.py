"""`slq embed` as a command, with what fails around it: an object store, a node, somebody who stops it."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.bench.chaos.invariants import Snapshot
from jobs.bench.chaos.runs import Run
from pipelines.embed import REPORT
from pipelines.ledger import LOCK, Ledger
from pipelines.recipe import Recipe
from pipelines.storage import open_store
from slq.arrow import ITEMS
from tests.faulty_store import FaultyStore, faulty_store
from tests.integration.runs import changed, read_embeddings, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
LIMIT_S = 300.0
RETRY_S = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clean")


@pytest.fixture
def clean(tiny_run: Recipe, folder: Path, tmp_path: Path) -> Recipe:
    """96 items in 24 shards, embedded on a disk without any fault; the first test that asks pays for it."""
    corpus = folder / "corpus.parquet"
    recipe = changed(
        tiny_run,
        data={"corpus": str(corpus)},
        embed={"shard_rows": 4, "piece_rows": 2, "piece_bytes": 4 * 2**20},
        resources={"embed_workers": 1},
        storage={"dir": folder / "run"},
    )
    if not corpus.exists():
        pq.write_table(rows_of(recipe.data.dir), corpus, row_group_size=16)
        with_untrained_adapter(recipe)
        finish(recipe, tmp_path)
    return recipe


def rows_of(scenes: Path) -> pa.Table:
    """Pictures with a text each, thrice under different ids; one is damaged."""
    rows = pq.read_table(scenes / "gallery.parquet").to_pylist()
    many = [
        {"id": f"{copy}-{row['id']}", "image": row["image"], "text": f"copy {copy}"}
        for copy in range(3)
        for row in rows
    ]
    many[5]["image"] = b"damaged"
    return pa.Table.from_pylist(many, schema=ITEMS)


def start(recipe: Recipe, tmp_path: Path) -> Run:
    """`slq embed` in a process of its own."""
    path, log = tmp_path / "recipe.yaml", tmp_path / "embed.log"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return Run([sys.executable, "-m", "jobs.cli", "embed", str(path)], log, {})


def finish(recipe: Recipe, tmp_path: Path) -> None:
    with start(recipe, tmp_path) as run:
        run.require_success(run.wait(LIMIT_S))
        run.require_gone()


def require_one_red_line(tmp_path: Path, message: str) -> None:
    log = (tmp_path / "embed.log").read_text()
    assert "Traceback" not in log
    (line,) = [one for one in log.splitlines() if one.startswith("error:")]
    assert message in line


def num_committed(recipe: Recipe) -> int:
    return sum(1 for _ in open_store(recipe.storage.embeddings).files("commits"))


def require_equal(recipe: Recipe, clean: Recipe) -> None:
    """The same rows with the same vectors, every file as its record says, and no other file."""
    (ours, our_vectors, _), (theirs, vectors, _) = (
        read_embeddings(one.storage.embeddings) for one in (recipe, clean)
    )
    assert ours.drop_columns("uri").equals(theirs.drop_columns("uri"))
    np.testing.assert_array_equal(our_vectors, vectors)
    ledgers = [Ledger(one.storage.embeddings) for one in (recipe, clean)]
    names = [{file.name for file in one.store.files()} - {LOCK} for one in ledgers]
    assert names[0] == names[1]
    assert len(ledgers[0].verified_shards()) == 24
    for commit in ledgers[0].commits().values():
        for name, sha256 in commit.files():
            assert ledgers[0].store.sha256(name) == sha256


# ---- an object store that fails ----


def in_bucket(clean: Recipe, store: FaultyStore, tmp_path: Path) -> Recipe:
    """The same run with its corpus and its data set in an object store."""
    corpus = clean.data.path("corpus")
    open_store(f"s3://{store.bucket}/in").write(corpus.name, corpus.read_bytes())
    recipe = changed(
        clean,
        data={"corpus": f"s3://{store.bucket}/in/{corpus.name}"},
        storage={
            "dir": tmp_path / "run",
            "embedding_dir": f"s3://{store.bucket}/out",
            "retry_s": RETRY_S,
        },
    )
    recipe.storage.dir.mkdir()
    recipe.storage.adapter.symlink_to(clean.storage.adapter)
    return recipe


def test_a_store_that_fails_at_every_fifth_request_costs_no_row(
    clean: Recipe, tmp_path: Path
) -> None:
    with faulty_store(share=0.0, seed=5) as store:
        recipe = changed(in_bucket(clean, store, tmp_path), storage={"retry_s": 60.0})
        store.share = 0.2
        finish(recipe, tmp_path)
        faults = store.count.total() - store.count["none"]
        assert 0.1 < faults / store.count.total() < 0.3
        store.share = 0.0
        require_equal(recipe, clean)


def test_an_outage_ends_a_run_in_words_and_the_same_command_goes_on(
    clean: Recipe, tmp_path: Path
) -> None:
    with faulty_store(share=0.0) as store:
        recipe = in_bucket(clean, store, tmp_path)
        with start(recipe, tmp_path) as run:
            assert run.wait_for(lambda: num_committed(recipe) >= 2, LIMIT_S)
            before = Ledger(recipe.storage.embeddings).commits()
            store.share = 1.0
            began = time.monotonic()
            code = run.wait(LIMIT_S)
            assert time.monotonic() - began < RETRY_S + 15
            assert code == 1
            run.require_gone()
        require_one_red_line(tmp_path, "StorageError: s3://")
        store.share = 0.0
        assert 2 <= num_committed(recipe) < 24
        finish(recipe, tmp_path)
        require_equal(recipe, clean)
        after = Ledger(recipe.storage.embeddings).commits()
        assert before.items() <= after.items()


# ---- somebody who stops it ----


def test_a_run_that_is_told_to_stop_ends_within_seconds_in_words_and_goes_on(
    clean: Recipe, tmp_path: Path
) -> None:
    place = tmp_path / "stopped"
    recipe = changed(clean, storage={"embedding_dir": str(place)})
    with start(recipe, tmp_path) as run:
        assert run.wait_for(lambda: num_committed(recipe) >= 2, LIMIT_S)
        os.kill(run.pid, signal.SIGTERM)
        code = run.wait(60)  # some 3 s on an idle machine, and tests have others beside them
        assert code == 1
        run.require_gone()
    require_one_red_line(
        tmp_path, "InterruptedRunError: stopped by SIGTERM; committed shards stay in"
    )
    before = Snapshot.of(place)
    assert 2 <= len(before.shards) < 24
    finish(recipe, tmp_path)
    assert before.touched(place) == []
    assert f'"rows": {96 - 4 * len(before.shards)},' in (place / REPORT).read_text()
    require_equal(recipe, clean)


# ---- a node that fails ----


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray of one node of three CPUs, and a second node that may be lost; two encoders and a reader fit into one."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 3, "object_store_memory": 128 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=node)
    found.add_node(num_cpus=2, object_store_memory=128 * 2**20)
    found.wait_for_nodes()
    yield found
    found.shutdown()


def test_a_run_ends_by_itself_after_a_node_is_lost(
    clean: Recipe, tmp_path: Path, cluster: Any
) -> None:
    place = tmp_path / "lost"
    recipe = changed(
        clean,
        storage={"embedding_dir": str(place)},
        resources={"embed_workers": 2, "address": cluster.address},
    )
    with start(recipe, tmp_path) as run:
        assert run.wait_for(lambda: num_committed(recipe) >= 2, LIMIT_S)
        (second,) = cluster.worker_nodes
        cluster.remove_node(second, allow_graceful=False)
        assert num_committed(recipe) < 24
        run.require_success(run.wait(LIMIT_S))
        run.require_gone()
    require_equal(recipe, clean)
