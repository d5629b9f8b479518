"""`slq retention`: what it will ask, what it makes of answers, and when a model is still the same."""

import json
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.compare.running import _kept, scenes_asked
from jobs.compare.study import plan_study
from jobs.compare.tables import columns, study_markdown
from jobs.retaining import retention_table
from pipelines.loading import backbone_of
from pipelines.recipe import Recipe, load_recipe
from pipelines.retaining.asking import identity_of
from pipelines.retaining.kept import digest_of, kept
from pipelines.retaining.outcome import (
    ANSWERS,
    compared,
    identity_lines,
    left_out_lines,
    page,
    summary,
    write_answers,
)
from pipelines.retention import FOLDER, chosen_adapter, plan
from slq.artifacts import save_adapter
from slq.benchmarks.answering import Answer
from slq.errors import ArtifactError, ConfigError, DataError, StorageError
from slq.files import write_json
from slq.finetuning import TunedBackbone
from slq.metrics import bootstrap_interval
from tests.integration.runs import with_untrained_adapter
from tests.questions import write_mmmu, write_ocrbench, write_realworldqa


def recipe_file(folder: Path, **sets: Any) -> Path:
    """A recipe that asks the small MMMU and OCRBench; sets are replaced, or removed if None."""
    named = {
        "mmmu": {"dir": str(write_mmmu(folder / "mmmu")), "expected": 6},
        "ocrbench": {"dir": str(write_ocrbench(folder / "ocr")), "expected": 3},
        **sets,
    }
    path = folder / "recipe.yaml"
    values = {
        "storage": {"dir": str(folder / "run")},
        "retention": {name: value for name, value in named.items() if value is not None},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def slq(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["retention", *map(str, arguments)])


# The section -------------------------------------------------------------------------------------------------


def test_the_section_names_sets_whose_folders_do_not_depend_on_where_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path, realworldqa={"dir": "photographs", "match": "contains"})
    recipe = load_recipe(path)
    assert list(recipe.retention.sets) == ["mmmu", "realworldqa", "ocrbench"]
    assert recipe.retention.sets["realworldqa"].dir == tmp_path / "photographs"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe().retention.sets == {}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"mmmmu": {"dir": "x"}}, "retention.mmmmu is unknown; did you mean retention.mmmu?"),
        ({"mmmu": {}}, "retention.mmmu.dir: Field required"),
        ({"mmmu": {"dir": "x", "split": "test"}}, "retention.mmmu.split: .*'validation' or 'dev'"),
        ({"ocrbench": {"dir": "x", "expect": 3}}, "retention.ocrbench.expect is unknown; did you"),
        ({"batch_size": 0}, "retention.batch_size: .*greater than 0"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, sets: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(tmp_path, **sets))


# What will be asked ------------------------------------------------------------------------------------------


def test_a_dry_run_counts_questions_and_writes_nothing(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    result = slq(path, "--dry-run", "--json", "--set", "retention.scenes=5")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"] == {
        "adapter": None,
        "mmmu": {"questions": 6, "asked before": []},
        "ocrbench": {"questions": 3, "asked before": []},
        "scenes": 5,
    }
    assert not (tmp_path / "run").exists()


