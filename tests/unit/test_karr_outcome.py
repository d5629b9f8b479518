"""A finished run without Ray: what people decide of it is read back by the next one, and the pages show it all."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.report.karr_review import write_review_pages
from pipelines.karr.build import karr
from pipelines.karr.identity import identity_of
from pipelines.karr.models import load_models
from pipelines.karr.rows import ShardMaker
from pipelines.karr.shards import ledger_of, written
from pipelines.karr.source import captions, planned_rows, read_captions, write_plan
from pipelines.recipe import Recipe
from tests.integration.runs import changed


@pytest.fixture
def finished(scenes_dir: Path, tmp_path: Path) -> Recipe:
    """32 captions whose shards are made and committed here, so that a run has nothing left to make."""
    recipe = changed(
        Recipe(),
        data={"dir": scenes_dir},
        karr={"kinds": ("explicit",), "shard_rows": 20},
        storage={"dir": tmp_path},
    )
    with ledger_of(recipe) as ledger:
        ledger.begin(identity_of(recipe))
        write_plan(ledger.store, captions(recipe), recipe.karr.shard_rows)
        maker = ShardMaker(recipe.karr, load_models(recipe, ledger.store, 1), 1.0)
        for shard_id in range(len(planned_rows(ledger.store))):
            rows = maker.made(read_captions(ledger.store, shard_id))
            assert ledger.commit(written(ledger.store, shard_id, rows, 0))
    return recipe


def rows_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The benchmark's rows by the id of their caption."""
    table = pq.read_table(recipe.storage.karr / "benchmark" / "karr.parquet")
    return {row["source_id"]: row for row in table.to_pylist()}


def test_decisions_of_people_are_read_back_by_the_next_run(
    finished: Recipe,
) -> None:
    recipe = finished
    first = karr(recipe)
    assert first["funnel"]["num_out"] == 32
    folder = recipe.storage.karr / "review"
    short = changed(recipe, karr={"review": {"page_rows": 20}})
    assert len(write_review_pages(short, folder)) == 2
    (page,) = write_review_pages(recipe, folder)
    assert [path.name for path in folder.glob("*.html")] == ["review-001.html"] == [page.name]
    assert page.read_text().count('src="data:image/png;base64,') == 32
    sheet = folder / "review.csv"
    lines = list(csv.DictReader(sheet.read_text().splitlines()))
    lines[0] |= {"decision": "reject", "annotator": "ann"}
    edited = lines[1]["caption"].replace("on a", "on the")  # articles may change
    lines[1] |= {"decision": "edit", "annotator": "ann", "edited_caption": edited}
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    found = karr(recipe)
    assert found["funnel"]["rejected"]["annotators"] == 1
    funnel = json.loads((recipe.storage.karr / "funnel.json").read_text())["funnel"]
    assert funnel["num_in"] == 32 == funnel["num_out"] + sum(funnel["rejected"].values())
    rows = rows_of(recipe)
    assert funnel["num_out"] == len(rows) == 31
    assert lines[0]["id"] not in rows
    assert rows[lines[1]["id"]]["text"] == edited
    assert rows[lines[1]["id"]]["annotations"][0]["annotator"] == "ann"
    kept = list(csv.DictReader(sheet.read_text().splitlines()))
    assert [line["decision"] for line in kept[:3]] == ["reject", "edit", ""]
    required = karr(changed(recipe, karr={"review": {"required": True}}))
    assert required["funnel"]["num_out"] == 1
    assert required["funnel"]["rejected"]["unreviewed"] == 30
