"""The most memory that this process and all its children hold at once, and the processor time that they take."""

import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

_EVERY_S = 0.5


class Costs:
    """Samples the process tree until the block ends; memory that processes share through Ray counts once.

    Attributes:
        peak_bytes: The largest sum of memory seen.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._cpu_s: dict[int, float] = {}  # by process; those that ended keep what was seen last
        self._samples: list[tuple[float, float]] = []  # time, and processor seconds until then
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes())
            self._cpu_s |= tree_cpu_s()
            self._samples.append((time.time(), sum(self._cpu_s.values())))

    def cpu_s(self, start: float, end: float) -> float:
        """Processor seconds of all processes between two times (of `time.time`), between samples in proportion."""
        times, seconds = zip(*self._samples, strict=True)
        first, last = np.interp([start, end], times, seconds)
        return float(last - first)

    def __enter__(self) -> "Costs":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def tree_cpu_s() -> dict[int, float]:
    """Processor seconds that this process and its descendants have taken, by process."""
    me = psutil.Process()
    found = {}
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):  # it ended meanwhile
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def tree_bytes() -> int:
    """Bytes that this process and its descendants hold: each one's own, and once the largest share of shared memory.

    Libraries mapped from files are left out. The proportional set size would tell the same, but the kernel walks all
    pages for it, and a run that is asked every half second takes several times as long.
    """
    me = psutil.Process()
    own = shared = 0
    for process in (me, *me.children(recursive=True)):
        with suppress(OSError, psutil.Error):  # it ended meanwhile
            status = Path(f"/proc/{process.pid}/status").read_text()
            own += _field(status, "RssAnon")
            shared = max(shared, _field(status, "RssShmem"))
    return own + shared


def _field(status: str, name: str) -> int:
    """A field of `/proc/PID/status` in bytes; 0 of a process that has ended."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
