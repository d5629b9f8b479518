"""A study: what it refuses, what it runs and does not run twice, which value it chooses, what its table says."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from typer.testing import CliRunner

from jobs.cli import app
from jobs.compare import compare, outline
from jobs.compare.chart import (
    category_figure,
    study_figure,
    write_category_chart,
    write_study_chart,
)
from jobs.compare.page import write_study_page
from jobs.compare.pairs import corrected, paired_p
from jobs.compare.papers import published_columns
from jobs.compare.running import Flows, count_values, training_figures
from jobs.compare.study import ZERO_SHOT, Plan, plan_study, slug
from jobs.compare.tables import (
    category_columns,
    columns,
    notes,
    study_markdown,
    study_rows,
    study_summary,
    study_table,
)
from jobs.compare.tuning import METRIC, choose, judged, on_edge
from pipelines.ranking import RANKS_FILE
from pipelines.recipe import DataConfig, Recipe, ResourcesConfig
from pipelines.training_log import HISTORY, write_history
from slq.arrow import NEGATIVES, RANKS
from slq.benchmarks.published import COCO
from slq.errors import ConfigError, StorageError, TrainingError
from slq.files import file_sha256, read_json
from slq.pretraining.config import PretrainConfig
from slq.pretraining.evaluation import accuracies_of
from tests.families import BUILDERS

STUDIES = sorted((Path(__file__).parents[2] / "jobs" / "recipes" / "studies").glob("*.yaml"))
SUBSETS = ("explicit", "explicit, hard subset", "knowledge")
RATES = [0.003, 0.01, 0.03]


def study_file(folder: Path, **changes: Any) -> Path:
    """A study of SLQ, which is tuned, and LoRA, which is not; top-level keys are replaced or, if None, removed."""
    recipe = {
        "data": {"scenes": {"train": 8}},
        "train": {"held_out": 4, "warmup_steps": 1, "num_steps": 9},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
    study: dict[str, Any] = {
        "recipe": "base.yaml",
        "set": {"eval.systems": ["slq"]},
        "retention_scenes": 5,
        "tune_steps": 3,
        "runs": {
            "SLQ": {"tune": {"train.lr": RATES}},
            "LoRA r=8": {"set": {"adapter.method": "lora", "train.lr": 0.001}},
        },
    }
    study = {key: value for key, value in {**study, **changes}.items() if value is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


# What a study may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune_step": 4}, "study.yaml: tune_step is unknown; did you mean tune_steps?"),
        (
            {"runs": {"a": {"tun": {}}}},
            "study.yaml: runs.a.tun is unknown; did you mean runs.a.tune?",
        ),
        ({"runs": {}}, "study.yaml: runs: .*at least 1 item"),
        ({"runs": None}, "study.yaml: runs: Field required"),
        (
            {"runs": {"a b": {}, "A-b": {}}},
            r"runs 'a b' and 'A-b' would both write a-b/; rename one",
        ),
        ({"runs": {"--": {}}}, "run '--' cannot name a folder; rename it"),
        ({"runs": {"Data": {}}}, "run 'Data' cannot name a folder"),
        (
            {"runs": {"a": {"set": {"train.lrr": 1}}}},
            "study.yaml: run 'a': base.yaml: train.lrr is unknown; did you mean train.lr?",
        ),
        (
            {"runs": {"a": {"tune": {"train.lr": [0.1]}}}},
            r"runs.a.tune.train.lr: .*at least 2 items",
        ),
        (
            {"runs": {"a": {"tune": {"train.lr": [1, 2], "train.seed": [1, 2]}}}},
            "tune one key, not train.lr and train.seed",
        ),
        (
            {"runs": {"a": {"tune": {"train.lr": [0.1, "1e-1"]}}}},
            "run 'a': tune.train.lr has the same value twice",
        ),
        (
            {"runs": {"a": {"set": {"storage.dir": "x"}}}},
            "run 'a': storage.dir has no place here: --out",
        ),
        ({"set": {"storage.dir": "x"}}, "study.yaml: set: storage.dir has no place here: --out"),
        (
            {"runs": {"a": {"set": {"retention.scenes": 5}}}},
            "run 'a': retention.scenes has no place here: all",
        ),
        (
            {"runs": {"a": {"set": {"backbone.name": "x"}}}},
            "run 'a': backbone.name has no place here: all",
        ),
        ({"runs": {"a": {"set": {"eval.ks": [5]}}}}, "add it to eval.systems and 1 to eval.ks"),
        (
            {"runs": {"a": {"set": {"eval.systems": ["slq", "slq_index"]}}}},
            "a study builds no index that `slq_index` could ask; leave it out of eval.systems",
        ),
        (
            {"set": {"train.held_out": 0}},
            "run 'SLQ': trials are judged on held-out pairs; set train.held_out",
        ),
        ({"tune_steps": 1}, r"would not get past train.warmup_steps \(1\); raise it"),
        ({"recipe": "bas.yaml"}, "did you mean .*base.yaml"),
    ],
)
def test_a_study_that_cannot_be_run_says_why(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_study(study_file(tmp_path, **changes), tmp_path / "out")


def test_a_missing_or_malformed_study_file_is_named(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    with pytest.raises(ConfigError, match=f"did you mean {path}"):
        plan_study(tmp_path / "studdy.yaml", tmp_path)
    for text, message in (
        ("a: [", "is not valid YAML"),
        ("- a", "must hold `recipe:` and `runs:`"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            plan_study(path, tmp_path)


def test_runs_share_the_data_and_have_folders_of_their_own(tmp_path: Path) -> None:
    plan = plan_study(study_file(tmp_path), tmp_path / "out")
    tuned, fixed = plan.runs
    assert [run.folder for run in plan.runs] == [tmp_path / "out/slq", tmp_path / "out/lora-r-8"]
    assert plan.num_trainings == 5
    for recipe in (plan.zero_shot, tuned.recipe, fixed.recipe, *(t.recipe for t in tuned.trials)):
        assert recipe.data.dir == tmp_path / "out/data"
    assert plan.zero_shot.eval.systems == ("last_token", "untrained")
    assert (fixed.recipe.adapter.method, fixed.recipe.train.lr) == ("lora", 0.001)
    assert fixed.recipe.eval.systems == ("slq",)
    assert [trial.value for trial in tuned.trials] == RATES
    trial = tuned.trials[1]
    assert trial.recipe.storage.dir == tmp_path / "out/slq/trials/0.01"
    assert (trial.recipe.train.num_steps, trial.final.train.num_steps) == (3, 9)
    assert trial.final == tuned.recipe.model_copy(
        update={"train": tuned.recipe.train.model_copy(update={"lr": 0.01})}
    )


def test_overrides_of_the_command_line_win_over_the_runs_own(tmp_path: Path) -> None:
    plan = plan_study(study_file(tmp_path), tmp_path, ["train.lr=0.5", "data.dir=/elsewhere"])
    assert plan.runs[1].recipe.train.lr == 0.5
    assert plan.runs[1].recipe.data.dir == Path("/elsewhere")
    assert [trial.final.train.lr for trial in plan.runs[0].trials] == RATES
    with pytest.raises(ConfigError, match=r"--set: storage\.dir has no place here"):
        plan_study(study_file(tmp_path), tmp_path, ["storage.dir=x"])


def test_checkpoints_on_a_shared_store_are_kept_apart(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({**base, "storage": {"checkpoints": "s3://bucket/a/"}})
    )
    plan = plan_study(path, tmp_path)
    places = [run.recipe.storage.checkpoints for run in plan.runs]
    places += [trial.recipe.storage.checkpoints for trial in plan.runs[0].trials]
    assert places[:3] == [
        "s3://bucket/a/slq",
        "s3://bucket/a/lora-r-8",
        "s3://bucket/a/slq/trials/0.003",
    ]
    assert len(set(places)) == 5


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_can_be_planned(path: Path, tmp_path: Path) -> None:
    shown = outline(plan_study(path, tmp_path))
    assert shown["trainings"] >= len(shown["runs"]) > 2
    assert not list(tmp_path.iterdir())


def test_the_methods_are_tuned_alike() -> None:
    (path,) = [path for path in STUDIES if path.stem == "methods"]
    plan = plan_study(path, Path("unused"))
    assert [run.recipe.adapter.method for run in plan.runs] == ["slq", "lora", "full"]
    assert {(run.key, len(run.trials)) for run in plan.runs} == {("train.lr", 4)}
    assert (
        len(
            {run.recipe.train.model_copy(update={"lr": 1.0}).model_dump_json() for run in plan.runs}
        )
        == 1
    )


def test_a_slug_is_a_plain_folder_name() -> None:
    assert [slug(name) for name in ("SLQ", "a / b", "0.003", "[48, 96]", "..")] == [
        "slq",
        "a-b",
        "0.003",
        "48-96",
        "",
    ]


# Tuning ------------------------------------------------------------------------------------------------------


def test_the_chosen_trial_is_the_one_that_sorting_puts_first() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        hits = rng.integers(0, 3, size=4) / 2
        losses = rng.integers(0, 3, size=4).astype(float)
        trials = [
            {"value": n, METRIC: h, "loss": x}
            for n, (h, x) in enumerate(zip(hits, losses, strict=True))
        ]
        expected = sorted((-h, x, n) for n, (h, x) in enumerate(zip(hits, losses, strict=True)))[0][
            2
        ]
        assert choose(trials) == expected


def test_a_trial_without_a_figure_is_never_chosen_before_one_with() -> None:
    trials: list[dict[str, Any]] = [
        {"value": 1, METRIC: None, "loss": None, "error": "the loss is not finite"},
        {"value": 2, METRIC: 0.0, "loss": None},
        {"value": 3, METRIC: 0.0, "loss": 9.0},
    ]
    assert choose(trials) == 2
    with pytest.raises(
        TrainingError, match=r"no trial can be judged \(1: the loss is not finite\)"
    ):
        choose(trials[:1])


@pytest.mark.parametrize(
    ("values", "chosen", "edge"),
    [([1, 2, 3], 0, True), ([2, 1, 3], 0, False), ([1, 2, 3], 2, True), (["a", "b"], 0, False)],
)
def test_the_smallest_and_the_largest_number_are_the_edge(
    values: list[Any], chosen: int, edge: bool
) -> None:
    assert on_edge(values, chosen) is edge
    assert not on_edge([True, False], 0)


def test_a_trial_is_judged_by_its_last_measurement_and_last_losses() -> None:
    history = [{"step": n, "loss": float(n)} for n in range(1, 9)]
    history[2][METRIC], history[6][METRIC] = 0.9, 0.5
    assert judged(history) == {METRIC: 0.5, "loss": 6.0}
    assert judged([{"step": 1, "loss": float("nan")}]) == {METRIC: None, "loss": None}


# A whole study, with recorders for flows ---------------------------------------------------------------------


class Recorder:
    """Flows that write what the real ones would, and note what they were asked.

    Args:
        out: The study's folder.
        crash_at: The call that fails, in words as in `calls`.
    """

    def __init__(self, out: Path, crash_at: str = "") -> None:
        self._out, self.crash_at = out, crash_at
        self.calls: list[str] = []
        self.connected = 0

    @property
    def flows(self) -> Flows:
        return Flows(
            generate=self._generate,
            connect=self._connect,
            train=self._train,
            mine=self._mine,
            evaluate=self._evaluate,
            retention=self._retention,
        )

    def _note(self, what: str, recipe: Recipe) -> None:
        assert self.connected == 1
        call = f"{what} {recipe.storage.dir.relative_to(self._out)}"
        if what in ("train", "evaluate"):
            call += f" lr={recipe.train.lr} steps={recipe.train.num_steps}"
        if call.startswith(self.crash_at or "never"):
            raise KeyboardInterrupt
        self.calls.append(call)

    def _generate(self, data: DataConfig) -> None:
        self.calls.append(f"generate {data.dir.relative_to(self._out)}")
        data.dir.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _connect(self, resources: ResourcesConfig) -> Iterator[None]:
        self.connected += 1
        yield
        self.connected -= 1

    def _train(self, recipe: Recipe) -> Path:
        self._note("train", recipe)
        if recipe.train.lr == 0.03:
            raise TrainingError("the loss is not finite at step 1")
        recipe.storage.adapter.mkdir(parents=True, exist_ok=True)
        values = {"a": np.zeros((4, 3), np.float32), "b": np.zeros(1, np.float32)}
        save_file(values, recipe.storage.adapter / "adapter_model.safetensors")
        train_dir = recipe.storage.dir / "train"
        train_dir.mkdir(exist_ok=True)
        entry = {
            METRIC: 1 - recipe.train.lr,
            "loss": 1.0,
            "seconds/read": 0.5,
            "seconds/update": 1.0,
        }
        steps = range(1, recipe.train.num_steps + 1)
        write_history(
            train_dir / HISTORY,
            [{"step": step, **entry, "peak_memory_bytes": step * 2.0**20} for step in steps],
        )
        return recipe.storage.adapter

    def _mine(self, recipe: Recipe) -> dict[str, Any]:
        self._note("mine", recipe)
        path = recipe.data.path("negatives")
        schema = NEGATIVES.with_metadata({"fingerprint": "space"})
        pq.write_table(schema.empty_table(), path)
        return {"file": str(path)}

    def _evaluate(self, recipe: Recipe) -> dict[str, Any]:
        self._note("evaluate", recipe)
        recipe.storage.evaluation.mkdir(parents=True, exist_ok=True)
        return results_of(recipe.eval.systems, 0.5 + recipe.train.lr)

    def _retention(
        self, recipe: Recipe, adapter: Path | None, *, num_scenes: int
    ) -> dict[str, Any]:
        self._note("retention", recipe)
        assert (num_scenes, adapter is None) == (5, recipe.storage.dir.name == ZERO_SHOT)
        return retained(0.6, identical=recipe.adapter.method == "slq")


def results_of(systems: Any, value: float) -> dict[str, Any]:
    entry = {"hit@1": value, "hit@1_interval": [value - 0.1, value + 0.1], "num_queries": 8}
    return {"systems": {name: {"text_to_image": dict.fromkeys(SUBSETS, entry)} for name in systems}}


def retained(caption: float, *, identical: bool) -> dict[str, Any]:
    return {"match_accuracy": 0.9, "caption_accuracy": caption, "weights_identical": identical}


FIRST = ["generate data", "retention zero-shot", "evaluate zero-shot lr=0.01 steps=9"]
TRIALS = [f"train slq/trials/{rate} lr={rate} steps=3" for rate in RATES]
SLQ = ["train slq lr=0.003 steps=9", "evaluate slq lr=0.003 steps=9", "retention slq"]
LORA = [
    "train lora-r-8 lr=0.001 steps=9",
    "evaluate lora-r-8 lr=0.001 steps=9",
    "retention lora-r-8",
]


def test_a_study_tunes_trains_and_measures_every_run_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    recorder = Recorder(out)
    summary = compare(plan_study(study_file(tmp_path), out), recorder.flows)
    assert recorder.calls == [*FIRST, *TRIALS, *SLQ, *LORA]
    assert json.loads((out / "study.json").read_text()) == summary
    assert (out / "study.md").read_text() == study_markdown(summary)
    assert [row["name"] for row in summary["rows"]] == [
        "zero-shot last token",
        "untrained latents",
        "SLQ",
        "LoRA r=8",
    ]
    slq = summary["rows"][2]
    assert slq["trained_parameters"] == 13
    assert slq["training_seconds"] == pytest.approx(9 * 1.5)
    assert slq["peak_memory_bytes"] == 9 * 2.0**20
    assert slq["tuned"]["on_edge"]
    assert "not finite" in slq["tuned"]["trials"][2]["error"]
    assert "on the edge of its grid, so widen" in summary["notes"][0]
    assert "trials that failed: 0.03" in summary["notes"][0]
    shown = capsys.readouterr().err
    assert "compare run 1/2 SLQ: trial 2/3, train.lr = 0.01" in shown
    assert "compare run 2/2 LoRA r=8: measuring" in shown
    assert (out / "slq/trials/0.01/train" / HISTORY).is_file()
    assert not (out / "slq/trials/0.01/adapter").exists()


@pytest.mark.parametrize(
    ("crash_at", "before", "after"),
    [
        ("train slq/trials/0.01", [*FIRST, TRIALS[0]], [*TRIALS[1:], *SLQ, *LORA]),
        ("evaluate slq", [*FIRST, *TRIALS, SLQ[0]], [TRIALS[2], *SLQ, *LORA]),
        ("retention lora", [*FIRST, *TRIALS, *SLQ, *LORA[:2]], LORA),
        ("evaluate zero-shot", FIRST[:2], [*FIRST[1:], *TRIALS, *SLQ, *LORA]),
    ],
)
def test_after_a_crash_only_what_is_missing_is_run(
    tmp_path: Path, crash_at: str, before: list[str], after: list[str]
) -> None:
    out = tmp_path / "out"
    plan = plan_study(study_file(tmp_path), out)
    recorder = Recorder(out, crash_at)
    with pytest.raises(KeyboardInterrupt):
        compare(plan, recorder.flows)
    assert recorder.calls == before
    assert not (out / "study.json").exists()
    again = Recorder(out)
    summary = compare(plan, again.flows)
    assert again.calls == [FIRST[0], *after]  # trials that failed are tried again
    last = Recorder(out)
    assert compare(plan, last.flows) == summary
    assert last.calls == FIRST[:1]


def test_a_changed_run_is_run_again_and_the_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compare(plan_study(study_file(tmp_path), out), Recorder(out).flows)
    runs = {
        "SLQ": {"tune": {"train.lr": [*RATES[:2], 0.02]}},
        "LoRA r=8": {"set": {"adapter.method": "lora", "train.lr": 0.001}},
    }
    recorder = Recorder(out)
    compare(plan_study(study_file(tmp_path, runs=runs), out), recorder.flows)
    trial = "train slq/trials/0.02 lr=0.02 steps=3"
    assert recorder.calls == [FIRST[0], trial, *SLQ]
    assert "was made with other settings: it is made again" in capsys.readouterr().err


def test_a_run_learns_from_what_an_earlier_one_mined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that mine alike share a file; another adapter, or other settings, mine anew."""
    config = SimpleNamespace(fingerprint="space")
    monkeypatch.setattr("jobs.compare.running.load_adapter_config", lambda _: config)
    mined = {"negatives_of": "SLQ", "set": {"train.negatives": 2}}
    deeper = {"negatives_of": "SLQ", "set": {"train.negatives": 2, "mine.depth": 50}}
    runs = {"SLQ": {}, "a": mined, "b": mined, "c": deeper}
    out = tmp_path / "out"
    plan = plan_study(study_file(tmp_path, retention_scenes=0, runs=runs), out)
    recorder = Recorder(out)
    compare(plan, recorder.flows)
    mining = [n for n, call in enumerate(recorder.calls) if call.startswith("mine ")]
    assert [recorder.calls[n : n + 2] for n in mining] == [
        ["mine slq", "train a lr=0.01 steps=9"],
        ["mine slq", "train c lr=0.01 steps=9"],
    ]
    files = [run.recipe.data.path("negatives").resolve() for run in plan.runs[1:]]
    assert files[0] == files[1] != files[2]
    assert {file.parent for file in files} == {out / "slq"}
    assert all(file.is_file() for file in files)
    (out / "a" / "result.json").unlink()
    config.fingerprint = "another space"
    again = Recorder(out)
    compare(plan, again.flows)
    assert "mine slq" in again.calls


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"negatives_of": "b", "set": {"train.negatives": 1}}, "'b', which is no run before this"),
        ({"negatives_of": "SLQ"}, "a run has both or neither"),
        ({"set": {"train.negatives": 1}}, "a run has both or neither"),
    ],
)
def test_negatives_come_from_an_earlier_run_only(
    tmp_path: Path, run: dict[str, Any], message: str
) -> None:
    path = study_file(tmp_path, runs={"SLQ": {}, "a": run, "b": {}})
    with pytest.raises(ConfigError, match=message):
        plan_study(path, tmp_path / "out")


