"""An index that Ray tasks build: the same bytes as in one process, also when a worker is killed."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

import slq.index.building
from jobs.bench.embedding import stand_in
from jobs.bench.embedding.inputs import recipe_for, write_texts
from jobs.bench.index import run
from jobs.bench.index.data import EmbeddedSet
from jobs.bench.index.sides import flat, matrix_of, ours
from pipelines.embed import embed
from pipelines.index import each_in_tasks, index
from pipelines.ledger_reader import LedgerReader
from pipelines.recipe import Recipe
from slq.errors import ArtifactError, ClusterError, ConfigError, DataError
from slq.index import Content, IndexConfig, VectorIndex, current_version, write_version
from slq.index.checks import STAMPS
from slq.index.config import PLACES
from slq.index.parts import matrix
from slq.index.versions import SEGMENTS, read_manifest
from tests.gpus import FakeGpus
from tests.integration.runs import changed
from tests.unit.index_data import DIMENSION, Given, table

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(sys.modules[Given.__module__])
CODED = IndexConfig(
    kind="ivf", codes="rabitq", rotation="random", num_lists=8, partition_bytes=4000
)
ROWS = 1500


def files_of(folder: Path) -> dict[str, bytes]:
    """Of the only segment, whether or not the manifest knows them."""
    record = VectorIndex(folder).manifest.segments[0]
    assert [path.name for path in (folder / SEGMENTS).iterdir()] == [record.name]
    home = folder / SEGMENTS / record.name
    files = {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert files.keys() - record.sha256.keys() == {STAMPS}
    return {name: data for name, data in files.items() if name != STAMPS}


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slq.index.building, "_LEAST_PART_ROWS", 300)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Five shards of texts, embedded by models that cost nothing."""
    folder = tmp_path_factory.mktemp("embedded")
    recipe = recipe_for(folder, write_texts(folder, ROWS), "run", shard_rows=300, piece_rows=100)
    embed(recipe, models=stand_in.__name__)
    return recipe


def test_the_benchmark_searches_what_a_recipe_has_embedded(
    embedded: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    recipe = changed(embedded, data={"queries": str(embedded.data.corpus)})
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    data = EmbeddedSet.of(path)
    assert data.num_rows == ROWS
    stored = np.concatenate([matrix(t["embedding"]) for t in data.tables()]).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(list(data.images())), stored)
    queries = data.texts(7)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    exact = flat(matrix_of(data))
    points = ours(tmp_path / "bench", data, "plain", IndexConfig(kind="ivf", num_lists=4))
    assert [point.setting for point in points] == ["probes=4 oversample=1"]
    cosines = queries @ matrix_of(data).T
    best = [
        np.take_along_axis(cosines, one.search(queries, 5), axis=1) for one in (points[0], exact)
    ]
    np.testing.assert_allclose(*best, atol=1e-5)
    with pytest.raises(ConfigError, match="--recipe goes with --part search"):
        run(["--recipe", str(path), "--part", "memory"])


def test_tasks_build_the_same_bytes_as_one_process(embedded: Recipe, tmp_path: Path) -> None:
    found = []
    for workers in (1, 2):
        recipe = changed(
            embedded,
            index=CODED.model_dump(),
            resources={"index_workers": workers},
            storage={
                "dir": tmp_path / str(workers),
                "embedding_dir": embedded.storage.embeddings,
            },
        )
        folder = index(recipe)
        found.append(files_of(folder))
    assert found[0] == found[1]
    assert sum(name.startswith("parts/") for name in found[0]) == 5 * 3
    assert sum(name.startswith("partitions/") for name in found[0]) > 1
    assert len(VectorIndex(folder)) == ROWS
    version = current_version(folder)
    assert index(recipe) == folder
    assert current_version(folder) == version  # nothing to do


def test_where_an_index_is_built_is_no_reason_to_build_it_again(
    embedded: Recipe, tmp_path: Path, gpus: FakeGpus
) -> None:
    storage = {"dir": tmp_path, "embedding_dir": embedded.storage.embeddings}
    on_cpu = changed(embedded, index=CODED.model_dump(), storage=storage)
    folder = index(changed(on_cpu, index={"device": "cuda"}))
    assert gpus.searched
    version = current_version(folder)
    assert index(on_cpu) == folder
    assert current_version(folder) == version
    assert not read_manifest(folder, version).config.keys() & {*PLACES}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_shard_is_named_and_nothing_is_published(
    embedded: Recipe, tmp_path: Path, workers: int
) -> None:
    import shutil

    location = tmp_path / "embeddings"
    shutil.copytree(embedded.storage.embeddings, location)
    recipe = changed(
        embedded,
        resources={"index_workers": workers},
        storage={"dir": tmp_path / "run", "embedding_dir": str(location)},
    )
    path = sorted((location / "shards").glob("*.parquet"))[3]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=rf"shard .*{path.name} does not match its commit"):
        index(recipe)
    assert not (recipe.storage.index / "CURRENT").exists()
    path.write_bytes(whole)
    kept = [p for p in recipe.storage.index.glob(f"{SEGMENTS}/.begun-*/parts/*") if p.is_dir()]
    assert kept
    inodes = {p.stat().st_ino for p in kept}
    folder = index(recipe)
    home = folder / SEGMENTS / VectorIndex(folder).manifest.segments[0].name
    assert inodes <= {p.stat().st_ino for p in (home / "parts").iterdir()}  # not read again
    assert len(LedgerReader(str(location)).verified_shards()) == 5


