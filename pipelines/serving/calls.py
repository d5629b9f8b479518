"""Calls from one deployment of the service to another."""

from collections.abc import Awaitable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pipelines.serving.telemetry import heard
from slq.errors import UnavailableError


async def answer_of(call: Awaitable[Any]) -> Any:
    """The answer of a deployment; the time of stages that it tells with it is counted.

    Ray Serve answers BackPressureError itself, in plain text, and replaces any handler for it (Ray 2.60), so it never
    leaves our routes.

    Raises:
        UnavailableError: The deployment's queue is full, or it has failed.
    """
    try:
        return heard(await call)
    except BackPressureError:
        raise UnavailableError("too many requests are waiting; try again later") from None
    except (DeploymentUnavailableError, RayActorError):
        raise UnavailableError("a part of the service is down; try again later") from None


def cause_of(error: BaseException) -> BaseException:
    """What a deployment raised, or `error` itself where it was raised here."""
    return error.cause if isinstance(error, RayTaskError) else error
