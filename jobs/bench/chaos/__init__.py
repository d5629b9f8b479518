"""Embedding under faults: processes die at random moments and at named points, and no row may be lost or doubled.

Everything runs below a temporary folder with a Ray of its own; only processes of these runs are killed.
"""

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jobs.bench.chaos.invariants import BrokenInvariantError
from jobs.bench.chaos.scenarios import die_at, kill_drivers, kill_workers, two_drivers
from jobs.bench.chaos.stand import SHARD_ROWS, Stand, new_stand
from jobs.bench.measure import hardware
from pipelines.failpoints import FAILPOINTS
from pipelines.progress import show
from slq.errors import ConfigError


def run(arguments: list[str]) -> dict[str, Any]:
    """Do all of it; the folder is kept where something does not hold.

    Args:
        arguments: Of the command line, after the benchmark's name.

    Raises:
        BrokenInvariantError: Something does not hold; seed and folder are named.
        ConfigError: A failpoint is unknown.
    """
    options = _parser().parse_args(arguments)
    points = _points(options.points)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    work = Path(tempfile.mkdtemp(prefix="slq-chaos-"))
    show(f"seed {seed}, files in {work}")
    began = time.monotonic()
    try:
        found = _scenarios(new_stand(work, options.rows, seed), options, points, seed)
    except BrokenInvariantError as error:
        raise BrokenInvariantError(f"with --seed {seed} (files in {work}): {error}") from None
    shutil.rmtree(work)
    return {
        "bench": "chaos",
        "seed": seed,
        "hardware": hardware(torch.device("cpu")),
        "seconds": round(time.monotonic() - began, 1),
        **found,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slq bench chaos", description=__doc__)
    parser.add_argument(
        "--seed", type=int, help="of corpus and moments; random and printed if absent"
    )
    parser.add_argument("--kills", type=int, default=20, help="of drivers at random moments")
    parser.add_argument("--worker-kills", type=int, default=5, help="of workers during one run")
    parser.add_argument(
        "--points", help=f"failpoints, joined by commas; all by default: {', '.join(FAILPOINTS)}"
    )
    parser.add_argument("--rows", type=int, default=400, help="of the corpus")
    return parser


def _points(text: str | None) -> list[str]:
    points = list(FAILPOINTS) if text is None else text.split(",")
    unknown = sorted(set(points) - set(FAILPOINTS))
    if unknown:
        raise ConfigError(f"failpoint {unknown[0]!r} is unknown; there are {', '.join(FAILPOINTS)}")
    return points


def _scenarios(
    stand: Stand, options: argparse.Namespace, points: list[str], seed: int
) -> dict[str, Any]:
    """Each scenario draws from a generator of its own, so that one can be repeated without the others."""
    found: dict[str, Any] = {
        "rows": len(stand.ids),
        "shards": stand.num_shards,
        "shard_rows": SHARD_ROWS,
        "clean_s": round(stand.seconds, 1),
        "kills": kill_drivers(stand, random.Random(f"{seed} kills"), options.kills),
        "points": [],
    }
    for point in points:
        found["points"].append(die_at(stand, random.Random(f"{seed} {point}"), point))
        show(f"failpoint {len(found['points'])}/{len(points)}: {found['points'][-1]}")
    found["workers"] = kill_workers(stand, random.Random(f"{seed} workers"), options.worker_kills)
    show(f"workers: {found['workers']}")
    found["two_drivers"] = two_drivers(stand)
    return found
