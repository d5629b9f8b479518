"""Builds: two workers against one, memory against the stated bound, and the time to load what was built."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.bench.embedding.costs import Costs
from jobs.bench.index.data import BATCH_ROWS, ShiftedSet
from pipelines.index import each_in_tasks
from pipelines.recipe import ResourcesConfig
from pipelines.runtime import connect
from slq.index import Content, IndexConfig, VectorIndex, write_version

_PART_BATCHES = 2
_ASSIGN = "put vectors into lists"
_LOADS = 5


@dataclass(frozen=True)
class Part:
    """Some batches of the set, as a source.

    Attributes:
        data: The set.
        first: Its first batch.
    """

    data: ShiftedSet
    first: int

    @property
    def num_rows(self) -> int:
        """Of its batches."""
        return min(_PART_BATCHES * BATCH_ROWS, self.data.num_rows - self.first * BATCH_ROWS)

    def tables(self) -> Iterator[pa.Table]:
        """Ids and vectors."""
        return self.data.tables(self.first, _PART_BATCHES)


def content_of(data: ShiftedSet) -> Content:
    """The whole set, in parts."""
    batches = -(-data.num_rows // BATCH_ROWS)
    parts = [Part(data, first) for first in range(0, batches, _PART_BATCHES)]
    return Content(parts, data.dimension, "bench")


class Timed:
    """Does a build's steps in Ray tasks, and keeps the seconds of each.

    Args:
        workers: Tasks at once.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self.seconds: dict[str, float] = {}

    def __call__(
        self, what: str, function: Callable[[Any], Any], arguments: Sequence[Any]
    ) -> list[Any]:
        """As `slq.index.building.Each`."""
        began = time.perf_counter()
        found = each_in_tasks(self._workers, what, function, arguments)
        self.seconds[what] = time.perf_counter() - began
        return found


def measure_scaling(folder: Path, data: ShiftedSet, num_lists: int, repeats: int) -> dict[str, Any]:
    """`two_to_one`: vectors put into lists and coded per second by two workers over one, median over rounds."""
    config = IndexConfig.model_validate(
        {"kind": "ivf", "num_lists": num_lists, "codes": "rabitq", "rotation": "random"}
    )
    ratios, seconds = [], []
    with connect(ResourcesConfig()):
        # The first tasks of a session wait for their workers to start.
        each_in_tasks(2, "start workers", partial(time.sleep), [1.0, 1.0])
        for number in range(repeats):
            found = []
            for workers in (1, 2):
                timed = Timed(workers)
                home = folder / f"scaling-{number}-{workers}"
                write_version(home, content_of(data), config, each=timed)
                found.append(timed.seconds[_ASSIGN])
            ratios.append(found[0] / found[1])
            seconds.append(found)
    return {
        "two_to_one": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "seconds": [[round(value, 2) for value in found] for found in seconds],
    }


def measure_memory(
    folder: Path, sizes: Sequence[int], dimension: int, num_lists: int
) -> dict[str, Any]:
    """Peak MiB of all processes of a build, and milliseconds to load what was built, for each number of rows.

    Codes are int8, which stay on disk when they are loaded.
    """
    config = IndexConfig.model_validate(
        {"kind": "ivf", "num_lists": num_lists, "codes": "int8", "partition_bytes": 64 * 2**20}
    )
    found = {}
    for size in sizes:
        data, home = ShiftedSet(size, dimension), folder / f"memory-{size}"
        with Costs() as costs, connect(ResourcesConfig()):
            write_version(home, content_of(data), config, each=partial(each_in_tasks, 2))
        loads = []
        for _ in range(_LOADS):
            began = time.perf_counter()
            VectorIndex(home)
            loads.append(time.perf_counter() - began)
        found[str(size)] = {
            "peak_mib": round(costs.peak_bytes / 2**20),
            "load_ms": round(1000 * statistics.median(loads), 2),
        }
    return found
