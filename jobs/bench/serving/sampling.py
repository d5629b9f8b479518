"""Figures that are looked up again and again beside what is measured."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

Samples = list[tuple[float, dict[str, int]]]
"""Seconds of `time.monotonic`, and figures by name."""


class Sampler:
    """Looks figures up until the block ends.

    Args:
        look: Gives them; nothing where they cannot be told now, which is left out.
        every_s: Time between two looks.

    Attributes:
        samples: What was seen, in order.
    """

    def __init__(self, look: Callable[[], dict[str, int]], every_s: float = 1.0) -> None:
        self._look = look
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.samples: Samples = []

    def _sample(self) -> None:
        while True:
            found = self._look()
            if found:
                self.samples.append((time.monotonic(), found))
            if self._ended.wait(self._every_s):
                return

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
