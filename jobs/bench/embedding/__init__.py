"""The embedding flow against the model alone, one worker against two, few rows against many, a resumed run."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from jobs.bench.embedding.resume import measure_resume
from jobs.bench.embedding.scale import measure_scale
from jobs.bench.embedding.throughput import KINDS, measure_scaling, measure_throughput
from jobs.bench.measure import hardware

PARTS = ("throughput", "scaling", "scale", "resume")


def run(arguments: list[str]) -> dict[str, Any]:
    """Measure what `--part` names; everything is written below a temporary folder.

    Args:
        arguments: Of the command line, after the benchmark's name.
    """
    parser = argparse.ArgumentParser(prog="slq bench embed", description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all by default")
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="of throughput and scaling; both by default"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds, both sides in each")
    parser.add_argument("--seconds", type=float, default=60.0, help="of work in a run")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of scale"
    )
    options = parser.parse_args(arguments)
    kinds = options.kind or KINDS
    found: dict[str, Any] = {
        "bench": "embed",
        "hardware": hardware(torch.device("cpu")),
        "repeats": options.repeats,
    }
    with tempfile.TemporaryDirectory(prefix="slq-bench-") as name:
        folder = Path(name)
        for part in options.part or PARTS:
            if part == "throughput":
                found[part] = measure_throughput(
                    folder, kinds, seconds=options.seconds, repeats=options.repeats
                )
            elif part == "scaling":
                found[part] = measure_scaling(
                    folder, kinds, seconds=options.seconds, repeats=options.repeats
                )
            elif part == "scale":
                found[part] = measure_scale(folder, options.rows, repeats=options.repeats)
            else:
                found[part] = measure_resume(folder, max(options.rows[:2]))
    return found