FINE = {"adapter_of": "SLQ", "set": {"eval.systems": ["slq_fine"], "rerank.profile": "compat"}}


def test_a_run_measures_the_adapter_of_an_earlier_one_and_trains_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = {"SLQ": {"set": {"train.lr": 0.001}}, "SLQ, compat": FINE}
    plan = plan_study(study_file(tmp_path, runs=runs), out)
    assert plan.num_trainings == 1
    recorder = Recorder(out)
    summary = compare(plan, recorder.flows)
    slq = ["train slq lr=0.001 steps=9", "evaluate slq lr=0.001 steps=9", "retention slq"]
    assert recorder.calls == [*FIRST, *slq, "evaluate slq-compat lr=0.001 steps=9"]
    assert (out / "slq-compat/adapter").resolve() == out / "slq/adapter"
    assert [row["name"] for row in summary["rows"]][2:] == ["SLQ", "SLQ, compat"]
    assert plan.runs[1].recipe.rerank.profile == "compat"
    last = Recorder(out)
    assert compare(plan, last.flows) == summary
    assert last.calls == FIRST[:1]
    runs["SLQ"] = {"set": {"train.lr": 0.002}}
    changed = Recorder(out)
    compare(plan_study(study_file(tmp_path, runs=runs), out), changed.flows)
    assert changed.calls[-1] == "evaluate slq-compat lr=0.002 steps=9"  # another adapter by now


