"""`slq rerank` on a local Ray: the same bits whatever dies, and never a pair lost or scored twice."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.failpoints import MARK, VARIABLE
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from pipelines.rerank import rerank
from slq.errors import DataError, StorageError
from slq.files import file_sha256
from tests.integration.runs import (
    broken_corpus,
    changed,
    enlarge,
    fingerprints_of_files,
    killing_after_a_commit,
    write_run,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clean(ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A dozen shards, one image that cannot be read, and nothing else that goes wrong."""
    place = tmp_path_factory.mktemp("rerank")
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        rerank={"depth": 6, "shard_pairs": 12, "batch_size": 8, "max_error_share": 0.5},
        storage={"dir": place / "clean"},
    )
    recipe = write_run(recipe, place / "run.parquet")
    recipe = broken_corpus(recipe, place / "corpus.parquet", [5])
    rerank(recipe)
    return recipe


@pytest.fixture
def recipe(clean: Recipe, tmp_path: Path) -> Recipe:
    """The same into another folder."""
    return changed(clean, storage={"dir": tmp_path / "run"})


def folder(recipe: Recipe) -> Path:
    return Path(recipe.storage.reranking)


def content(recipe: Recipe) -> dict[str, str]:
    """sha256 of every committed file and of what is made of them; fails where one is not what its record says."""
    ledger = Ledger(recipe.storage.reranking)
    found = {}
    for commit in ledger.commits().values():
        for name, sha256 in commit.files():
            assert file_sha256(folder(recipe) / name) == sha256
            found[name] = sha256
    for name in ("plan.parquet", "run.parquet", "run.trec", "calibration.json"):
        found[name] = file_sha256(folder(recipe) / name)
    return found


def leftovers(recipe: Recipe) -> list[str]:
    names = [path.name for path in folder(recipe).rglob("*") if path.is_file()]
    return [name for name in names if name.startswith(".") or name.endswith(".partial")]


def command(recipe: Recipe, path: Path, *options: str, **environment: str) -> Any:
    """`slq rerank` in a process and a Ray of its own."""
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    arguments = [sys.executable, "-m", "jobs.cli", "rerank", str(path), *options]
    inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**inherited, **environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_killed_driver_goes_on_to_the_same_bits_and_shows_what_was_gained(
    recipe: Recipe, clean: Recipe, tmp_path: Path
) -> None:
    file, mark = tmp_path / "recipe.yaml", str(tmp_path / "died")
    died = command(recipe, file, **{VARIABLE: "commit_after:3", MARK: mark})
    assert Path(mark).exists(), died.stderr
    assert died.returncode != 0
    committed = Ledger(recipe.storage.reranking).commits().values()
    assert len(committed) == 3
    before = {
        name: found
        for name, found in fingerprints_of_files(folder(recipe)).items()
        if name.startswith("shards/part-")
    }
    done = command(recipe, file)
    assert done.returncode == 0, done.stderr
    assert content(recipe) == content(clean)
    after = fingerprints_of_files(folder(recipe))
    assert {name: after[name] for name in before} == before  # committed shards were not touched
    found = json.loads((folder(recipe) / "report.json").read_text())
    assert found["cost"]["scored"] == found["scored"] - sum(one.rows for one in committed)
    assert leftovers(recipe) == []
    shown = " ".join(done.stdout.split())
    for words in (
        "hit@1",
        "fused",
        "nothing was fitted to",
        "pairs scored",
        "expected calibration error",
    ):
        assert words in shown
    assert (folder(recipe) / "rerank.png").read_bytes()[:4] == b"\x89PNG"
    progress = [line for line in done.stderr.splitlines() if line.startswith("rerank shard")]
    assert "ETA 0 s" in progress[-1]


def test_a_killed_scorer_costs_no_pair_and_doubles_none(recipe: Recipe, clean: Recipe) -> None:
    with killing_after_a_commit(folder(recipe), "ScorePairs"):
        rerank(recipe)
    assert content(recipe) == content(clean)


def test_two_workers_find_what_one_finds(recipe: Recipe, clean: Recipe) -> None:
    rerank(changed(recipe, resources={"rerank_workers": 2}))
    assert content(recipe) == content(clean)


def test_two_runs_at_once_end_in_one_result(recipe: Recipe, clean: Recipe) -> None:
    problems: list[BaseException] = []

    def run() -> None:
        try:
            rerank(recipe)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert content(recipe) == content(clean)
    assert leftovers(recipe) == []


def test_a_full_disk_ends_in_words_and_the_same_command_finishes(
    recipe: Recipe, clean: Recipe, small_disk: Path
) -> None:
    enlarge(small_disk, "40k")
    recipe = changed(recipe, storage={"dir": small_disk / "run"})
    with pytest.raises(StorageError, match="No space left on device") as caught:
        rerank(recipe)
    assert len(str(caught.value).splitlines()) == 1
    enlarge(small_disk)
    rerank(recipe)
    assert content(recipe) == content(clean)


def test_a_dry_run_of_the_command_says_what_would_be_done(recipe: Recipe, tmp_path: Path) -> None:
    done = command(recipe, tmp_path / "recipe.yaml", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["plan"]
    assert found["pairs"] == found["candidates"] == pq.read_table(recipe.rerank.run).num_rows
    assert not folder(recipe).exists()


def test_an_empty_query_file_names_what_is_missing(recipe: Recipe, tmp_path: Path) -> None:
    """Queries of another data set: every pair is without one, and the run fails in words."""
    queries = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"id": ["other"], "text": ["a fox"]}), queries)
    wrong = changed(recipe, data={"queries": queries})
    with pytest.raises(DataError, match="the query is not there"):
        rerank(wrong)
