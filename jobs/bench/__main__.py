"""`python -m jobs.bench NAME`: a benchmark without the `slq` command's own dependencies."""

import importlib
import json
import sys
from typing import Any

from slq.errors import ConfigError, SlqError

BENCHES = {
    "train": "jobs.bench.train",
    "embed": "jobs.bench.embedding",
    "chaos": "jobs.bench.chaos",
    "index": "jobs.bench.index",
    "rerank": "jobs.bench.rerank",
    "serve": "jobs.bench.serving",
    "injection": "jobs.bench.injection",
    "ablations": "jobs.bench.ablations",
}
"""Modules by name, imported when they are asked for: `train` runs with torch and transformers alone."""


def run(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run one benchmark.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in BENCHES:
        raise ConfigError(f"benchmark {name!r} is unknown; choose one of {', '.join(BENCHES)}")
    result: dict[str, Any] = importlib.import_module(BENCHES[name]).run(arguments)
    return result


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        sys.exit(f"usage: python -m jobs.bench {{{','.join(BENCHES)}}} [options]")
    try:
        print(json.dumps(run(sys.argv[1], sys.argv[2:]), indent=2))
    except SlqError as error:
        sys.exit(f"error: {error}")
