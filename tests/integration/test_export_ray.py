"""A data set handed over on the command line: streamed from its shards, checked against their records."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.bench.embedding import stand_in
from jobs.bench.embedding.inputs import recipe_for, write_texts
from pipelines.embed import embed
from pipelines.export import export
from pipelines.recipe import Recipe
from slq.engines import engine
from slq.errors import ArtifactError, ConfigError
from slq.index.vectors import unit
from tests.integration.runs import read_embeddings
from tests.unit.test_cli import refusal, slq

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def embedded(tmp_path: Path) -> Recipe:
    recipe = recipe_for(tmp_path, write_texts(tmp_path, 500), "run", shard_rows=200, piece_rows=100)
    embed(recipe, models=stand_in.__name__)
    return recipe


def test_all_rows_of_all_shards_arrive_in_their_order(embedded: Recipe, tmp_path: Path) -> None:
    location = embedded.storage.embeddings
    assert export(location, engine("npy", str(tmp_path), "out"), retry_s=5) == 500
    table, vectors, fingerprint = read_embeddings(location)
    stored = np.load(tmp_path / "out" / "vectors.npy")
    np.testing.assert_array_equal(unit(stored), vectors)
    items = pq.read_table(tmp_path / "out" / "items.parquet")
    assert items["id"].to_pylist() == table["id"].to_pylist()
    assert items["text"].to_pylist() == table["text"].to_pylist()
    assert f'"{fingerprint}"' in (tmp_path / "out" / "description.json").read_text()
    lance: Any = engine("lance", str(tmp_path), "out")
    for _ in range(2):  # the second time nothing is to be done
        assert export(location, lance, retry_s=5) == 500
        with lance.open() as index:
            assert (index.fingerprint, index.version, len(index)) == (fingerprint, "2", 500)
    with pytest.raises(ConfigError, match="exists already"):
        export(location, engine("npy", str(tmp_path), "out"), retry_s=5)


def test_the_command_says_what_is_where(embedded: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(embedded.model_dump(mode="json")))
    options = ("--to", "npy", "--target", tmp_path, "--name", "vectors")
    result = slq("export", path, *options)
    assert result.exit_code == 0, result.output
    assert f"500 rows are in vectors of {tmp_path}" in result.stdout.replace("\n", "")
    assert "exists already; choose another --name" in refusal("export", path, *options)
    text = refusal("export", path, "--to", "faiss", "--target", tmp_path)
    assert "engine 'faiss' is unknown; choose one of npy, lance, milvus, qdrant" in text


def test_a_damaged_shard_is_named_and_nothing_is_left(embedded: Recipe, tmp_path: Path) -> None:
    path = sorted(Path(embedded.storage.embeddings, "shards").glob("*.parquet"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    for kind in ("npy", "lance"):
        with pytest.raises(ArtifactError, match=rf"shard .*{path.name} does not match its commit"):
            export(embedded.storage.embeddings, engine(kind, str(tmp_path), "out"), retry_s=5)
    assert not (tmp_path / "out").exists()
    assert engine("lance", str(tmp_path), "out").mark() is None  # type: ignore[attr-defined]
    path.write_bytes(whole)
    for kind in ("npy", "lance"):
        assert export(embedded.storage.embeddings, engine(kind, str(tmp_path), "out"), retry_s=5)