def test_the_help_has_an_example() -> None:
    text = click.unstyle(slq("--help").output)
    assert "Example: slq retention jobs/recipes/demo.yaml" in " ".join(text.split())


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({"mmmu": None, "ocrbench": None}, [], "retention names nothing to ask; give it a set"),
        ({}, ["--set", "retention.mmmu.expected=900"], "6 questions, but 900 are expected by re"),
        ({}, ["--set", "retention.mmmu.expected=null"], "6 questions, but 900 are published;"),
        ({}, ["--set", "retention.mmmu.dir=none"], "retention.mmmu.dir: no folder in"),
        ({}, ["--adapter", "none"], "holds no adapter"),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_runs(
    tmp_path: Path, sets: dict[str, Any], options: list[str], message: str
) -> None:
    result = slq(recipe_file(tmp_path, **sets), "--dry-run", *options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_the_adapter_is_the_given_one_or_that_of_the_run(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    assert chosen_adapter(recipe, None) is None
    recipe = with_untrained_adapter(recipe)
    assert chosen_adapter(recipe, None) == tmp_path / "run" / "adapter"
    assert plan(recipe)["adapter"] == str(tmp_path / "run" / "adapter")
    with pytest.raises(ArtifactError, match="none holds no adapter"):
        chosen_adapter(recipe, tmp_path / "none")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ArtifactError, match=r"is incomplete: adapter_model\.safetensors is missing"
    ):
        chosen_adapter(recipe, None)


def test_what_was_asked_counts_as_done_until_something_it_depends_on_changes(
    tmp_path: Path,
) -> None:
    path = recipe_file(tmp_path, realworldqa={"dir": str(write_realworldqa(tmp_path / "rw"))})
    recipe = with_untrained_adapter(load_recipe(path))
    adapter = recipe.storage.adapter

    def digest(*overrides: str, name: str = "mmmu", adapter: Path | None = None) -> str:
        return digest_of(load_recipe(path, list(overrides)), adapter, name)

    first = digest()
    done = recipe.storage.dir / FOLDER / "plain" / "mmmu.json"
    done.parent.mkdir(parents=True)
    write_json(done, {"digest": first, "found": {}, "table": "mmmu.parquet"})
    three = load_recipe(path, ["retention.realworldqa.expected=3"])
    assert plan(three)["mmmu"]["asked before"] == []  # its table is gone
    write_answers(done.with_suffix(".parquet"), ANSWERED)
    assert plan(three)["mmmu"]["asked before"] == ["plain"]
    assert digest("retention.mmmu.expected=7", "retention.part_questions=5") == first
    assert digest("retention.ocrbench.max_new_tokens=5", "eval.ks=[1]") == first
    changed = [
        digest("retention.batch_size=3"),
        digest("retention.mmmu.max_new_tokens=5"),
        digest("backbone.dtype=bfloat16"),
        digest(adapter=adapter),
        digest(name="ocrbench"),
    ]
    assert len({first, *changed}) == 6
    write_mmmu(tmp_path / "elsewhere")
    assert digest(f"retention.mmmu.dir={tmp_path / 'elsewhere'}") == first
    with_untrained_adapter(recipe, seed=5)
    assert digest(adapter=adapter) != changed[3]
    (tmp_path / "mmmu" / "Accounting" / "validation-00000-of-00001.parquet").unlink()
    assert digest() != first


# What is made of answers ---------------------------------------------------------------------------------------


def answer(number: int, group: str, score: float, **changes: Any) -> Answer:
    kind = "open" if number % 3 == 0 else "multiple-choice"
    values: dict[str, Any] = {"given": "A", "answers": ("A", "a"), "score": score, **changes}
    return Answer(id=f"q{number}", question_type=kind, group=group, **values)


ANSWERED = [
    answer(0, "Art", 1.0),
    answer(1, "Art", 0.0, given=""),
    answer(2, "Art", 1.0, images_left_out=2),
    answer(3, "Law", 1.0),
    answer(4, "Law", 0.0, images_left_out=1),
]


def test_scores_are_means_over_all_of_a_kind_and_of_a_subject() -> None:
    found = summary("MMMU", ANSWERED)
    assert (found["num_questions"], found["right"], found["accuracy"]) == (5, 3, 0.6)
    assert tuple(found["interval"]) == bootstrap_interval(np.array([1.0, 0, 1, 1, 0]))
    groups = {name: (one["right"], one["num_questions"]) for name, one in found["groups"].items()}
    assert groups == {"Art": (2, 3), "Law": (1, 2)}
    kinds = {name: one["accuracy"] for name, one in found["question_types"].items()}
    assert kinds == {"open": 1.0, "multiple-choice": pytest.approx(1 / 3)}
    assert (found["images_left_out"], found["unanswered"]) == (2, 1)
    assert left_out_lines(found) == [
        "MMMU: this family shows one image at the start of a turn; 2 questions were asked with the first of their "
        "images only",
        "MMMU: 1 questions got no answer",
    ]


def test_two_tables_are_compared_answer_by_answer(tmp_path: Path) -> None:
    other = [*ANSWERED[:3], answer(3, "Law", 0.0, given="B"), answer(4, "Law", 0.0, given="C")]
    for name, answers in (("one", ANSWERED), ("two", other)):
        write_answers(tmp_path / name / "mmmu.parquet", answers)
    found = compared(tmp_path / "one" / "mmmu.parquet", tmp_path / "two" / "mmmu.parquet")
    assert (found["same_answers"], found["num_questions"]) == (3, 5)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["p"] == 1.0  # one differing question says nothing
    table = pq.read_table(tmp_path / "one" / "mmmu.parquet")
    assert table.schema == ANSWERS
    assert table.to_pylist()[2] == {
        "id": "q2", "question_type": "multiple-choice", "group": "Art", "given": "A",
        "answers": ["A", "a"], "score": 1.0, "images_left_out": 2,
    }  # fmt: skip


def measured(*, adapter: bool) -> dict[str, Any]:
    report = summary("MMMU", ANSWERED)
    scenes = {"match_accuracy": 0.9, "caption_accuracy": 0.5}
    same = {"method": "SLQ", "weights_identical": True, "logits_identical": True}
    side = {"sets": {"mmmu": report}, "scenes": scenes}
    return {
        "adapter": "run/adapter" if adapter else None,
        "scenes": 128,
        "identity": same if adapter else None,
        "compared": {"mmmu": {"same_answers": 5, "p": 1.0}} if adapter else {},
        "plain": side,
        **({"adapted": side} if adapter else {}),
    }


def test_the_page_has_every_ability_and_subject_and_says_whether_the_model_is_the_same() -> None:
    alone, both = page(measured(adapter=False)), page(measured(adapter=True))
    assert "| MMMU | 5 | 60.0 (20.0-100.0) |\n" in alone
    assert "| MMMU | 5 | 60.0 (20.0-100.0) | 60.0 (20.0-100.0) | 5 |" in both
    assert "| captions of scenes | 128 | 50.0 | 50.0 |  |" in both
    assert "| Law | 2 | 1 | 50.0 (0.0-100.0) | 1 | 50.0 (0.0-100.0) |" in both
    assert "- SLQ adapter loaded: weights bit-identical, logits bit-identical\n" in both
    assert "- MMMU: 3 of 5 right\n" in alone
    assert "- MMMU: 3 of 5 right, 3 with the adapter (p = 1, paired randomisation)\n" in both
    assert "2 questions were asked with the first of their images only" in alone
    for text in (alone, both):
        widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        assert len(set(widths[:5])) == 1
    lora = {"method": "LORA", "weights_identical": False, "logits_identical": False}
    lines = identity_lines({"identity": {**lora, "largest_logit_difference": 3.25}})
    assert lines == ["LORA adapter loaded: weights changed, logits changed by up to 3.25"]


def test_the_terminal_shows_the_same_cells() -> None:
    console = Console(width=100, record=True)
    console.print(retention_table(measured(adapter=True)))
    shown = console.export_text()
    assert "with the adapter" in shown
    assert "60.0 (20.0-100.0)" in shown


# The model with an adapter loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_slq_leaves_the_shipped_backbone_bit_identical_and_baselines_do_not(
    method: Literal["lora", "full"], tmp_path: Path
) -> None:
    recipe = with_untrained_adapter(
        Recipe().model_copy(
            update={"storage": Recipe().storage.model_copy(update={"dir": tmp_path})}
        )
    )
    found = identity_of(recipe.model_dump_json(), recipe.storage.adapter)
    assert found["method"] == "SLQ"
    assert found["weights_identical"]
    assert found["logits_identical"]
    assert found["largest_logit_difference"] == 0.0
    backbone = backbone_of(recipe)
    assert found["weights_sha256"] == found["weights_sha256_before"] == backbone.weights_sha256()
    tuned = TunedBackbone(backbone, method, rank=2)
    for name, value in tuned.named_parameters():
        if "lora_B" in name or "down_proj" in name:
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(tmp_path / "tuned", backbone, tuned)
    changed = identity_of(recipe.model_dump_json(), tmp_path / "tuned")
    assert (changed["method"], changed["weights_identical"]) == (method.upper(), False)
    assert not changed["logits_identical"]
    assert changed["largest_logit_difference"] > 0.1


