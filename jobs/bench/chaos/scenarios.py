"""What is done to runs: drivers killed at random moments and at named points, workers killed, two drivers at once."""

import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.chaos.invariants import BrokenInvariantError, Snapshot, records, require_sound
from jobs.bench.chaos.notes import ENCODED, NOTES, PREPARED, counted
from jobs.bench.chaos.runs import Run
from jobs.bench.chaos.stand import LIMIT_S, PIECE_ROWS, SHARD_ROWS, Stand
from pipelines.commits import attempt_name, shard_name
from pipelines.embedding.encode import encoding_threads
from pipelines.failpoints import IN_WORKERS, MARK, VARIABLE
from pipelines.progress import show
from pipelines.recipe import ResourcesConfig

_KILLS_PER_DATA_SET = (
    5  # each leaves half of what it met, so that later ones would only meet the last shard
)
_SHARE_STARTING = 0.25
_OFTEN = {"piece": 3, "commit": None, "publish": None}
"""How often a process gets at least to points of this kind; None: once per shard. Once where nothing stands here."""
_STEPS = {
    "prepare": "MapBatches(prepare)",
    "encode": "MapWorker(MapBatches(EncodePieces))",
    "write": "MapWorker(MapBatches(WritePieces))",
}
"""Names of processes by the step that they are at."""
_MOST_AGAIN = {
    PREPARED: {"prepare": SHARD_ROWS},
    ENCODED: {"encode": 2 * encoding_threads(ResourcesConfig()) * PIECE_ROWS},
}
"""Rows that one kill at a step may cost: the shard that was read, the pieces that the encoder had been given."""
_LOOK_S = 0.01  # writing a piece takes some milliseconds
_PATIENCE_S = 2.0  # reading may be over long before encoding is
_NOTHING = Snapshot(frozenset(), {})


def kill_drivers(stand: Stand, rng: random.Random, kills: int) -> dict[str, Any]:
    """Kill drivers at random moments, start them again, and finish: alone, or with everything on their machine.

    Args:
        stand: The test stand.
        rng: Gives moments and kinds.
        kills: How many.

    Raises:
        BrokenInvariantError: Something does not hold.
    """
    found: list[dict[str, Any]] = []
    finished: list[dict[str, Any]] = []
    while len(found) < kills:
        folder = stand.work / f"kills-{len(finished)}"
        for _ in range(min(_KILLS_PER_DATA_SET, kills - len(found))):
            outcome = _kill_driver(stand, rng, folder)
            if outcome is None:
                break
            found.append(outcome)
            show(f"kill {len(found)}/{kills}: {outcome}")
        finished.append(stand.finish(folder))
        show(f"finished: {finished[-1]}")
    return {"killed": found, "finished": finished}


def _kill_driver(stand: Stand, rng: random.Random, folder: Path) -> dict[str, Any] | None:
    """Start a run and kill it, mostly at work; None if nothing was left for it, or it ended before."""
    before, stale = Snapshot.of(folder), _pieces(folder)
    left = 1 - len(before.shards) / stand.num_shards
    starting, whole = rng.random() < _SHARE_STARTING, rng.random() < 0.5
    working_s = left * (stand.seconds - stand.first_commit_s)
    pause_s = rng.uniform(0, stand.first_commit_s if starting else working_s)
    if not left:
        return None
    with stand.start(folder) as run:
        if (
            not starting
        ):  # an event, as how long a start takes depends on what else the machine does
            run.wait_for(lambda: _pieces(folder) - stale, LIMIT_S)
        code = run.wait(pause_s)
        if code is not None:
            run.require_success(code)
            return None
        seconds = run.seconds
        run.kill(whole=whole)
        run.require_gone()  # workers of a driver that died alone leave by themselves
    touched = before.touched(folder)
    if touched:
        raise BrokenInvariantError(f"{folder}: {touched} were committed, and were touched")
    return {
        "killed": "machine" if whole else "driver",
        "while": "starting" if starting else "working",
        "after_s": round(seconds, 1),
        "shards_before": len(before.shards),
        "shards_after": len(Snapshot.of(folder).shards),
    }


def _pieces(folder: Path) -> set[Path]:
    return set(folder.glob("pieces/*/*.arrow"))


