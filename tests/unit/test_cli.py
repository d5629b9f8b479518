"""The `slq` command: help with examples, dry runs of every shipped recipe, errors of one line."""

import errno
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs.cli import app

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
SHIPPED = sorted(p for p in RECIPES.glob("*.yaml") if not p.name.startswith("pretrain_"))
DEMO = RECIPES / "demo.yaml"
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
MEASURED_ONLY = {
    "cirr": "/data/cirr",
    "fashion_iq": "/data/fashion-iq",
    "karr_bench": "/data/karr",
    "mbeir": "/data/m-beir",
    "mmeb_eval": "/data/mmeb-eval",
    "sugar_crepe": "/data/sugar-crepe",
    "urban1k": "/data/urban1k",
}
"""Recipes of benchmarks, and where they expect the files; nothing is trained there."""
STAGES = ("train", "mine", "embed", "plan", "index", "eval", "serve")


def slq(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: str | Path) -> str:
    """Standard error of a command that must end with exit code 1 and no traceback."""
    result = slq(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_commands_are_those_that_the_documentation_names() -> None:
    assert set(COMMANDS) >= {*STAGES, "search", "verify", "demo", "pretrain", "doctor"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = slq(command, "--help")
    assert result.exit_code == 0
    text = click.unstyle(result.stdout)
    assert re.search(rf"Example: slq\s+{command}", text)


def test_without_arguments_the_help_shows_where_to_start() -> None:
    text = click.unstyle(slq().output)
    assert "slq demo" in text
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in ("mine", "embed")])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_stage_dry_runs_every_shipped_recipe(
    stage: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = slq(stage, path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["recipe"]["adapter"]["num_latents"] == 20
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_a_dry_run_of_training_shows_the_deepspeed_configuration() -> None:
    result = slq("train", DEMO, "--dry-run", "--json", "--set", "train.zero_stage=1")
    shown = json.loads(result.stdout)
    assert shown["recipe"]["train"]["zero_stage"] == 1
    assert shown["deepspeed"]["zero_optimization"]["stage"] == 1


def test_a_dry_run_of_embedding_shows_the_plan(scenes_dir: Path) -> None:
    options = (
        "--dry-run",
        "--json",
        "--set",
        f"data.dir={scenes_dir}",
        "--set",
        "embed.shard_rows=10",
    )
    shown = json.loads(slq("embed", DEMO, *options).stdout)
    assert shown["plan"] == {"shards": 4, "rows": 32}


def test_a_dry_run_of_embedding_without_its_corpus_names_the_key_and_path() -> None:
    text = refusal("embed", RECIPES / "hub.yaml", "--dry-run")
    assert "ConfigError: data.corpus: /data/coco/images does not exist" in text


@pytest.mark.parametrize("name", sorted(MEASURED_ONLY))
def test_a_dry_run_of_embedding_a_benchmark_says_that_its_tables_come_first(
    name: str, tmp_path: Path
) -> None:
    where = ("--set", f"data.dir={tmp_path / 'none'}")
    shown = json.loads(slq("embed", RECIPES / f"{name}.yaml", "--dry-run", "--json", *where).stdout)
    assert shown["plan"] == {"corpus": "generated first"}


def test_a_dry_run_of_embedding_before_the_scenes_exist_knows_their_number(tmp_path: Path) -> None:
    where = ("--set", f"data.dir={tmp_path / 'none'}", "--set", "embed.shard_rows=100")
    shown = json.loads(slq("embed", DEMO, "--dry-run", "--json", *where).stdout)
    assert shown["plan"] == {"shards": 7, "rows": 640, "corpus": "generated first"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_dry_run_of_mining_knows_the_pairs_or_who_makes_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"hub": "/data/coco", "corpus": "/data/corpus", **MEASURED_ONLY}.get(path.stem)
    if own:
        text = refusal("mine", path, "--dry-run")
        assert f"ConfigError: data.train: {own}/train.parquet does not exist" in text
        return
    shown = json.loads(slq("mine", path, "--dry-run", "--json").stdout)
    scenes = {"demo": 3072, "serving": 8, "karr": 2}
    assert shown["plan"]["pairs"] == scenes.get(path.stem, "generated first")
    assert shown["plan"]["depth"] == shown["recipe"]["mine"]["depth"] == 30
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_a_dry_run_of_mining_counts_pairs_and_images(scenes_dir: Path) -> None:
    options = ("--dry-run", "--json", "--set", f"data.dir={scenes_dir}", "--set", "mine.depth=9")
    shown = json.loads(slq("mine", DEMO, *options).stdout)
    file = str(scenes_dir / "negatives.parquet")
    assert shown["plan"] == {"pairs": 64, "images": 64, "depth": 9, "writes": file}


@pytest.mark.parametrize("name", ["demo", "2026-11-21", "x #1", "a: b"])
def test_the_demo_dry_runs_into_its_folder(tmp_path: Path, name: str) -> None:
    result = slq("demo", "--out", tmp_path / name, "--dry-run")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["storage"]["dir"] == str(tmp_path / name)
    assert shown["data"]["dir"] == str(tmp_path / name / "data")
    assert not list(tmp_path.iterdir())


def test_pretraining_dry_runs() -> None:
    result = slq("pretrain", RECIPES / "pretrain_tiny.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "num_steps" in json.loads(result.stdout)


def test_the_shipped_backbone_still_has_the_skills_of_its_model_card() -> None:
    """0.919 and 0.628 on 384 scenes: 32 are enough to see weights or prompts that were exchanged."""
    recipe = RECIPES / "pretrain_tiny.yaml"
    result = slq("pretrain", recipe, "--evaluate", "tiny", "--scenes", "32")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["match_accuracy"] > 0.8
    assert found["caption_accuracy"] > 0.45


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_key_ends_with_one_line_that_names_the_nearest(stage: str) -> None:
    text = refusal(stage, DEMO, "--set", "train.lrr=1")
    expected = "error: ConfigError: demo.yaml: train.lrr is unknown; did you mean train.lr?"
    assert text.strip() == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_recipe_names_the_nearest_file(stage: str) -> None:
    text = refusal(stage, RECIPES / "dmeo.yaml")
    assert f"did you mean {DEMO}?" in text
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("override", ["train.lr", "train.lr=[", "train..lr=1"])
def test_a_malformed_override_ends_with_one_line(override: str) -> None:
    assert "ConfigError" in refusal("train", DEMO, "--dry-run", "--set", override)


def test_an_unknown_option_is_a_usage_error() -> None:
    result = slq("train", DEMO, "--steps", "5")
    assert result.exit_code == 2
    assert "No such option" in click.unstyle(result.stderr)


@pytest.mark.parametrize("places", [(), ("--url", "http://127.0.0.1:1", "--index", "runs/x")])
def test_a_search_needs_exactly_one_place(places: tuple[str, ...]) -> None:
    assert "give exactly one of --url, --index and --recipe" in refusal("search", "a fox", *places)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "127.0.0.1:8000", "http://[", "http://a b"]
)
def test_a_service_that_cannot_be_reached_is_one_line(url: str) -> None:
    url = url.format(port=free_port())
    text = refusal("search", "a fox", "--url", url)
    assert "ServiceError" in text
    assert f"{url} cannot be reached" in text
    assert len(text.strip().splitlines()) == 1


def test_a_search_with_a_missing_picture_or_index_says_so(tmp_path: Path) -> None:
    text = refusal("search", "--image", tmp_path / "x.png", "--url", "http://127.0.0.1:1")
    assert f"image {tmp_path}/x.png does not exist" in text
    text = refusal("search", "a fox", "--index", tmp_path)
    assert "holds no index; build one with `slq index`" in text


def test_what_is_no_data_set_is_not_verified(tmp_path: Path) -> None:
    text = refusal("verify", tmp_path)
    assert (
        f"ArtifactError: {tmp_path} is no finished embedding data set: it has no manifest" in text
    )
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "options", [("verify", "x", "--sample", "-1"), ("plan", DEMO, "--seconds", "0")]
)
def test_numbers_out_of_range_are_usage_errors(options: tuple[str, ...]) -> None:
    assert slq(*options).exit_code == 2


