"""Progress lines from workers on any node to the terminal of the command that waits for them.

Ray can forward whole worker logs, but then a person's few progress lines drown in the framework's own. Workers send
lines to a small actor instead, and the driver prints them as they come.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_POLL_S = 0.5


class _Lines:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._refusal = ""
        self._trouble = ""

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def refuse(self, reason: str) -> None:
        """A worker's reason to end the run for good, the first of them: tried again, it would only come again."""
        self._refusal = self._refusal or reason

    def refusal(self) -> str:
        return self._refusal

    def fail(self, reason: str) -> None:
        """A worker's reason to give up for now; the last one tells why the run ended, if it did."""
        self._trouble = reason

    def trouble(self) -> str:
        return self._trouble


@contextmanager
def progress_sink() -> Iterator[Any]:
    """A handle for workers (`handle.add.remote(line)`); lines are printed until the block ends."""
    import ray

    sink = ray.remote(num_cpus=0)(_Lines).remote()
    ended = threading.Event()

    def pump() -> None:
        while True:
            last = ended.wait(_POLL_S)
            for line in ray.get(sink.take.remote()):
                show(line)
            if last:
                return

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield sink
    finally:
        ended.set()
        thread.join(timeout=5)


def show(line: str) -> None:
    """Print one progress line where a person looks and a pipe does not."""
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A duration as people read it: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for limit, size, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {name}" if name == "h" else f"{value:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"
