"""`slq karr` on the shipped scenes: 300 captions end to end, a bad endpoint, kills, and what is mended."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from pipelines.benchmark import load_benchmark
from pipelines.evaluate import evaluate
from pipelines.failpoints import MARK, VARIABLE
from pipelines.karr.build import karr
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from slq.benchmarks.scenes import ScenesConfig, write_scenes
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError
from slq.files import file_sha256
from slq.scenes import load_sprites
from tests.integration.runs import changed, fingerprints_of_files, killing_after_a_commit
from tests.language_server import LanguageServer, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ROOT = Path(__file__).parents[2]
TABLES = ("karr.parquet", "gallery.parquet", "queries.parquet", "relevance.parquet")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 scenes."""
    folder = tmp_path_factory.mktemp("many")
    write_scenes(folder, ScenesConfig(train=2, test=240, unseen=60, seed=7))
    return folder


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 scenes."""
    folder = tmp_path_factory.mktemp("some")
    write_scenes(folder, ScenesConfig(train=2, test=48, unseen=12, seed=7))
    return folder


def of_scenes(data: Path, run: Path, **section: Any) -> Recipe:
    settings = {"kinds": ("explicit",), "shard_rows": 50, "workers": 2, **section}
    scenes = json.loads((data / "scenes.json").read_text())
    del scenes["generator"]
    return changed(
        Recipe(), data={"dir": data, "scenes": scenes}, karr=settings, storage={"dir": run}
    )


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        recipe.storage.karr / "benchmark" / "karr.parquet"
    ).to_pylist()
    return rows


def without_times(recipe: Recipe) -> dict[str, Any]:
    """All that the run has written, less the times at which words came about."""
    folder = recipe.storage.karr
    found: dict[str, Any] = {
        name: pq.read_table(folder / "benchmark" / name).to_pylist() for name in TABLES
    }
    for row in found["karr.parquet"]:
        assert row.pop("made").endswith("+00:00")
    found["lines"] = [
        json.loads(line) for line in (folder / "benchmark" / "karr.jsonl").read_text().splitlines()
    ]
    for row in found["lines"]:
        del row["made"]
    funnel = json.loads((folder / "funnel.json").read_text())
    found["funnel"] = {
        name: funnel[name] for name in ("funnel", "categories", "clue_types", "agreement")
    }
    found["review"] = (folder / "review" / "review.csv").read_text()
    found["plan"] = file_sha256(folder / "plan.parquet")
    return found


def require_whole(recipe: Recipe, total: int) -> None:
    """Every caption of the source has one outcome, no committed file is another, nothing lies about."""
    folder = recipe.storage.karr
    ledger = Ledger(folder)
    assert sum(one.rows + one.quarantined for one in ledger.commits().values()) == total
    for commit in ledger.commits().values():
        for name, sha256 in commit.files():
            assert file_sha256(folder / name) == sha256
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert [name for name in names if name.startswith(".") or name.endswith(".partial")] == []
    funnel = json.loads((folder / "funnel.json").read_text())["funnel"]
    assert funnel["num_in"] == total == funnel["num_out"] + sum(funnel["rejected"].values())
    assert funnel["num_out"] == len(rows_of(recipe))


def require_unnamed(rows: list[dict[str, Any]]) -> None:
    """No caption says its target, by a search that shares no code with the checks."""
    names = {
        word: sprite for sprite in load_sprites().values() for word in (sprite.name, sprite.plural)
    }
    for row in rows:
        sprite = names[row["target"]]
        letters = "".join(sign for sign in row["text"].lower() if sign.isalnum() or sign == " ")
        assert not any(f" {word} " in f" {letters} " for word in (sprite.name, sprite.plural)), row


def test_300_scenes_become_a_benchmark_that_can_be_measured_on(many: Path, tmp_path: Path) -> None:
    recipe = of_scenes(many, tmp_path, judges=[{"name": "table", "kind": "clues"}])
    found = karr(recipe)
    require_whole(recipe, 300)
    rows = rows_of(recipe)
    require_unnamed(rows)
    assert found["funnel"]["num_out"] == len(rows) > 250
    assert set(found["notes"]) == {"identify", "review"}
    assert sum(one["count"] for one in found["categories"].values()) == len(rows)
    assert all(one["count"] for one in found["categories"].values())
    images = {
        row["id"]: row["image"] for row in pq.read_table(many / "gallery.parquet").to_pylist()
    }
    sources = {
        row["id"]: row["text"] for row in pq.read_table(many / "queries.parquet").to_pylist()
    }
    for row in rows:
        assert row["image"] == images[row["item_id"]]
        assert row["original"] == sources[row["source_id"]]
        assert row["id"] == f"karr-{row['source_id']}"
        assert (row["rewriter"], row["model"], row["prompt_hash"]) == ("clues", "clue_table", "")
        assert row["votes"] == [{"judge": "table", "accept": True, "margin": None}]
    measured = changed(recipe, data={"dir": recipe.storage.karr / "benchmark", "scenes": None})
    benchmark = load_benchmark(measured)
    assert benchmark.relevant.sum(axis=1).tolist() == [1] * len(rows)
    assert len(benchmark.items) == len({row["item_id"] for row in rows})
    before = fingerprints_of_files(recipe.storage.karr / "shards")
    assert karr(recipe)["funnel"] == found["funnel"]
    assert fingerprints_of_files(recipe.storage.karr / "shards") == before
    with pytest.raises(ArtifactMismatchError, match="seed: 0 -> 1"):
        karr(changed(recipe, karr={"seed": 1}))


@pytest.mark.campaign
def test_the_frozen_model_identifies_and_judges_and_slq_eval_measures(
    scenes_dir: Path, tmp_path: Path
) -> None:
    judges = [{"name": name, "framing": name} for name in ("mcq", "true_false")]
    identify = {"by": "fine", "system": "untrained", "neighbours": 2}
    recipe = of_scenes(
        scenes_dir, tmp_path, shard_rows=16, identify=identify, judges=judges, workers=1
    )
    found = karr(recipe)
    require_whole(recipe, 32)
    rejected = found["funnel"]["rejected"]
    assert rejected["not_identified"] + rejected["judges"] == 32 - found["funnel"]["num_out"]
    stats = found["agreement"]["judges"]
    assert stats["judges"] == 2
    assert stats["rows"] == 32 - rejected["not_identified"]
    assert 0 <= stats["percent_agreement"] <= 1
    for row in rows_of(recipe):
        assert row["lead"] > 0
        assert sum(vote["accept"] for vote in row["votes"]) >= 1
        assert all((vote["margin"] >= 0) == vote["accept"] for vote in row["votes"])
    measured = changed(
        recipe,
        data={"dir": recipe.storage.karr / "benchmark", "scenes": None},
        eval={"systems": ("untrained",)},
    )
    report = evaluate(measured)["systems"]["untrained"]["text_to_image"]["knowledge"]
    assert report["num_queries"] == found["funnel"]["num_out"]
    trained = {"by": "coarse", "system": "slq"}
    with pytest.raises(ArtifactError, match="holds no adapter"):
        karr(changed(recipe, karr={"identify": trained}, storage={"dir": tmp_path / "none"}))


def asking(data: Path, run: Path, server: LanguageServer, **section: Any) -> Recipe:
    """A recipe that asks a server, as rewriter and as one of two judges."""
    endpoint = {
        "url": server.url, "model": "stub", "timeout_s": 2.0, "attempts": 3, "max_wait_s": 0.05, "concurrency": 8,
    }  # fmt: skip
    rewriter = {"kind": "endpoint", "endpoint": endpoint, "tries": 2, "ask_whether_named": True}
    judges = [
        {"name": "stub", "kind": "endpoint", "endpoint": endpoint},
        {"name": "table", "kind": "clues"},
    ]
    settings = {
        "rewriter": rewriter,
        "judges": judges,
        "max_error_share": 0.5,
        "shard_rows": 12,
        "min_accept_share": 0.6,
        **section,
    }
    return of_scenes(data, run, **settings)


def bad_server(**changes: Any) -> LanguageServer:
    return LanguageServer(
        **{"faults": 0.06, "lost": 0.04, "bad": 0.75, "slow_s": 2.5, "seed": 33, **changes}
    )


@pytest.fixture(scope="module")
def uninterrupted(
    ray_cluster: None, some: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the bad server's answers become where nothing is killed; `asked` counts questions."""
    with serving(bad_server()) as server:
        recipe = asking(some, tmp_path_factory.mktemp("whole"), server)
        karr(recipe)
        require_whole(recipe, 60)
        return {"recipe": recipe, "content": without_times(recipe), "asked": server.asked}