def test_a_run_may_train_where_it_measured_and_the_reverse(tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = {"set": {"train.lr": 0.001}}
    kinds = [FINE, trained, FINE]
    for kind in kinds:
        runs = {"SLQ": {"set": {"train.lr": 0.002}}, "b": kind}
        compare(plan_study(study_file(tmp_path, runs=runs), out), Recorder(out).flows)
        assert (out / "b/adapter").is_symlink() == ("adapter_of" in kind)
        assert (out / "slq/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"adapter_of": "b"}, "adapter_of names 'b', which is no run before this"),
        ({"adapter_of": "first fine"}, "adapter_of names 'first fine', which trains nothing"),
        (
            {"adapter_of": "SLQ", "tune": {"train.lr": [1, 2]}},
            "adapter_of trains nothing, so tune and negatives_of",
        ),
        (
            {"adapter_of": "SLQ", "set": {"train.lr": 1}},
            "train.lr has no place here; set rerank and eval",
        ),
        (
            {"adapter_of": "SLQ", "set": {"eval.systems": ["last_token"]}},
            "hit@1 of `slq` or `slq_fine` is compared, not last_token",
        ),
    ],
)
def test_what_is_measured_is_an_adapter_that_was_trained(
    tmp_path: Path, run: dict[str, Any], message: str
) -> None:
    runs = {"SLQ": {}, "first fine": FINE, "a": run, "b": {}}
    with pytest.raises(ConfigError, match=message):
        plan_study(study_file(tmp_path, runs=runs), tmp_path / "out")


