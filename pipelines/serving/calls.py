"""Calls from one deployment of the service to another."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from slq.errors import UnavailableError


async def ask(method: Any, *arguments: Any, patience_s: float | None = None, **named: Any) -> Any:
    """The answer of a deployment, by whichever of its replicas.

    Where the one that was asked dies, or says nothing for a while, another one is asked the same, once: everything that
    deployments are asked may be done twice.

    Args:
        method: Of a handle.
        arguments: Of the call.
        patience_s: How long a replica may be silent; None is for ever.
        named: Of the call.

    Raises:
        UnavailableError: The deployment's queue is full, it has failed, or two replicas were lost or silent.
    """
    try:
        return await _answer(method.remote(*arguments, **named), patience_s)
    except _Lost:
        pass
    try:
        return await _answer(method.remote(*arguments, **named), patience_s)
    except _Lost as lost:
        raise UnavailableError(f"{lost}; try again later") from None


class _Lost(Exception):  # noqa: N818 - it never leaves this module
    """A replica gave no answer, which says nothing of the next one."""


async def _answer(call: Awaitable[Any], patience_s: float | None) -> Any:
    """What a replica answers.

    Ray Serve answers BackPressureError itself, in plain text, and replaces any handler for it (Ray 2.60), so it never
    leaves our routes.
    """
    task = asyncio.ensure_future(_awaited(call))
    try:
        await asyncio.wait([task], timeout=patience_s)
        if not task.done():
            raise _Lost(f"a part of the service has not answered within {patience_s:g} s")
        return task.result()
    except BackPressureError:
        raise UnavailableError("too many requests are waiting; try again later") from None
    except (DeploymentUnavailableError, RayActorError):
        raise _Lost("a part of the service is down") from None
    finally:
        task.cancel()  # of a call that is given up; Ray Serve tells its replica


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


def cause_of(error: BaseException) -> BaseException:
    """What a deployment raised, or `error` itself where it was raised here."""
    return error.cause if isinstance(error, RayTaskError) else error
