"""`slq plan` on the scenes: measured on the run's own work, and near to what the run then costs."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.embed import REPORT, embed
from pipelines.embedding.costs import ESTIMATE
from pipelines.estimate import estimate
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from slq.errors import ArtifactError, DataError
from tests.integration.runs import changed, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def recipe(tiny_run: Recipe) -> Recipe:
    return with_untrained_adapter(
        changed(tiny_run, embed={"outputs": ("float16", "int8")}, resources={"embed_workers": 1})
    )


def file(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_plan_writes_nothing_into_the_data_set_and_the_run_is_compared_with_it(
    recipe: Recipe,
) -> None:
    found = estimate(recipe, seconds=2, price=3600)
    assert not Path(recipe.storage.embeddings).exists()
    stored = file(recipe.storage.dir / ESTIMATE)
    assert stored.items() >= found.to_json().items()
    assert (found.rows, found.shards, found.rows_are_estimated) == (32, 4, False)
    assert found.input_bytes == Path(recipe.data.corpus_location).stat().st_size
    assert found.quarantined_share == 0
    assert found.problems == []
    assert 4 <= found.sampled_rows <= 32
    assert found.cost == pytest.approx(found.rows / found.encoder_rows_per_s)  # one unit a second

    embed(recipe)
    ledger = Ledger(recipe.storage.embeddings)
    written = sum(commit.bytes for commit in ledger.commits().values())
    # one shard of the sample stands for four, each with a footer and pages of its own
    assert 0.3 < found.output_bytes / written < 1.5
    report = file(Path(recipe.storage.embeddings) / REPORT)
    assert report["planned"]["output_bytes"] == found.output_bytes
    assert report["planned"]["rows_per_s"] == found.rows_per_s


def test_rows_of_tars_are_told_by_their_bytes_and_broken_ones_by_the_sample(
    recipe: Recipe, scenes_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    rows = pq.read_table(scenes_dir / "gallery.parquet").to_pylist()
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for position, row in enumerate(rows[number * 16 : number * 16 + 16]):
                picture = tmp_path / f"{number}-{position:02d}.png"
                picture.write_bytes(row["image"] if position != 1 else b"no picture")
                tar.add(picture, picture.name)
    found = estimate(changed(recipe, data={"corpus": str(folder)}), seconds=2)
    assert found.rows_are_estimated
    assert found.rows == 32
    assert found.shards == 2
    assert found.quarantined_share > 0


def test_what_the_cluster_cannot_do_is_a_problem_and_no_error(recipe: Recipe) -> None:
    found = estimate(
        changed(recipe, resources={"embed_workers": 999}, embed={"piece_rows": 1}), seconds=1
    )
    assert len(found.problems) == 1
    assert "resources.embed_workers is 32, but the cluster has" in found.problems[0]


def test_a_corpus_of_which_nothing_can_be_embedded_is_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match="nothing can be told from 1 rows: none of them can be embedded"
    ):
        estimate(changed(recipe, data={"corpus": str(tmp_path / "x")}), seconds=1)


def test_without_an_adapter_there_is_no_plan(tiny_run: Recipe) -> None:
    with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
        estimate(tiny_run)