def die_at(stand: Stand, rng: random.Random, point: str) -> dict[str, Any]:
    """Let a process die at a failpoint, once; a dead driver is started again, a dead worker is Ray's to replace.

    Raises:
        BrokenInvariantError: Something does not hold.
    """
    often = _OFTEN.get(point.partition("_")[0], 1)
    nth = rng.randint(1, often or stand.num_shards)
    folder, mark = stand.work / f"at-{point}", stand.work / f"at-{point}.died"
    environment = {VARIABLE: f"{point}:{nth}", MARK: str(mark)}
    with stand.start(folder, environment=environment) as run:
        if point == "sweep":
            _leave_a_loser(folder, run)
        if not run.wait_for(mark.exists, LIMIT_S):
            raise BrokenInvariantError(f"no process got to {point} for time number {nth}")
        met = {"point": point, "nth": nth, "shards_before": sum(1 for _ in records(folder))}
        code = run.wait(LIMIT_S)
        if point in IN_WORKERS:
            run.require_success(code)
        elif code != -signal.SIGKILL:
            raise BrokenInvariantError(f"the driver was to die at {point}, but ended with {code}")
        seconds = run.seconds
        run.require_gone()
    if point in IN_WORKERS:
        embedded = stand.require_finished(folder, _NOTHING)
        return {**met, "embedded": embedded, "seconds": round(seconds, 1)}
    return {**met, **stand.finish(folder)}


def _leave_a_loser(folder: Path, run: Run) -> None:
    """What a worker leaves that was thought dead and finished late: only of such files is anything swept."""
    run.wait_for(lambda: any(records(folder)), LIMIT_S)
    for _, record in list(records(folder))[:1]:
        name = attempt_name(shard_name(record["shard_id"]), "late")
        (folder / name).write_bytes(b"of an attempt that lost")


def kill_workers(stand: Stand, rng: random.Random, kills: int) -> dict[str, Any]:
    """Kill workers at all steps during one run, which must end by itself and repeat only what was in flight.

    Raises:
        BrokenInvariantError: Something does not hold.
    """
    folder, notes = stand.work / "workers", stand.work / "workers.notes"
    command = [sys.executable, "-m", "jobs.bench.chaos.witness"]
    with stand.start(folder, command=command, environment={NOTES: str(notes)}) as run:
        run.wait_for(notes.exists, LIMIT_S)
        killed = _kill_at_steps(stand, rng, run, kills)
        run.require_success(run.wait(LIMIT_S))
        run.require_gone()
    good = stand.require_finished(folder, _NOTHING)
    again = {what: count - good for what, count in counted(notes).items()}
    for what, costs in _MOST_AGAIN.items():
        most = sum(cost * killed[step] for step, cost in costs.items())
        if not 0 <= again[what] <= most:
            raise BrokenInvariantError(
                f"{folder}: {again[what]} items were {what} again, but {dict(killed)} kills explain {most} at most"
            )
    return {"killed": dict(killed), "embedded": good, "again": again}


def _kill_at_steps(stand: Stand, rng: random.Random, run: Run, kills: int) -> Counter[str]:
    """How many were killed at each step; fewer than asked for if the run ends before."""
    killed: Counter[str] = Counter()
    pause_s = (stand.seconds - stand.first_commit_s) / (kills + 1)
    for number in range(kills):
        time.sleep(rng.uniform(0, pause_s))
        wanted, until = list(_STEPS)[number % len(_STEPS)], time.monotonic() + _PATIENCE_S
        while run.wait(0) is None and killed.total() == number:
            steps = [wanted] if time.monotonic() < until else _STEPS
            found = [(step, one) for step in steps for one in run.workers(_STEPS[step])]
            for step, victim in found[:1]:
                with suppress(psutil.Error):  # it may have gone by itself
                    victim.kill()
                    killed[step] += 1
            time.sleep(_LOOK_S)
    return killed


def two_drivers(stand: Stand) -> dict[str, Any]:
    """Start the same command twice at once; both must end well, with one data set.

    Raises:
        BrokenInvariantError: Something does not hold.
    """
    folder = stand.work / "two"
    with stand.start(folder) as first, stand.start(folder) as second:
        for run in (first, second):
            run.require_success(run.wait(LIMIT_S))
            run.require_gone()
        seconds = second.seconds
    require_sound(folder, stand.clean, stand.ids)
    return {"seconds": round(seconds, 1)}