def test_the_baseline_is_a_run(tmp_path: Path) -> None:
    message = "baseline names 'CLIP', which is no run; it has SLQ, LoRA r=8"
    with pytest.raises(ConfigError, match=message):
        plan_study(study_file(tmp_path, baseline="CLIP"), tmp_path / "out")


def write_ranks(folder: Path, **systems: dict[str, int]) -> None:
    """Ranks of queries; those whose id begins with `k` are of knowledge."""
    rows = [
        {
            "query_id": query,
            "system": system,
            "rank": rank,
            "subsets": ["knowledge" if query.startswith("k") else "explicit"],
        }
        for system, ranks in systems.items()
        for query, rank in ranks.items()
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=RANKS), folder / RANKS_FILE)


def with_ranks(plan: Plan) -> dict[str, dict[str, Any]]:
    """Results of runs whose ranks are those that lie there."""
    folders = {ZERO_SHOT: plan.zero_shot.storage.evaluation}
    folders |= {run.name: run.recipe.storage.evaluation for run in plan.runs}
    paths = {name: folder / RANKS_FILE for name, folder in folders.items()}
    return {
        name: {"ranks_sha256": file_sha256(path) if path.is_file() else None}
        for name, path in paths.items()
    }


def test_rows_are_tested_against_the_baseline_query_by_query(tmp_path: Path) -> None:
    plan = plan_study(study_file(tmp_path, baseline="LoRA r=8"), tmp_path / "out")
    slq, lora = (run.recipe.storage.evaluation for run in plan.runs)
    right = {**{f"e{n}": 1 for n in range(12)}, **{f"k{n}": 1 for n in range(4)}}
    wrong = {**{f"e{n}": 7 for n in range(12)}, **{f"k{n}": 1 for n in range(4)}}
    write_ranks(lora, slq=wrong)
    write_ranks(slq, slq=dict(reversed(right.items())))
    write_ranks(plan.zero_shot.storage.evaluation, last_token={"e0": 1})  # other queries
    results = with_ranks(plan)
    found = paired_p(plan, results)
    assert list(found) == [("SLQ", "slq")]
    assert paired_p(plan, {**results, "SLQ": {"ranks_sha256": "0" * 64}}) == {}  # of another one
    # All twelve differences have one sign: two of the 2^12 assignments are as extreme.
    assert found["SLQ", "slq"]["explicit"] == pytest.approx(2 / 2**12, abs=4e-4)
    assert found["SLQ", "slq"]["knowledge"] == 1
    rows = study_rows(fake_results(), found)
    assert columns(rows)["p, explicit"] == ["", "", "<.001 (<.001)", "", "", ""]
    assert columns(rows)["p, knowledge"] == ["", "", "1.000 (1.000)", "", "", ""]
    text = study_markdown({"rows": rows, "notes": [], "baseline": "LoRA r=8"})
    assert "on hit@1 against LoRA r=8, query by query" in text


