"""Runs a study: trials, trainings, measurements; what is finished is not done again."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

from jobs.compare.digest import recipe_digest, training_digest
from jobs.compare.study import ZERO_SHOT, Plan, Run
from jobs.compare.tuning import choose, on_edge, run_trials
from pipelines.progress import show
from pipelines.ranking import RANKS_FILE
from pipelines.recipe import DataConfig, Recipe, ResourcesConfig
from pipelines.training_log import HISTORY, read_history
from slq.artifacts import ADAPTER_WEIGHTS, load_adapter_config
from slq.errors import ConfigError
from slq.files import file_sha256, read_json, write_json

RESULT, TRAINING = "result.json", "training.json"
_SECONDS = "seconds/"
_VARIANT = "slq:"


@dataclass(frozen=True, kw_only=True)
class Flows:
    """What a study runs.

    Attributes:
        generate: Writes missing data files.
        connect: Holds Ray for one run.
        train: Gives the adapter folder.
        mine: Writes the hard negatives of a recipe's training pairs.
        evaluate: Gives the results.
        retention: The model's own skills with an adapter, or without (None).
    """

    generate: Callable[[DataConfig], None]
    connect: Callable[[ResourcesConfig], AbstractContextManager[None]]
    train: Callable[[Recipe], Path]
    mine: Callable[[Recipe], dict[str, Any]]
    evaluate: Callable[[Recipe], dict[str, Any]]
    retention: Callable[..., dict[str, Any]]


def real_flows() -> Flows:
    """Those of `pipelines`."""
    from jobs.console import generate_files
    from pipelines.evaluate import evaluate
    from pipelines.mine import mine
    from pipelines.retention import retention
    from pipelines.runtime import connect
    from pipelines.train import train

    return Flows(
        generate=generate_files,
        connect=connect,
        train=train,
        mine=mine,
        evaluate=evaluate,
        retention=retention,
    )


def run_study(plan: Plan, flows: Flows) -> dict[str, dict[str, Any]]:
    """Run what is not finished.

    A run is finished when its `result.json` has the digest of its recipe, its grid and the study's settings. With
    another digest it is run again; the trainer keeps what is the same.

    Returns:
        The result of the zero-shot systems under `zero-shot`, then of every run under its name.
    """
    flows.generate(plan.zero_shot.data)
    results = {ZERO_SHOT: _zero_shot(plan, flows)}
    for number, run in enumerate(plan.runs, start=1):
        heading = f"compare run {number}/{len(plan.runs)} {run.name}"
        digest = recipe_digest(
            run.recipe,
            grid=[trial.value for trial in run.trials],
            trials=[recipe_digest(trial.recipe) for trial in run.trials],
            retention_scenes=scenes_asked(plan, run.recipe),
            miner=run.miner and results[run.miner.name]["digest"],
            **({"source": results[run.source.name]["digest"]} if run.source else {}),
        )
        found = _finished(run.folder, digest)
        if found is None:
            miner = None  # as it was trained in the end: a tuned key has its chosen value there
            if run.miner is not None:
                miner = Recipe.model_validate(results[run.miner.name]["recipe"])
            made = _measure(run, flows, heading) if run.source else None
            made = made or _run(plan, run, miner, flows, heading)
            found = _saved(run.folder, {"digest": digest, **made})
        else:
            show(f"{heading}: finished before")
        results[run.name] = found
    return results


def _finished(folder: Path, digest: str) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = read_json(path)
    if result["digest"] == digest:
        return result
    show(f"{path} was made with other settings: it is made again")
    return None


def _saved(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The result as it will be read next time."""
    write_json(folder / RESULT, found)
    result: dict[str, Any] = read_json(folder / RESULT)
    return result


def _zero_shot(plan: Plan, flows: Flows) -> dict[str, Any]:
    """The untrained systems; first of all, as it also shows whether the model's skills can be asked."""
    recipe = plan.zero_shot
    scenes = scenes_asked(plan, recipe)
    folder = recipe.storage.dir
    digest = recipe_digest(recipe, retention_scenes=scenes)
    found = _finished(folder, digest)
    if found is not None:
        return found
    show("compare zero-shot: the backbone without training")
    with flows.connect(recipe.resources):
        try:
            kept = _kept(recipe, None, scenes, flows)
        except ConfigError as error:
            if not scenes:
                raise
            raise ConfigError(f"{error}; set retention_scenes: 0 to ask nothing") from None
        results = flows.evaluate(recipe)
    return _saved(
        folder, {"digest": digest, "results": results, "retention": kept, **_described(recipe)}
    )