def test_a_bad_endpoint_gets_nothing_through(uninterrupted: dict[str, Any]) -> None:
    recipe = uninterrupted["recipe"]
    rows = rows_of(recipe)
    require_unnamed(rows)
    rejected = uninterrupted["content"]["funnel"]["funnel"]["rejected"]
    for reason in (
        "unanswered", "unparseable", "names_target", "names_synonym", "names_translation", "changes_rest",
        "other_object", "judges",
    ):  # fmt: skip
        assert rejected[reason] > 0, reason
    for row in rows:
        assert row["model"] == "stub"
        assert row["original"].replace(row["text"], "") == row["original"]
        assert {vote["judge"] for vote in row["votes"]} == {"stub", "table"}
        assert "<script>" not in row["text"]
    text = "".join(path.read_text() for path in recipe.storage.karr.glob("answers/*/*.json"))
    assert "<script>" in text  # it was said


def test_a_killed_driver_and_a_killed_worker_cost_no_answer_and_change_no_row(
    uninterrupted: dict[str, Any], some: Path, tmp_path: Path
) -> None:
    with serving(bad_server()) as server:
        recipe = asking(some, tmp_path / "run", server)
        file, mark = tmp_path / "recipe.yaml", tmp_path / "died"
        file.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
        driver = f"""
from pathlib import Path
from jobs.console import connected
from pipelines.karr.build import karr
from pipelines.recipe import load_recipe
connected(load_recipe(Path({str(file)!r})), karr)
"""
        killed(driver, "commit_after:2", mark)
        committed = Ledger(recipe.storage.karr).commits()
        assert len(committed) == 2
        wait_until_quiet(server)
        told, before = set(server.told), Counter(server.asked)
        with killing_after_a_commit(recipe.storage.karr, "MakeShards"):
            karr(recipe)
        again = [question for question in told if server.asked[question] > before[question]]
    require_whole(recipe, 60)
    assert without_times(recipe) == uninterrupted["content"]
    assert len(told) > 60
    assert len(again) <= 8  # answers that were under way when it died; the others were kept
    assert server.asked.keys() == uninterrupted["asked"].keys()


