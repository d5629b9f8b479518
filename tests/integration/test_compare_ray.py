"""A study of SLQ and LoRA on a few scenes: every figure is there, and SLQ leaves the model as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.compare import compare, plan_study
from jobs.compare.study import ZERO_SHOT
from jobs.compare.tables import columns
from pipelines.loading import backbone_of
from pipelines.recipe import Recipe
from pipelines.retention import retention
from slq.errors import ArtifactError, ConfigError
from slq.files import read_json
from slq.pretraining.config import PretrainConfig
from slq.pretraining.evaluation import accuracies_of
from slq.scenes.sprites import CLUE_CATEGORIES
from tests.conftest import SCENES
from tests.integration.runs import fingerprints_of_files, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
STUDY = {
    "recipe": "base.yaml",
    "retention_scenes": 3,
    "runs": {
        "SLQ": {},  # a tuned run is the same flows again, in an order that a recorder sees
        "LoRA": {"set": {"adapter.method": "lora", "train.lr": 0.05}},
        "fine": {"adapter_of": "SLQ", "set": {"eval.systems": ["slq_fine"], "rerank.depth": 2}},
    },
}


@pytest.fixture(scope="module")
def studied(
    scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compare")
    recipe = {
        "adapter": {"num_latents": 4},
        "data": {"dir": str(scenes_dir), "scenes": SCENES.model_dump()},
        "train": {
            "num_steps": 2,
            "global_batch": 8,
            "warmup_steps": 1,
            "held_out": 4,
            "gradient_checkpointing": False,
        },
        "eval": {"systems": ["slq"]},
        "resources": {"train_workers": 1},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    plan = plan_study(folder / "study.yaml", folder / "out", [f"data.dir={scenes_dir}"])
    return plan.out_dir, compare(plan)


def test_every_run_has_every_figure(studied: tuple[Path, dict[str, Any]]) -> None:
    out, summary = studied
    assert json.loads((out / "study.json").read_text()) == summary
    *zero_shot, slq, lora, fine = summary["rows"]
    assert (fine["name"], fine["run"], fine["system"]) == ("fine", "fine", "slq_fine")
    assert fine["retention"] is None
    assert all(set(row["p"]) >= set(row["hits"]) for row in summary["rows"] if row is not slq)
    assert set(fine["categories"]) <= set(CLUE_CATEGORIES)
    assert fine["categories"].keys() == slq["categories"].keys() != set()
    assert [row["run"] for row in zero_shot] == [ZERO_SHOT, ZERO_SHOT]
    subsets = {
        f"{kind}{part}" for kind in ("explicit", "knowledge") for part in ("", ", unseen objects")
    }
    for row in summary["rows"]:
        assert set(row["hits"]) >= subsets
        for entry in row["hits"].values():
            assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
    assert slq["trained_parameters"] == 4 * 192 + 1
    assert lora["trained_parameters"] > 10_000
    for row in (slq, lora):
        assert row["training_seconds"] > 0
        assert 2**28 < row["peak_memory_bytes"] < 2**34
    found = columns(summary["rows"])
    assert {"trained", "training s", "peak GiB", "match kept", "caption kept", "weights"} < set(
        found
    )
    assert all((out / f"study.{kind}").is_file() for kind in ("json", "md", "png"))


def test_slq_keeps_the_model_bit_for_bit_and_lora_does_not(
    studied: tuple[Path, dict[str, Any]],
) -> None:
    untouched, _, slq, lora, _ = (row["retention"] for row in studied[1]["rows"])
    assert slq == untouched
    assert slq["weights_sha256"] == backbone_of(Recipe()).weights_sha256()
    assert lora["weights_sha256"] != slq["weights_sha256"]
    assert [kept["weights_identical"] for kept in (untouched, slq, lora)] == [True, True, False]


def test_run_again_it_touches_no_run(
    studied: tuple[Path, dict[str, Any]], scenes_dir: Path
) -> None:
    out, summary = studied
    before = fingerprints_of_files(out / "slq") | fingerprints_of_files(out / "lora")
    plan = plan_study(out.parent / "study.yaml", out, [f"data.dir={scenes_dir}"])
    assert compare(plan) == summary
    assert fingerprints_of_files(out / "slq") | fingerprints_of_files(out / "lora") == before


def test_retention_of_the_backbone_alone_is_what_its_model_card_measures(
    studied: tuple[Path, dict[str, Any]],
) -> None:
    expected = accuracies_of("tiny", PretrainConfig(), num_scenes=3)
    kept = studied[1]["rows"][0]["retention"]
    assert {name: kept[name] for name in expected} == expected


def test_a_trained_figure_is_that_of_the_run_itself(studied: tuple[Path, dict[str, Any]]) -> None:
    out, summary = studied
    results = read_json(out / "lora" / "eval" / "results.json")
    report = results["systems"]["slq"]["text_to_image"]
    for subset, entry in summary["rows"][-2]["hits"].items():
        assert entry["value"] == report[subset]["hit@1"]


def test_retention_reports_our_own_errors_as_they_are(tmp_path: Path) -> None:
    recipe = with_untrained_adapter(
        Recipe().model_copy(
            update={"storage": Recipe().storage.model_copy(update={"dir": tmp_path})}
        )
    )
    with pytest.raises(ArtifactError, match="holds no adapter"):
        retention(recipe, tmp_path / "none", num_scenes=1)
    other = recipe.backbone.model_copy(update={"name": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        retention(recipe.model_copy(update={"backbone": other}), None, num_scenes=1)