def _run(plan: Plan, run: Run, miner: Recipe | None, flows: Flows, heading: str) -> dict[str, Any]:
    """One variant, in a Ray of its own where there is none: peaks of memory are of its processes alone."""
    with flows.connect(run.recipe.resources):
        recipe, tuned = run.recipe, None
        if miner is not None:
            _mine(run, miner, flows, heading)
        if run.trials:
            trials = run_trials(run, flows.train, heading)
            chosen = choose(trials)
            edge = on_edge([trial.value for trial in run.trials], chosen)
            recipe = run.trials[chosen].final
            value = run.trials[chosen].value
            tuned = {"key": run.key, "value": value, "on_edge": edge, "trials": trials}
        show(f"{heading}: training" + (f" with {run.key} = {tuned['value']}" if tuned else ""))
        adapter = _trained(recipe, flows)
        show(f"{heading}: measuring")
        results = flows.evaluate(recipe)
        kept = _kept(recipe, adapter, scenes_asked(plan, recipe), flows)
    return {
        "tuned": tuned,
        "training": training_figures(run.folder),
        "trained_parameters": trained_parameters(run.folder, list(results["systems"])),
        "results": results,
        "retention": kept,
        **_described(recipe),
    }


def _measure(run: Run, flows: Flows, heading: str) -> dict[str, Any]:
    """One variant that measures the adapter of another."""
    assert run.source is not None
    link = run.recipe.storage.adapter
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # of a training that this run was before
    link.unlink(missing_ok=True)
    link.symlink_to(run.source.recipe.storage.adapter)
    with flows.connect(run.recipe.resources):
        show(f"{heading}: measuring the adapter of {run.source.name}")
        results = flows.evaluate(run.recipe)
    return {"adapter_of": run.source.name, "results": results, **_described(run.recipe)}


def _ranks_of(recipe: Recipe) -> str | None:
    """Digest of the ranks that an evaluation has written, so that no later one's are taken for them."""
    path = recipe.storage.evaluation / RANKS_FILE
    return file_sha256(path) if path.is_file() else None


def scenes_asked(plan: Plan, recipe: Recipe) -> int:
    """Held-out scenes that the study asks about, or else its recipe."""
    return plan.study.retention_scenes or recipe.retention.scenes


def _kept(recipe: Recipe, adapter: Path | None, scenes: int, flows: Flows) -> dict[str, Any] | None:
    """The model's own skills, if the study or its recipe names any."""
    if not scenes and not recipe.retention.sets:
        return None
    return flows.retention(recipe, adapter, num_scenes=scenes)


def _trained(recipe: Recipe, flows: Flows) -> Path:
    """The final training; one of before is kept only if its time and memory would be the same too."""
    folder, digest = recipe.storage.dir, training_digest(recipe)
    note = folder / TRAINING
    if recipe.storage.adapter.is_symlink():
        recipe.storage.adapter.unlink()  # to the adapter of another run, which this one measured before
    if note.is_file() and read_json(note)["digest"] != digest:
        for part in ("train", "ray"):
            shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, {"digest": digest})
    return flows.train(recipe)


def _mine(run: Run, miner: Recipe, flows: Flows, heading: str) -> None:
    """Mine with another run's adapter, unless that was done before."""
    changes = {
        "data": miner.data.model_copy(update={"negatives": run.recipe.data.negatives}),
        **{name: getattr(run.recipe, name) for name in ("mine", "index", "rerank")},
    }
    recipe = miner.model_copy(update=changes)
    path = recipe.data.path("negatives")
    fingerprint = load_adapter_config(recipe.storage.adapter).fingerprint
    if path.is_file():
        metadata = pq.read_schema(path).metadata or {}
        if metadata.get(b"fingerprint") == fingerprint.encode():
            return
    show(f"{heading}: mining with {miner.storage.dir.name}")
    flows.mine(recipe)


def _described(recipe: Recipe) -> dict[str, Any]:
    return {"recipe": recipe.model_dump(mode="json"), "ranks_sha256": _ranks_of(recipe)}


def training_figures(folder: Path) -> dict[str, float | None]:
    """Steps, seconds and the peak memory of rank 0, from the history of a run.

    Seconds are the sum of all `seconds/*` of all steps: reading, frozen passes and updates; neither the start of the
    workers, nor measurements while training, nor checkpoints.
    """
    history = read_history(folder / "train" / HISTORY)
    peaks = [entry["peak_memory_bytes"] for entry in history if "peak_memory_bytes" in entry]
    seconds = (v for entry in history for name, v in entry.items() if name.startswith(_SECONDS))
    return {
        "steps": history[-1]["step"] if history else 0,
        "seconds": sum(seconds),
        "peak_memory_bytes": max(peaks) if peaks else None,
    }


def trained_parameters(folder: Path, systems: list[str]) -> dict[str, int]:
    """Values in the adapter of each trained system; one that shares the run's adapter has its count."""
    counts = {}
    for system in systems:
        adapter = folder / "adapter"
        if system.startswith(_VARIANT):
            adapter = folder / "variants" / system.removeprefix(_VARIANT)
        path = adapter / ADAPTER_WEIGHTS
        if path.is_file():
            counts[system] = count_values(path)
    return counts


def count_values(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    total = 0
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            size = 1
            for length in file.get_slice(name).get_shape():
                size *= length
            total += size
    return total