def wait_until_quiet(server: LanguageServer) -> None:
    """Workers of a dead driver live on for a moment; return once none of them asks any more."""
    deadline = time.monotonic() + 60
    asked, since = -1, time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < 3:
        if (now := server.asked.total()) != asked:
            asked, since = now, time.monotonic()
        time.sleep(0.1)


def killed(code: str, failpoint: str, mark: Path) -> None:
    """Run a driver that dies of SIGKILL at a failpoint."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, VARIABLE: failpoint, MARK: str(mark), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert mark.exists(), done.stderr[-3000:]
    assert done.returncode != 0


@pytest.mark.campaign
def test_a_driver_killed_once_it_has_planned_or_while_it_tells_the_outcome_goes_on(
    uninterrupted: dict[str, Any], scenes_dir: Path, tmp_path: Path
) -> None:
    recipe = uninterrupted["recipe"]
    shutil.copytree(recipe.storage.karr, tmp_path / "run" / "karr")
    shutil.rmtree(tmp_path / "run" / "karr" / "benchmark")
    recipe = changed(recipe, storage={"dir": tmp_path / "run"})
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json())
    code = f"""
from pathlib import Path
from pipelines.karr.build import karr
from pipelines.recipe import Recipe
karr(Recipe.model_validate_json(Path({str(file)!r}).read_text()))
"""
    killed(code, "manifest_before", tmp_path / "died")
    karr(recipe)  # nothing is left to be asked, so the server may be gone
    require_whole(recipe, 60)
    assert without_times(recipe) == uninterrupted["content"]
    begun = of_scenes(scenes_dir, tmp_path / "begun")
    file.write_text(begun.model_dump_json())
    killed(code, "plan_written", tmp_path / "planned")
    assert (begun.storage.karr / "plan.parquet").is_file()
    assert not Ledger(begun.storage.karr).commits()
    karr(begun)
    require_whole(begun, 32)


def pairs_of(scenes: Path, folder: Path, count: int) -> Path:
    """A table of the first captions, with their images as files beside it."""
    folder.mkdir()
    texts = pq.read_table(scenes / "queries.parquet", filters=[("kind", "=", "explicit")])
    images = pq.read_table(scenes / "gallery.parquet", columns=["image"])["image"].to_pylist()
    rows = [
        {"id": f"c{number}", "uri": f"{number}.png", "text": text}
        for number, text in enumerate(texts["text"].to_pylist()[:count])
    ]
    for row, image in zip(rows, images, strict=False):
        (folder / row["uri"]).write_bytes(image)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_too_many_errors_fail_the_run_and_retry_errors_mends_answers_and_images(
    scenes_dir: Path, tmp_path: Path
) -> None:
    path = pairs_of(scenes_dir, tmp_path / "pairs", 12)
    missing, torn = path.with_name("0.png"), path.with_name("2.png")
    whole = {file: file.read_bytes() for file in (missing, torn)}
    missing.unlink()
    torn.write_bytes(whole[torn][: len(whole[torn]) // 2])
    settings = {
        "captions": path,
        "identify": {"by": "coarse", "system": "untrained", "min_lead": -2.1},
        "max_error_share": 0.2,
        "workers": 1,
        "shard_rows": 6,
    }
    with serving(LanguageServer(lost=0.4, seed=1)) as server:
        recipe = asking(scenes_dir, tmp_path, server, **settings)
        with pytest.raises(
            DataError, match=r"of 12 captions .* more than karr.max_error_share allows \(20.0%\)"
        ):
            karr(recipe)
    assert Ledger(recipe.storage.karr).commits()[0].quarantined > 2
    errors = pq.read_table(recipe.storage.karr / "errors" / "part-000000.parquet").to_pylist()
    found = {row["id"]: row["error"] for row in errors}
    assert (found["c0"], found["c2"]) == ("unreadable_image",) * 2
    for file, data in whole.items():
        file.write_bytes(data)
    with serving(LanguageServer(seed=1)) as server:
        mended = asking(scenes_dir, tmp_path, server, **settings)
        result = karr(mended, retry_errors=True)
    assert result["funnel"]["num_out"] == 12 - result["funnel"]["rejected"]["judges"]
    require_whole(mended, 12)
    rows = {row["source_id"]: row for row in rows_of(mended)}
    assert (rows["c0"]["image"], rows["c2"]["image"]) == (whole[missing], whole[torn])
    assert all(-2 <= row["lead"] <= 2 for row in rows.values())
    vectors = pq.read_table(mended.storage.karr / "vectors.parquet")
    assert sorted(vectors["id"].to_pylist()) == sorted(f"c{number}" for number in range(12))
    assert all(vectors["readable"].to_pylist())


def test_what_no_worker_could_do_is_refused_before_any_starts(
    scenes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = {"api_key_env": "SLQ_TEST_KEY"}
    recipe = of_scenes(scenes_dir, tmp_path, rewriter={"kind": "endpoint", "endpoint": endpoint})
    with pytest.raises(ConfigError, match="environment variable SLQ_TEST_KEY is not set"):
        karr(recipe)
    workers = int(ray.cluster_resources()["CPU"]) + 1
    if workers <= 32:  # shards
        with pytest.raises(ConfigError, match=rf"karr.workers is {workers}, but the cluster has"):
            karr(of_scenes(scenes_dir, tmp_path, workers=workers, shard_rows=1))
    assert not (tmp_path / "karr" / "commits").exists()


def test_a_wrong_key_ends_the_run_in_words(scenes_dir: Path, tmp_path: Path) -> None:
    with (
        serving(LanguageServer(key="right")) as server,
        pytest.raises(ConfigError, match="answered 401"),
    ):
        karr(asking(scenes_dir, tmp_path, server, workers=1))