# In a study ----------------------------------------------------------------------------------------------------


def test_a_study_asks_what_its_recipe_names(tmp_path: Path) -> None:
    base = recipe_file(tmp_path)
    study = {"recipe": base.name, "runs": {"SLQ": {}}, "set": {"data.dir": str(tmp_path)}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    asked = plan_study(tmp_path / "study.yaml", tmp_path / "out")
    scenes = plan_study(tmp_path / "study.yaml", tmp_path / "out", ["retention.scenes=7"])
    assert scenes_asked(asked, asked.runs[0].recipe) == 0
    assert scenes_asked(scenes, scenes.runs[0].recipe) == 7
    calls: list[tuple[Any, ...]] = []

    class Asking:
        def retention(self, *asked_of: Any, num_scenes: int) -> dict[str, Any]:
            calls.append((*asked_of, num_scenes))
            return {"sets": {}}

    flows: Any = Asking()
    assert _kept(asked.runs[0].recipe, tmp_path, 0, flows) == {"sets": {}}
    assert _kept(Recipe(), tmp_path, 0, flows) is None
    assert calls == [(asked.runs[0].recipe, tmp_path, 0)]


def test_a_table_of_a_study_has_a_column_for_each_set() -> None:
    entry = {"value": 0.5, "interval": [0.4, 0.6], "num_queries": 8}
    row: dict[str, Any] = {
        "name": "SLQ", "run": "SLQ", "system": "slq", "trained_parameters": 5, "training_seconds": 1.0,
        "peak_memory_bytes": None, "hits": {"explicit": entry}, "tuned": None, "retention": None,
    }  # fmt: skip
    found = {"weights_identical": True, "sets": {"mmmu": summary("MMMU", ANSWERED)}}
    rows = [row, {**row, "retention": found}]
    assert columns(rows)["MMMU kept"] == ["", "60.0 (20.0-100.0)"]
    text = study_markdown({"rows": rows, "notes": []})
    assert "- kept of a set of questions: right answers in %" in text
    assert "kept of a set" not in study_markdown({"rows": [row], "notes": []})


def test_a_damaged_set_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    (tmp_path / "ocr" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        plan(load_recipe(path))


def test_a_folder_that_cannot_be_written_is_named_and_a_damaged_result_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/plain cannot be written: .*free space or choose"):
        kept(tmp_path / "file" / "plain" / "mmmu.json", "d", dict)
    (tmp_path / "mmmu.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"mmmu\.json is damaged"):
        kept(tmp_path / "mmmu.json", "d", dict)
