"""Connects to Ray; the only place that calls `ray.init`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tenacity import Retrying, retry_if_exception, stop_after_attempt

from pipelines.recipe import ResourcesConfig
from pipelines.serving import front
from pipelines.tasks import require_gpus
from slq.errors import ClusterError, ServiceError

log = logging.getLogger(__name__)
_STARTS = 3


@contextmanager
def connect(resources: ResourcesConfig) -> Iterator[None]:
    """Join or start Ray for one command, and leave it as it was found.

    A local Ray gets at least three logical CPUs: actors that hold every CPU leave none for reading tasks, and Ray
    Data then waits forever without an error.

    Raises:
        ClusterError: Ray did not start.
        HardwareError: GPUs are asked for that the cluster does not have.
        ServiceError: The address cannot be reached.
    """
    if ray.is_initialized():
        _require_gpus(resources)
        yield
        return
    address = resources.address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault(front.VARIABLE, front.IMPORT_PATH)
    # Without this Ray hides GPUs from workers that ask for none, and warns that a later version will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray ends idle processes beyond one per CPU after a second, and to start one that loads torch takes several.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # The history of tasks, which only a dashboard would show: it grows up to 100,000 of them.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    options = (
        {} if address else {"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": False}
    )
    _init(address, options)
    try:
        _require_gpus(resources)
        yield
    finally:
        ray.shutdown()


def _init(address: str | None, options: dict[str, Any]) -> None:
    """Start Ray; again where it took too long, as it may on a machine that is busy with other things.

    Raises:
        ClusterError: It did not start.
        ServiceError: The address cannot be reached.
    """
    try:
        for attempt in Retrying(
            stop=stop_after_attempt(_STARTS), retry=retry_if_exception(_is_late), reraise=True
        ):
            with attempt:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    **options,
                )
    except ConnectionError as error:
        raise ServiceError(
            f"Ray at {address} cannot be reached: {error}; check the address, the network and the token"
        ) from None
    except Exception as error:
        if not _is_late(error):
            raise
        raise ClusterError(
            f"Ray did not start in {_STARTS} times half a minute; is this machine too busy? Run the same command again"
        ) from None


def _is_late(error: BaseException) -> bool:
    """Ray 2.60 waits 30 s for its own processes, and tells by a plain exception that it gave up."""
    return "timed out during startup" in str(error)


def _require_gpus(resources: ResourcesConfig) -> None:
    asked, way_out = resources.gpus_per_worker, "set it to 0 to run on CPUs"
    require_gpus("resources.gpus_per_worker", asked, way_out)
