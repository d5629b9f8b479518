"""What a training run measures, step by step: JSON lines for programs, TensorBoard for people.

`history.jsonl` holds one JSON object a line, `{"step": 1, "loss": 3.65, ...}`, its steps strictly rising. It only grows
while a run lasts; a resumed run first cuts what is beyond its checkpoint, so no step occurs twice. A process that dies
while it writes leaves a last line without a newline; readers leave it out and the next run cuts it.

Names with a slash are groups in TensorBoard. `jobs.report.training_plot` draws `loss`, `temperature`, `gradient_norm`,
all `<direction>/hit@<k>`, and as shares all `seconds/<part>`.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pipelines.progress import duration
from slq.errors import ArtifactError, StorageError, TrainingError

log = logging.getLogger(__name__)
HISTORY = "history.jsonl"
TENSORBOARD = "tensorboard"


class TrainingLog:
    """Writes metrics of steps; one process of a run opens it, which is rank 0.

    TensorBoard's own files cannot be cut: a resumed run marks them, and TensorBoard hides the steps that were undone.

    Args:
        folder: Gets `history.jsonl` and `tensorboard/`; made if it is not there.
        resume_at: The last step that the checkpoint holds; what was written of later steps is dropped. 0 starts anew.

    Raises:
        ArtifactError: The history is damaged before its last newline.
        StorageError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0) -> None:
        # imported here: one process of a run needs it, and it takes longer to load than the rest of this package
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / HISTORY
        self._last = resume_at
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _cut(self._path, resume_at)
            self._file = self._path.open("ab")
            # With purge_step, TensorBoard forgets events of that step and later in files written before.
            self._board: Any = SummaryWriter(str(folder / TENSORBOARD), purge_step=resume_at + 1)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step; a killed process loses nothing of it, a dead machine what came after the last `sync`.

        Args:
            step: Finished steps so far, from 1; above every step before. Steps may be left out.
            metrics: Values by name, evaluations of the step among them; `step` is no name. NaN and infinity are
                written as null, as JSON has neither, and read as NaN.

        Raises:
            StorageError: The disk is full or closed.
            TrainingError: The step does not come after the one before, or a metric is called `step`.
        """
        if step <= self._last:
            raise TrainingError(
                f"step {step} cannot follow step {self._last} in {self._path}; write each step once, in order"
            )
        if "step" in metrics:
            raise TrainingError("a metric is called 'step', which names the step itself; rename it")
        try:
            self._file.write(_line(step, metrics))
            self._file.flush()
            for name, value in metrics.items():
                self._board.add_scalar(name, float(value), step)
        except OSError as error:
            raise self._unwritable(error) from None
        self._last = step

    def sync(self) -> None:
        """Make everything written so far durable; call it before a checkpoint is reported.

        Raises:
            StorageError: The disk is full or closed.
        """
        try:
            os.fsync(self._file.fileno())
            self._board.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Write out what is waiting; a closed log takes no more steps.

        Raises:
            StorageError: The disk is full or closed.
        """
        try:
            self._file.close()
            self._board.close()
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._path.parent} cannot be written: {error}; free space and run the same command again"
        )


def write_history(path: Path, entries: Sequence[Mapping[str, float]]) -> None:
    """Write a whole history, as `read_history` gives it."""
    lines = [
        _line(int(entry["step"]), {k: v for k, v in entry.items() if k != "step"})
        for entry in entries
    ]
    path.write_bytes(b"".join(lines))


def _line(step: int, metrics: Mapping[str, float]) -> bytes:
    values = {name: float(value) for name, value in metrics.items()}
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **known}, allow_nan=False).encode() + b"\n"


def read_history(path: Path) -> list[dict[str, float]]:
    """Metrics of every step, in order, of a run that is finished or still going on; a torn last line is left out.

    Args:
        path: A `history.jsonl`.

    Returns:
        For each line its `step` and its metrics; a metric that was not finite is NaN. Lines may differ in names.

    Raises:
        ArtifactError: The file is missing, or damaged before its last newline.
    """
    try:
        entries, _ = _parse(path.read_bytes(), path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; run `slq train` first") from None
    return entries


def _parse(data: bytes, path: Path) -> tuple[list[dict[str, float]], list[int]]:
    """Entries of a history, and where each one's line ends in bytes; what follows the last newline is left out."""
    entries: list[dict[str, float]] = []
    ends: list[int] = []
    *lines, _torn = data.split(b"\n")
    last, end = 0.0, 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = _entry(line, after=last)
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path} is damaged at line {number}: {error}; cut the file before that line"
            ) from None
        last, end = entry["step"], end + len(line) + 1
        entries.append(entry)
        ends.append(end)
    return entries, ends


def _entry(line: bytes, *, after: float) -> dict[str, float]:
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        raise TypeError("it is no object with a step")
    if entry["step"] <= after:
        raise ValueError(f"step {entry['step']} follows step {after:.0f}")
    values = {name: math.nan if value is None else value for name, value in entry.items()}
    odd = [name for name, value in values.items() if not isinstance(value, int | float)]
    if odd:
        raise ValueError(f"{odd[0]!r} is no number")
    return values


def _cut(path: Path, last_step: int) -> None:
    """Cut a history after `last_step`."""
    data = path.read_bytes() if path.exists() else b""
    entries, ends = _parse(data, path)
    kept = sum(entry["step"] <= last_step for entry in entries)
    end = ends[kept - 1] if kept else 0
    if end < len(data):
        os.truncate(path, end)
        log.info("%s: cut %d steps after step %d", path, len(entries) - kept, last_step)
    if last_step and not kept:
        log.warning(
            "%s has no step up to %d, where the run goes on; its curves begin there",
            path,
            last_step,
        )


def progress_line(metrics: dict[str, float], num_steps: int, eta_s: float) -> str:
    """What a person reads every ten steps."""
    left_out = f"  steps left out {metrics['skipped']:.0f}" if metrics["skipped"] else ""
    unusable = f"  unusable pairs {metrics['unusable']:.0f}" if metrics["unusable"] else ""
    hit = metrics.get("text_to_image/hit@1")
    measured = "" if hit is None else f"  held-out hit@1 {hit:.1%}"
    return (
        f"train step {metrics['step']:.0f}/{num_steps}  loss {metrics['loss']:.3f}  "
        f"temperature {metrics['temperature']:.3f}{measured}  {metrics['pairs_per_s']:.0f} pairs/s  "
        f"prefixes cached {metrics['cached_share']:.0%}{left_out}{unusable}  ETA {duration(eta_s)}"
    )
