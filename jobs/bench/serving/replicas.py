"""How many replicas of our service run, now and over time."""

import time
from collections.abc import Callable, Collection, Mapping

from ray.exceptions import RayError
from ray.serve.context import _get_global_client

from pipelines.serving.app import APP_NAME

_LOOK_S = 0.2
Running = Mapping[str, Collection[str]]
"""Names of running replicas' actors by deployment."""


def running_replicas() -> dict[str, list[str]]:
    """Names of running replicas' actors by deployment of our service; nothing while Serve does not know.

    `serve.status` has counts alone, in which one that has just died is still among those that run.
    """
    try:
        client = _get_global_client(raise_if_no_controller_running=False)
        details = {} if client is None else client.get_serve_details()
    except (RayError, TimeoutError, RuntimeError):  # the controller is gone
        return {}
    deployments = details.get("applications", {}).get(APP_NAME, {}).get("deployments", {})
    return {
        name: [one["actor_name"] for one in told["replicas"] if one["state"] == "RUNNING"]
        for name, told in deployments.items()
    }


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until something holds, at most so long; gives whether it does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S)
    return True


def num_running() -> dict[str, int]:
    """How many replicas run, by deployment; nothing while Serve does not know."""
    return {name: len(actors) for name, actors in running_replicas().items()}
