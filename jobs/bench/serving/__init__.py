"""The online service under load: what it adds to its work, latency over rates, overload, faults and autoscaling.

The service of a recipe is started as `slq serve` starts it, on a Ray of its own; nothing else should run meanwhile.
Results stand in --out, as JSON and pictures.
"""

import argparse
import contextlib
import importlib
import random
import shlex
import sys
from pathlib import Path
from typing import Any

from jobs.bench.serving.processes import CONTROLLER, KINDS, PROXY
from jobs.bench.serving.stand import MODES, RECIPE, Settings, machine
from jobs.bench.serving.tables import tables_of
from jobs.console import err
from pipelines.progress import show
from slq.files import write_json

PARTS = ("overhead", "latency", "overload", "autoscale", "chaos")
_EXAMPLE = "Example: slq bench serve --part overload --mode coarse fine --seconds 60 --seed 1"


def run(arguments: list[str]) -> dict[str, Any]:
    """Measure what `--part` names; writes OUT/PART.json and pictures.

    Args:
        arguments: Of the command line, after the benchmark's name.

    Raises:
        SlqError: The recipe is wrong, or its service does not start.
    """
    options = _options(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    settings = _settings(options, seed)
    parts = list(dict.fromkeys(options.part or PARTS))
    settings.out.mkdir(parents=True, exist_ok=True)
    show(f"seed {seed}, results in {settings.out}")
    head: dict[str, Any] = {
        "bench": "serve",
        "command": shlex.join(["slq", "bench", "serve", *arguments]),
        "seed": seed,
        "hardware": machine(),
    }
    found: dict[str, Any] = {}
    for part in parts:
        show(f"{part}:")
        # Ray says some of what goes wrong on standard output, where our JSON goes
        with contextlib.redirect_stdout(sys.stderr):
            measured = importlib.import_module(f"jobs.bench.serving.{part}").measure(settings)
        found[part] = measured
        write_json(settings.out / f"{part}.json", {**head, part: measured})
        for table in tables_of(part, measured):
            err.print(table)
    return {**head, **found}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="slq bench serve", description=__doc__, epilog=_EXAMPLE)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, help="all by default")
    add("--recipe", type=Path, default=RECIPE, help="default: serving.yaml, made in --out")
    add("--set", dest="overrides", action="append", metavar="KEY=VALUE", help="as elsewhere")
    add("--out", type=Path, default=Path("runs/bench-serve"), help="folder, used again")
    add("--seed", type=int, help="of arrivals and victims; random and printed if absent")
    add(
        "--seconds",
        type=float,
        default=0.0,
        help="of a run (of calm between faults); each part has its own",
    )
    add("--repeats", type=int, default=0, help="rounds of overhead (5) and latency (1)")
    add("--mode", nargs="+", choices=tuple(MODES), default=["coarse"], help="of searches")
    add("--deadline-ms", type=float, default=1000.0, help="within which an answer is in time")
    add(
        "--rates",
        type=float,
        nargs="+",
        default=[],
        help="per second: of latency; one of chaos; low, high and level of autoscale; shares of the peak by default",
    )
    add("--factors", type=float, nargs="+", default=[2.0, 5.0], help="of overload, of the peak")
    add("--slow-clients", type=int, default=0, help="of overload: connections that hardly send")
    add("--large-every-s", type=float, default=0.0, help="of overload: between bodies of 100 MiB")
    kinds = (*KINDS, CONTROLLER, PROXY)
    add("--kinds", nargs="+", choices=kinds, default=[], help="of chaos: all but the proxy")
    add("--signals", nargs="+", choices=("KILL", "STOP", "TERM"), default=["KILL", "STOP"])
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace, seed: int) -> Settings:
    return Settings(
        recipe=options.recipe,
        overrides=tuple(options.overrides or ()),
        out=options.out.resolve(),
        seed=seed,
        seconds=options.seconds,
        repeats=options.repeats,
        deadline_ms=options.deadline_ms,
        modes=tuple(options.mode),
        rates=tuple(options.rates),
        factors=tuple(options.factors),
        slow_clients=options.slow_clients,
        large_every_s=options.large_every_s,
        kinds=tuple(options.kinds),
        signals=tuple(options.signals),
    )