@dataclass(frozen=True)
class Deadly:
    """A source whose first reader is killed, or every reader."""

    rows: pa.Table
    mark: Path | None

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    def tables(self) -> Iterator[pa.Table]:
        yield self.rows.slice(0, 10)
        if self.mark is None or not self.mark.exists():
            if self.mark is not None:
                self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield self.rows.slice(10)


def killed_once(mark: Path, function: Callable[[Any], Any], argument: Any) -> Any:
    """Do the work, and die before anybody hears of it; the next one lives."""
    result = function(argument)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def content(*others: Any) -> Content:
    sources = [Given(table(100)), *others, Given(table(200, first=100, seed=2))]
    return Content(sources, DIMENSION, "3f2a")


def test_a_killed_task_is_done_again_and_the_index_is_the_same(tmp_path: Path) -> None:
    rows = table(90, seed=3, first=400)
    write_version(tmp_path / "whole", content(Given(rows)), CODED)

    def deadly(
        what: str,
        function: Callable[[Any], Any],
        arguments: Sequence[Any],
        *,
        device: str = "cpu",
    ) -> list[Any]:
        mark = tmp_path / what.replace(" ", "-")
        task = partial(killed_once, mark, function)
        return each_in_tasks(2, what, task, arguments, device=device)

    reader = Deadly(rows, tmp_path / "reader-died")
    write_version(tmp_path / "killed", content(reader), CODED, each=deadly)
    assert (
        len(list(tmp_path.iterdir())) == 2 + 1 + 5
    )  # each of five steps lost a worker, and the reader
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "killed")


def test_errors_of_tasks_are_told_as_they_are(tmp_path: Path) -> None:
    tasks = partial(each_in_tasks, 2)
    twice = content(Given(table(5, first=98)))
    with pytest.raises(DataError, match="5 ids come twice, first 'item-100'; an index needs"):
        write_version(tmp_path, twice, CODED, each=tasks)
    always = content(Deadly(table(90, first=400), None))
    with pytest.raises(ClusterError, match="Ray gave up"):
        write_version(tmp_path, always, CODED, each=tasks)
    assert not (tmp_path / "CURRENT").exists()
    assert not list((tmp_path / SEGMENTS).iterdir())


def test_settings_are_chosen_for_a_goal_and_measured_on_the_whole(
    embedded: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import slq.index.trials
    from jobs.indexing import change_of
    from pipelines.choosing import CHOICES
    from slq.errors import ConfigError
    from slq.files import read_json

    monkeypatch.setattr(slq.index.trials, "_FEW_ROWS", 100)
    queries = tmp_path / "queries.parquet"
    pq.write_table(pa.table({"text": [f"fox {n} on a castle" for n in range(60)]}), queries)
    recipe = changed(
        embedded,
        data={"queries": str(queries)},
        index={"goal": {"recall": 0.5, "sample_rows": 400, "num_queries": 60}},
        storage={"dir": embedded.storage.dir, "embedding_dir": embedded.storage.embeddings},
    )
    build = change_of(None, None, compact=False)
    folder = build(recipe)
    manifest = read_manifest(folder, current_version(folder))
    (path,) = (folder / CHOICES).glob("*.json")
    record = read_json(path)
    assert manifest.source["choice"] == path.stem
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert record["reached"]["recall"] >= 0.5
    assert record["sample_rows"] == 400
    assert manifest.config == record["config"] == manifest.segments[0].config
    assert manifest.config["kind"] == "ivf"
    assert build(recipe) == folder
    assert current_version(folder) == manifest.version  # chosen before, built before
    impossible = changed(recipe, index={"goal": {"recall": 0.5, "memory": 1000}})
    with pytest.raises(ConfigError, match="memory would have to be"):
        build(impossible)
    missing = changed(recipe, data={"queries": "none.parquet"}, index={"goal": {"recall": 0.8}})
    with pytest.raises(ConfigError, match=r"there is no data\.queries .*none\.parquet"):
        build(missing)
    assert current_version(folder) == manifest.version