def test_p_values_are_corrected_among_the_systems_of_a_subset() -> None:
    paired = {
        ("a", "slq"): {"explicit": 0.01, "knowledge": 0.5},
        ("b", "slq"): {"explicit": 0.02},
        ("c", "slq"): {"explicit": 0.04},
    }
    found = corrected(paired)
    assert found["a", "slq"] == {"explicit": pytest.approx(0.03), "knowledge": 0.5}
    assert found["b", "slq"] == {"explicit": pytest.approx(0.04)}
    assert found["c", "slq"] == {"explicit": pytest.approx(0.04)}


def test_the_page_holds_every_figure_and_asks_for_nothing_else(tmp_path: Path) -> None:
    results = fake_results()
    entry = {"hit@1": 0.25, "hit@1_interval": [0.125, 0.5], "num_queries": 7}
    for result in results.values():
        for report in result["results"]["systems"].values():
            report["categories"] = {"tool_use": entry}
    rows = study_rows(results, {("full | all", "slq"): {"explicit": 0.02, "knowledge": 1.0}})
    rows[3]["name"] = "<script>alert(1)</script>"
    summary = {
        "study": "s.yaml", "baseline": "SLQ", "rows": rows, "notes": ["a < b"], "results": results,
    }  # fmt: skip
    page = write_study_page(summary, tmp_path / "study.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    for text in ("80.0", "70.0-90.0", "12.5-50.0", "3,841", ".020", "changed", "a &lt; b"):
        assert text in page
    assert "tool use (n = 7)" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    plain = {**summary, "rows": study_rows(fake_results())}
    page = write_study_page(plain, tmp_path / "study.html").read_text()
    assert "Knowledge by category" not in page
    assert write_category_chart(plain, tmp_path / "c.png") is None
    assert write_category_chart(summary, tmp_path / "c.png") == tmp_path / "c.png"
    axes = category_figure(rows).axes
    assert axes[0].get_title(loc="left") == "tool use  (n = 7)"
    assert [bar.get_width() for bar in axes[0].patches] == [25.0] * len(rows)


def test_the_papers_figures_of_the_backbone_stand_below_ours(tmp_path: Path) -> None:
    results = fake_results()
    zero = results[ZERO_SHOT]["results"]
    assert published_columns(results) == {}  # of one's own data
    zero["benchmark"] = {"name": COCO, "direction": "text -> image"}
    zero["backbone"] = {"model": "OpenGVLab/InternVL3-1B-hf"}
    found = published_columns(results)
    rows = {
        model: {name: cells[n] for name, cells in found.items()}
        for n, model in enumerate(found["published"])
    }
    assert set(rows) == {f"{m} (InternVL3-1B)" for m in ("SLQ", "LoRA", "full fine-tuning")}
    lora = rows["LoRA (InternVL3-1B)"]
    assert (lora["MMMU accuracy"], lora["OCRBench score"]) == ("42.1", "785")
    assert lora[f"{COCO} text -> image hit@5"] == "72.9"
    assert rows["SLQ (InternVL3-1B)"][f"{COCO} text -> image hit@1"] == "48.5"
    assert rows["SLQ (InternVL3-1B)"]["GPU hours"] == "3.9"
    assert not any("Flickr" in name for name in found)
    summary = {
        "study": "s.yaml", "baseline": "SLQ", "notes": [], "results": results,
        "rows": study_rows(results),
    }  # fmt: skip
    assert "| LoRA (InternVL3-1B) |" in study_markdown(summary)
    assert "What papers report" in write_study_page(summary, tmp_path / "s.html").read_text()


def test_gpu_hours_are_those_of_all_workers() -> None:
    results = fake_results()
    assert "GPU hours" not in columns(study_rows(results))
    for gpus in (2, 0):
        resources = {"train_workers": 8, "gpus_per_worker": gpus}
        results["full | all"]["recipe"] = {"resources": resources}
        found = columns(study_rows(results)).get("GPU hours")
        assert found == (["", "", "", "", "", "0.44"] if gpus else None)  # 100 s x 16


def test_without_ranks_of_the_baseline_nothing_is_tested(tmp_path: Path) -> None:
    plan = plan_study(study_file(tmp_path), tmp_path / "out")
    write_ranks(plan.runs[1].recipe.storage.evaluation, slq={"e0": 1})
    assert paired_p(plan, with_ranks(plan)) == {}


def test_categories_have_a_table_of_their_own() -> None:
    results = fake_results()
    entry = {"hit@1": 0.25, "hit@1_interval": [0.125, 0.5], "num_queries": 7}
    results["SLQ"]["results"]["systems"]["slq"]["categories"] = {"tool_use": entry}
    rows = study_rows(results)
    found = category_columns(rows)
    assert found["tool use (n = 7)"] == ["", "", "25.0 (12.5-50.0)", "", "", ""]
    text = study_markdown({"rows": rows, "notes": [], "baseline": "SLQ"})
    assert "| run | tool use (n = 7) |" in text
    assert category_columns(study_rows(fake_results())) == {}


def test_variants_and_cut_vectors_have_rows_and_no_time_of_their_own() -> None:
    systems = ("slq", "slq:16-latents", "slq:4-latents", "slq@96", "slq@48")
    result = {"results": results_of(systems, 0.5), "training": {"seconds": 7.0}}
    rows = study_rows({"SLQ": result})
    assert [row["name"] for row in rows] == [
        "SLQ",
        "SLQ: 4-latents",
        "SLQ: 16-latents",
        "SLQ, cut to 48",
        "SLQ, cut to 96",
    ]
    assert {row["training_seconds"] for row in rows} == {None}
    alone = {"results": results_of(("slq",), 0.5), "training": {"seconds": 7.0}}
    assert study_rows({"SLQ": alone})[0]["training_seconds"] == 7


def test_without_retention_and_tuning_neither_is_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    recorder = Recorder(out)
    plan = plan_study(study_file(tmp_path, retention_scenes=0, runs={"SLQ": {}}), out)
    summary = compare(plan, recorder.flows)
    assert recorder.calls == [FIRST[0], FIRST[2], *[c.replace("0.003", "0.01") for c in SLQ[:2]]]
    assert "caption kept" not in columns(summary["rows"])
    assert summary["notes"] == []


def test_a_backbone_that_cannot_be_asked_is_found_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    def refuse(*_: Any, **__: Any) -> dict[str, Any]:
        raise ConfigError("x is a GPT, no Qwen3-VL of scenes")

    out = tmp_path / "out"
    recorder = Recorder(out)
    flows = replace(recorder.flows, retention=refuse)
    with pytest.raises(ConfigError, match="no Qwen3-VL of scenes; set retention_scenes: 0"):
        compare(plan_study(study_file(tmp_path), out), flows)
    assert recorder.calls == FIRST[:1]


@pytest.mark.parametrize(
    ("family", "patch", "reason"),
    [
        ("intern_vl", 8, "is a InternVLForConditionalGeneration, no"),
        ("qwen3_vl", 16, "patches of 16 px, no"),
    ],
)
def test_only_a_backbone_of_scenes_is_asked(family: str, patch: int, reason: str) -> None:
    backbone = BUILDERS[family]()
    backbone.model.config.vision_config.patch_size = patch
    with pytest.raises(ConfigError, match=f"{reason} Qwen3-VL of scenes"):
        accuracies_of(backbone, PretrainConfig(), num_scenes=1)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = plan_study(study_file(tmp_path), tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="cannot be written"):
        compare(plan, Recorder(tmp_path).flows)


# The command -------------------------------------------------------------------------------------------------


def slq_compare(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_a_dry_run_shows_the_trainings_and_writes_nothing(tmp_path: Path) -> None:
    path, out = study_file(tmp_path), tmp_path / "out"
    shown = yaml.safe_load(slq_compare(path, "--out", out, "--dry-run").stdout)
    assert shown["trainings"] == 5
    assert shown["runs"]["SLQ"]["tune"] == {"train.lr": RATES}
    assert shown["runs"]["LoRA r=8"]["recipe"]["adapter"]["method"] == "lora"
    assert shown == json.loads(slq_compare(path, "--out", out, "--dry-run", "--json").stdout)
    assert not out.exists()


def test_the_command_prints_the_table_or_the_whole_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = study_file(tmp_path), tmp_path / "out"
    monkeypatch.setattr("jobs.compare.real_flows", lambda: Recorder(out).flows)
    result = slq_compare(path, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "study.json").read_text())
    result = slq_compare(path, "--out", out)
    assert "SLQ: train.lr 0.003, chosen from 0.003, 0.01, 0.03" in result.stdout
    for text in ("LoRA r=8", "zero-shot", "50.1", "40.1-60.1", "identical", "changed", "13"):
        assert text in result.stdout


def test_a_wrong_study_is_one_line(tmp_path: Path) -> None:
    result = slq_compare(study_file(tmp_path, tune_step=1), "--out", tmp_path / "out")
    assert result.exit_code == 1
    expected = "error: ConfigError: study.yaml: tune_step is unknown; did you mean tune_steps?"
    assert result.stderr.strip() == expected


def test_a_training_whose_cost_would_be_another_is_not_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = study_file(tmp_path, retention_scenes=0, runs={"a": {}})
    compare(plan_study(path, out), Recorder(out).flows)
    checkpoint = out / "a" / "ray" / "checkpoint"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    compare(plan_study(path, out, ["eval.ks=[1,3]"]), Recorder(out).flows)
    assert checkpoint.exists()
    compare(plan_study(path, out, ["train.gradient_checkpointing=false"]), Recorder(out).flows)
    assert not checkpoint.exists()


def test_changed_data_runs_everything_again(tmp_path: Path) -> None:
    recipe = {"data": {"dir": str(tmp_path)}, "train": {"held_out": 4}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "queries.parquet").write_bytes(b"one")
    path = study_file(tmp_path, recipe="own.yaml", retention_scenes=0, runs={"a": {}})
    out = tmp_path / "out"
    compare(plan_study(path, out), replace(Recorder(out).flows, generate=lambda _: None))
    for content, calls in ((b"one", 0), (b"two", 3)):
        (tmp_path / "queries.parquet").write_bytes(content)
        again = Recorder(out)
        compare(plan_study(path, out), replace(again.flows, generate=lambda _: None))
        assert len(again.calls) == calls


def test_lengths_beyond_the_embedding_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    for key in ("eval.dimensions", "train.matryoshka"):
        path = study_file(tmp_path, runs={"a": {"set": {key: [48, 4096]}}})
        with pytest.raises(ConfigError, match=f"'a': {key} .*must be different lengths below 192"):
            plan_study(path, tmp_path / "out")


def test_what_changes_no_figure_runs_nothing_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = study_file(tmp_path)
    compare(plan_study(path, out), Recorder(out).flows)
    again = Recorder(out)
    compare(plan_study(path, out, ["serve.port=8080", "resources.address=x"]), again.flows)
    assert again.calls == FIRST[:1]
    compare(plan_study(path, out, ["resources.train_workers=1"]), again.flows)
    assert again.calls == [FIRST[0], *FIRST, *TRIALS, *SLQ, *LORA]


# The table ---------------------------------------------------------------------------------------------------


def fake_results() -> dict[str, dict[str, Any]]:
    tuned = {
        "key": "train.lr",
        "value": 2,
        "on_edge": False,
        "trials": [{"value": v} for v in (1, 2, 3)],
    }
    return {
        ZERO_SHOT: {
            "results": results_of(("untrained", "last_token"), 0.1),
            "retention": retained(0.6, identical=True),
        },
        "SLQ": {
            "results": results_of(("slq_fine", "slq:d64", "slq"), 0.8),
            "training": {"steps": 9, "seconds": 61.6, "peak_memory_bytes": 3 * 2**29},
            "trained_parameters": {"slq": 3841, "slq:d64": 1000},
            "retention": retained(0.6, identical=True),
            "tuned": tuned,
        },
        "full | all": {
            "results": results_of(("slq",), 0.7),
            "training": {"steps": 9, "seconds": 100.0, "peak_memory_bytes": 3 * 2**29},
            "trained_parameters": {"slq": 4_900_001},
            "retention": retained(0.01, identical=False),
            "tuned": None,
        },
    }


def test_every_system_of_a_run_has_a_row() -> None:
    rows = study_rows(fake_results())
    assert [row["name"] for row in rows] == [
        "zero-shot last token",
        "untrained latents",
        "SLQ",
        "SLQ: d64",
        "SLQ + fine stage",
        "full | all",
    ]
    found = columns(rows)
    assert found["trained"] == ["", "", "3,841", "1,000", "", "4,900,001"]
    assert found["explicit (n = 8)"][2] == "80.0 (70.0-90.0)"
    assert [name for name in found if "(n = 8)" in name] == [f"{name} (n = 8)" for name in SUBSETS]
    assert found["training s"] == ["", "", "", "", "", "100"]  # not where variants shared the run
    assert found["peak GiB"] == ["", "", "", "", "", "1.50"]
    assert found["caption kept"] == ["60.0", "60.0", "60.0", "", "", "1.0"]
    assert found["weights"] == ["identical", "identical", "identical", "", "", "changed"]
    assert notes(fake_results()) == ["SLQ: train.lr 2, chosen from 1, 2, 3"]


def test_the_terminal_table_cuts_no_figure_in_80_columns() -> None:
    results = fake_results()
    for result in results.values():
        for report in result["results"]["systems"].values():
            entry = report["text_to_image"]["explicit"]
            kinds = ("explicit", "knowledge")
            parts = ("", ", hard subset", ", unseen objects")
            report["text_to_image"] = {k + part: entry for k in kinds for part in parts}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(study_table({"rows": study_rows(results)}))
    text = console.export_text()
    assert text.count("70.0-90.0") == 3 * 6
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_the_markdown_table_has_as_many_cells_in_every_row(tmp_path: Path) -> None:
    plan = plan_study(study_file(tmp_path), tmp_path)
    text = study_markdown(study_summary(plan, fake_results()))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "full \\| all" in lines[-1]
    assert "- SLQ: train.lr 2, chosen from 1, 2, 3" in text


def test_the_picture_has_a_bar_per_row_and_a_panel_per_kind_of_query(tmp_path: Path) -> None:
    rows = study_rows(fake_results())
    figure = study_figure(rows)
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes] == [
        "explicit",
        "knowledge",
    ]
    for axes in figure.axes:
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(
            [100 * row["hits"]["explicit"]["value"] for row in rows]
        )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [row["name"] for row in rows]
    first = write_study_chart({"rows": rows}, tmp_path / "a.png").read_bytes()
    assert first == write_study_chart({"rows": rows}, tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000


def test_values_are_counted_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"a": np.zeros((3, 5), np.float32), "b": np.float32([1]), "c": np.zeros((), np.float32)},
        path,
    )
    assert count_values(path) == 17


def test_an_older_history_has_no_peak(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write_history(tmp_path / "train" / HISTORY, [{"step": 1, "loss": 1.0, "seconds/read": 2.0}])
    assert training_figures(tmp_path) == {"steps": 1, "seconds": 2.0, "peak_memory_bytes": None}


def test_results_are_read_back_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(plan_study(study_file(tmp_path), out), Recorder(out).flows)
    result = read_json(out / "slq" / "result.json")
    assert result["recipe"]["train"]["lr"] == 0.003
    assert result["tuned"]["value"] == 0.003
