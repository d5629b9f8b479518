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
from pipelines.progress import show
from pipelines.recipe import ResourcesConfig
from pipelines.runtime import connect
from slq.index import Content, IndexConfig, VectorIndex, write_version
from slq.index.building import Each, here
from slq.index.config import CPU

_FEW, _MANY = (
    2,
    16,
)  # batches of a part: some parts to share out among workers, or as large as a usual shard
_LEARN, _ASSIGN = "learn lists and codes", "put vectors into lists"
_LOADS = 5


@dataclass(frozen=True)
class Part:
    """Some batches of the set, as a source.

    Attributes:
        data: The set.
        first: Its first batch.
        batches: How many.
    """

    data: ShiftedSet
    first: int
    batches: int

    @property
    def num_rows(self) -> int:
        """Of its batches."""
        return min(self.batches * BATCH_ROWS, self.data.num_rows - self.first * BATCH_ROWS)

    def tables(self) -> Iterator[pa.Table]:
        """Ids and vectors."""
        return self.data.tables(self.first, self.batches)


def content_of(data: ShiftedSet, batches: int = _FEW) -> Content:
    """The whole set, in parts of so many batches."""
    every = range(0, -(-data.num_rows // BATCH_ROWS), batches)
    parts = [Part(data, first, batches) for first in every]
    return Content(parts, data.dimension, "bench")


class Timed:
    """Keeps the seconds of each step of a build.

    Args:
        each: Does them.
    """

    def __init__(self, each: Each) -> None:
        self._each = each
        self.seconds: dict[str, float] = {}

    def __call__(
        self,
        what: str,
        function: Callable[[Any], Any],
        arguments: Sequence[Any],
        *,
        device: str = CPU,
    ) -> list[Any]:
        """As `slq.index.building.Each`."""
        began = time.perf_counter()
        found: list[Any] = self._each(what, function, arguments, device=device)
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
                timed = Timed(partial(each_in_tasks, workers))
                home = folder / f"scaling-{number}-{workers}"
                write_version(home, content_of(data), config, each=timed)
                found.append(timed.seconds[_ASSIGN])
            ratios.append(found[0] / found[1])
            show(f"round {number + 1} of {repeats}: two workers {ratios[-1]:.2f} times one")
            seconds.append(found)
    return {
        "two_to_one": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "seconds": [[round(value, 2) for value in found] for found in seconds],
    }


def measure_device(
    folder: Path, data: ShiftedSet, device: str, num_lists: int, repeats: int
) -> dict[str, Any]:
    """`cpu_to_gpu`: seconds of a step on all cores of this machine over those with the GPU, median over rounds.

    A warm-up round, which starts CUDA, is not counted.
    """
    found: dict[str, Any] = {}
    for codes, rotation in (("rabitq", "random"), ("pq4", "opq")):
        coding = {"kind": "ivf", "num_lists": num_lists, "codes": codes, "rotation": rotation}
        seconds: dict[str, list[dict[str, float]]] = {CPU: [], device: []}
        for number in range(repeats + 1):
            for place, of_place in seconds.items():
                timed = Timed(here)
                config = IndexConfig.model_validate({**coding, "device": place})
                home = folder / f"device-{codes}-{number}-{place.replace(':', '-')}"
                write_version(home, content_of(data), config, each=timed)
                of_place.append(timed.seconds)
        found[f"{codes} {rotation}"] = {
            step: _compared(
                [one[step] for one in seconds[CPU]], [one[step] for one in seconds[device]]
            )
            for step in (_LEARN, _ASSIGN)
        }
    return found


def _compared(on_cpu: Sequence[float], on_gpu: Sequence[float]) -> dict[str, Any]:
    rounds = list(zip(on_cpu, on_gpu, strict=True))[1:]
    return {
        "cpu_to_gpu": round(statistics.median(a / b for a, b in rounds), 2),
        "seconds": [[round(a, 2), round(b, 2)] for a, b in rounds],
    }


def measure_memory(
    folder: Path, sizes: Sequence[int], dimension: int, num_lists: int
) -> dict[str, Any]:
    """Peak MiB of all processes of a build, and milliseconds to load what was built, for each number of rows.

    Codes are int8, which stay on disk when they are loaded: loading opens every file and reads none, so its time is
    that of so many files.
    """
    config = IndexConfig.model_validate(
        {"kind": "ivf", "num_lists": num_lists, "codes": "int8", "partition_bytes": 64 * 2**20}
    )
    found = {}
    for size in sizes:
        show(f"building {size:,} vectors, to see what memory it takes")
        data, home = ShiftedSet(size, dimension), folder / f"memory-{size}"
        with Costs() as costs, connect(ResourcesConfig()):
            write_version(home, content_of(data, _MANY), config, each=partial(each_in_tasks, 2))
        loads = []
        for _ in range(_LOADS):
            began = time.perf_counter()
            VectorIndex(home)
            loads.append(time.perf_counter() - began)
        found[str(size)] = {
            "peak_mib": round(costs.peak_bytes / 2**20),
            "load_ms": round(1000 * statistics.median(loads), 2),
            "files": sum(path.is_file() for path in home.rglob("*")),
        }
    return found
