"""A run that is told to stop says so and can go on later."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from slq.errors import InterruptedRunError


@contextmanager
def stoppable(location: str) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into an error of ours, so that Ray is left in order.

    Outside the main thread signals are somebody else's, and nothing changes.

    Args:
        location: The data set, for the message.

    Raises:
        InterruptedRunError: A signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise InterruptedRunError(
            f"stopped by {signal.Signals(number).name}; committed shards stay in {location}, and the same command "
            "goes on from there"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