def test_the_fine_stage_needs_a_service(tmp_path: Path) -> None:
    text = refusal("search", "a fox", "--index", tmp_path, "--mode", "fine")
    assert "--mode fine needs a service" in text


def test_a_full_disk_is_one_line_and_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/results.json")

    monkeypatch.setattr("slq.benchmarks.scenes.write_scenes", lambda *_: fail(errno.ENOSPC))
    text = refusal("index", DEMO, "--set", f"storage.dir={tmp_path}")
    assert "StorageError: runs/results.json cannot be written: No space left on device" in text
    monkeypatch.setattr("slq.benchmarks.scenes.write_scenes", lambda *_: fail(errno.EBADF))
    assert isinstance(slq("index", DEMO).exception, OSError)


def test_an_unknown_benchmark_names_the_known_ones() -> None:
    assert "benchmark 'speed' is unknown; choose one of train" in refusal("bench", "speed")


def test_results_wanted_must_be_positive() -> None:
    result = slq("search", "a fox", "--url", "http://127.0.0.1:1", "--top-k", "0")
    assert result.exit_code == 2


def test_the_doctor_shows_versions_and_says_what_it_found() -> None:
    result = slq("doctor")
    assert result.exit_code in (0, 1)
    assert "ray" in result.stdout
    assert ("no problems found" in result.stdout) == (result.exit_code == 0)
