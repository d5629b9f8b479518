"""Short trial trainings, and which value they choose."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.compare.digest import recipe_digest
from jobs.compare.study import Run, Trial
from pipelines.progress import show
from pipelines.recipe import Recipe
from pipelines.training_log import HISTORY, read_history
from slq.errors import TrainingError
from slq.files import read_json, write_json

METRIC = "text_to_image/hit@1"
_LAST = 5
_RESULT = "trial.json"


def run_trials(run: Run, train: Callable[[Recipe], Path], heading: str) -> list[dict[str, Any]]:
    """Train with each value, unless that is done; gives one entry per value, in the study's order.

    A trial that cannot be trained, as one whose loss is not finite, has an `error` and is tried again next time.
    What a finished trial leaves is its history; its adapter and checkpoints are removed.
    """
    entries = []
    for number, trial in enumerate(run.trials, start=1):
        show(f"{heading}: trial {number}/{len(run.trials)}, {run.key} = {trial.value}")
        entries.append(_entry(trial, train))
    return entries


def _entry(trial: Trial, train: Callable[[Recipe], Path]) -> dict[str, Any]:
    folder, digest = trial.recipe.storage.dir, recipe_digest(trial.recipe)
    path = folder / _RESULT
    if path.is_file() and read_json(path)["digest"] == digest:
        entry: dict[str, Any] = read_json(path)["entry"]
        return entry
    try:
        train(trial.recipe)
    except TrainingError as error:
        show(f"trial failed: {error}")
        return {"value": trial.value, METRIC: None, "loss": None, "error": str(error)}
    entry = {"value": trial.value, **judged(read_history(folder / "train" / HISTORY))}
    write_json(path, {"digest": digest, "entry": entry})
    for left in (trial.recipe.storage.adapter, folder / "ray"):
        shutil.rmtree(left, ignore_errors=True)
    return entry


def judged(history: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Held-out hit@1 of the last step that has it, and the mean training loss of the last five steps.

    Values that are not finite, or that no step has, are None.
    """
    hits = [entry[METRIC] for entry in history if METRIC in entry]
    losses = [entry["loss"] for entry in history[-_LAST:]]
    found = {METRIC: hits[-1] if hits else math.nan}
    found["loss"] = sum(losses) / len(losses) if losses else math.nan
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def choose(entries: Sequence[dict[str, Any]]) -> int:
    """The trial with the highest hit@1; among equals the one with the lowest loss, then the first.

    Raises:
        TrainingError: No trial was measured.
    """
    measured = [n for n, entry in enumerate(entries) if entry[METRIC] is not None]
    if not measured:
        reasons = "; ".join(f"{entry['value']}: {entry.get('error')}" for entry in entries)
        raise TrainingError(f"no trial can be judged ({reasons}); choose other values")

    def rank(number: int) -> tuple[float, float]:
        loss = entries[number]["loss"]
        return -entries[number][METRIC], math.inf if loss is None else loss

    return min(measured, key=rank)


def on_edge(values: Sequence[Any], chosen: int) -> bool:
    """Whether the chosen value is the smallest or largest number of its grid; other kinds have no edge."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return False
    return values[chosen] in (min(values), max(values))
