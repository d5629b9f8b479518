"""How many replicas of our service run, now and over time."""

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from ray import serve
from ray.exceptions import RayError

from pipelines.serve import APP_NAME

_LOOK_S = 0.2
Replicas = Mapping[str, int]
"""Running replicas by deployment."""
Samples = list[tuple[float, dict[str, int]]]
"""Seconds of `time.monotonic`, and running replicas by deployment."""


def running_replicas() -> dict[str, int]:
    """Running replicas by deployment of our service; nothing while Serve does not know, or calls one unhealthy."""
    try:
        application = serve.status().applications.get(APP_NAME)
    except (RayError, TimeoutError, RuntimeError):  # the controller is gone
        return {}
    deployments = {} if application is None else application.deployments
    if any(one.status == "UNHEALTHY" for one in deployments.values()):
        return {}
    return {name: one.replica_states.get("RUNNING", 0) for name, one in deployments.items()}


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until something holds, at most so long; gives whether it does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S)
    return True


class ReplicaWatch:
    """Running replicas, looked up every second until the block ends."""

    def __init__(self, every_s: float = 1.0) -> None:
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples: Samples = []

    def _watch(self) -> None:
        while True:
            found = running_replicas()
            if found:
                self.samples.append((time.monotonic(), found))
            if self._ended.wait(self._every_s):
                return

    def __enter__(self) -> "ReplicaWatch":
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
