"""The most memory that this process and all its children hold at once."""

import threading

import psutil

_EVERY_S = 0.5


class PeakMemory:
    """Samples the proportional set size of the process tree, in which shared pages count once, until the block ends.

    Attributes:
        peak_bytes: The largest sum seen.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes())

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def tree_bytes() -> int:
    """Proportional set size of this process and its descendants, in bytes."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += int(process.memory_full_info().pss)
        except (psutil.Error, AttributeError):  # it ended meanwhile
            continue
    return total
