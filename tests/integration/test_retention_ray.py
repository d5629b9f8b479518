"""`slq retention` end to end: sets are asked in tasks, without and with the adapter, and never twice."""

from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.loading import backbone_of
from pipelines.recipe import Recipe, load_recipe
from pipelines.retention import FOLDER, measure_retention, retention
from slq.benchmarks.answering import Respondent
from slq.files import read_json
from tests.integration.runs import changed, fingerprints_of_files, with_untrained_adapter
from tests.unit.test_retention import recipe_file

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    path = recipe_file(tmp_path_factory.mktemp("retention"), ocrbench=None)
    settings = ["retention.part_questions=4", "retention.batch_size=2"]  # two parts
    recipe = load_recipe(path, [*settings, "resources.rerank_workers=2"])
    recipe = with_untrained_adapter(recipe)
    return recipe, measure_retention(recipe)


def test_answers_of_the_tasks_are_those_of_one_model_asked_in_order(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, result = measured
    folder = recipe.storage.dir / FOLDER
    respondent = Respondent(backbone_of(recipe), batch_size=2)
    for name, source in recipe.retention.sets.items():
        expected = respondent.answer(list(source.questions()), source)
        for side in ("plain", "adapted"):
            rows = pq.read_table(folder / side / f"{name}.parquet").to_pylist()
            assert [row["id"] for row in rows] == [one.id for one in expected]
            assert [row["given"] for row in rows] == [one.given for one in expected]
            assert [row["score"] for row in rows] == [one.score for one in expected]
        assert result["compared"][name]["same_answers"] == len(expected)
    assert result["plain"]["sets"] == result["adapted"]["sets"]


def test_the_model_is_bit_identical_and_the_page_says_so(
    measured: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, result = measured
    assert result["identity"]["weights_identical"]
    assert result["identity"]["logits_identical"]
    folder = recipe.storage.dir / FOLDER
    assert read_json(folder / "retention.json") == result
    page = (folder / "retention.md").read_text()
    assert "SLQ adapter loaded: weights bit-identical, logits bit-identical" in page
    assert "| MMMU | 6 |" in page
    assert "| Art_Theory | 3 |" in page


def test_what_was_asked_is_not_asked_again(
    measured: tuple[Recipe, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, result = measured
    folder = recipe.storage.dir / FOLDER
    before = fingerprints_of_files(folder)
    more = measure_retention(changed(recipe, retention={"scenes": 1}))
    shown = capsys.readouterr().err
    assert "retention adapted/mmmu: finished before" in shown
    assert "retention MMMU" not in shown
    after = fingerprints_of_files(folder)
    assert after.keys() - before.keys() == {"plain/scenes.json", "adapted/scenes.json"}
    assert {name for name in before if before[name] != after[name]} == {
        "retention.json",
        "retention.md",
    }
    assert more["plain"] == more["adapted"]
    assert more["plain"]["sets"] == result["plain"]["sets"]
    assert set(more["plain"]["scenes"]) >= {"match_accuracy", "caption_accuracy"}
    assert "| captions of scenes | 1 |" in (folder / "retention.md").read_text()


def test_a_study_gets_the_sets_of_a_run(measured: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, result = measured
    kept = retention(recipe, recipe.storage.adapter, num_scenes=0)
    assert kept["sets"] == result["adapted"]["sets"]
    assert kept["weights_identical"]
    assert "match_accuracy" not in kept
