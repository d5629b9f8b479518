"""A load from here: starts the generator's process, and reads what it has noted."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.bench.load.arrivals import Piece, poisson
from jobs.bench.load.generator import ANSWERS, ARRIVALS, END, PLAN, RECORDS, Plan
from jobs.bench.load.records import Records
from slq.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one sort.

    Attributes:
        targets: Numbers of the plan's targets; each request is drawn evenly from them.
        pieces: Rates over time.
    """

    targets: Sequence[int]
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a load.

    Attributes:
        records: Of its requests.
        start: When it began (s, of `time.monotonic`).
        cpu_s: Processor seconds that the generator took.
        rude: Outcomes of slow clients and large bodies.
        answers: (n,) bodies where they were kept; empty without an answer.
    """

    records: Records
    start: float
    cpu_s: float
    rude: list[dict[str, Any]]
    answers: list[bytes]

    @property
    def generator_us(self) -> float:
        """Processor time of the generator per request, in microseconds."""
        sent = int((~np.isnan(self.records.sent)).sum())
        return 1e6 * self.cpu_s / max(1, sent)


def merged_arrivals(
    streams: Sequence[Stream], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When requests of all streams are due, (n,) seconds ascending, and (n,) which target each asks."""
    times, targets = [], []
    for stream in streams:
        at = poisson(stream.pieces, rng)
        times.append(at)
        targets.append(rng.choice(np.asarray(stream.targets, np.int64), len(at)))
    at = np.concatenate(times)
    order = np.argsort(at, kind="stable")
    return at[order], np.concatenate(targets)[order]


class Load:
    """A running load; leaving the block without an outcome ends its process.

    Args:
        folder: For its files; made anew.
        plan: What it does.
        streams: Its requests.
        rng: Draws arrivals and targets.
    """

    def __init__(
        self, folder: Path, plan: Plan, streams: Sequence[Stream], rng: np.random.Generator
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / END).unlink(missing_ok=True)
        (folder / PLAN).write_text(json.dumps(asdict(plan)))
        at, target = merged_arrivals(streams, rng)
        np.savez(folder / ARRIVALS, at=at, target=target)
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.start = 0.0

    def __enter__(self) -> "Load":
        command = [sys.executable, "-m", "jobs.bench.load.generator", str(self._folder)]
        root = str(Path(__file__).parents[3])
        self._process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServiceError("the load generator did not start; its words stand above")
        self.start = json.loads(line)["start"]
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def stop(self) -> Outcome:
        """Send no more; waits for answers that are on their way."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait()

    def wait(self) -> Outcome:
        """Wait until everything was sent and answered.

        Raises:
            ServiceError: The generator failed.
        """
        assert self._process is not None
        code = self._process.wait()
        if code or not (self._folder / END).is_file():
            raise ServiceError(f"the load generator ended with {code}; its words stand above")
        end = json.loads((self._folder / END).read_text())
        records = Records.load(self._folder / RECORDS)
        answers = (self._folder / ANSWERS).read_bytes().split(b"\n")[: len(records)]
        sent = ~np.isnan(records.sent)
        kept = [answer for answer, was_sent in zip(answers, sent, strict=True) if was_sent]
        return Outcome(records.chosen(sent), self.start, end["cpu_s"], end["rude"], kept)


def send(folder: Path, plan: Plan, streams: Sequence[Stream], rng: np.random.Generator) -> Outcome:
    """A load from its begin to its end."""
    with Load(folder, plan, streams, rng) as load:
        return load.wait()
