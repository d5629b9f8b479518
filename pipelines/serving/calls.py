"""Calls from one deployment of the service to another."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pipelines.serving.here import HereMethod
from pipelines.serving.metrics import RETRIED, record
from pipelines.serving.telemetry import heard
from slq.errors import UnavailableError

_ATTEMPTS = 2
_MOST_TOKENS = 10.0
_TOKENS_PER_ANSWER = 0.1


class _Tokens:
    """What calls beside silent ones cost, so that they are a tenth of all at most.

    A replica that stands still holds few calls; where many are silent all have too much to do, and would have more.
    """

    def __init__(self) -> None:
        self._left = _MOST_TOKENS

    def earn(self) -> None:
        """A call was answered."""
        self._left = min(_MOST_TOKENS, self._left + _TOKENS_PER_ANSWER)

    def spend(self) -> bool:
        """Whether one more call may be made."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


_tokens = _Tokens()
_LOST = (DeploymentUnavailableError, RayActorError)


async def ask(method: Any, *arguments: Any, patience_s: float | None = None, **named: Any) -> Any:
    """The answer of a deployment, by whichever of its replicas; the time of stages that it tells with it is counted.

    Where the one that was asked dies, another one is asked the same; where it says nothing for a while, another one is
    asked beside it, and whoever answers first is heard. Everything that deployments are asked may be done twice. A
    silent replica is not let go of before: Ray Serve sends further calls where fewer wait.

    Args:
        method: Of a handle.
        arguments: Of the call.
        patience_s: How long a replica may be silent; None is for ever.
        named: Of the call.

    Raises:
        UnavailableError: The deployment's queue is full, or two replicas were lost.
    """
    if isinstance(method, HereMethod):  # there is nobody else to ask
        return heard(await method.remote(*arguments, **named))
    asking = _Asking(method, arguments, named)
    try:
        while True:
            wait_s = patience_s if asking.may_begin else None
            done, _ = await asyncio.wait(
                asking.calls, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if asking.is_answer(task):
                    _tokens.earn()
                    return heard(task.result())
            if asking.may_begin and (done or _tokens.spend()):
                asking.begin()  # in place of one that is lost, or beside one that is silent
            elif not asking.calls:
                raise UnavailableError("a part of the service is down; try again later")
    except BackPressureError:
        raise UnavailableError("too many requests are waiting; try again later") from None
    finally:
        for task in asking.calls:
            task.cancel()  # Ray Serve tells the replicas


class _Asking:
    """Calls of a method that are under way."""

    def __init__(self, method: Any, arguments: Any, named: Any) -> None:
        self._method = method
        self._arguments = arguments
        self._named = named
        self._num = 0
        self.calls: set[asyncio.Task[Any]] = set()
        self.begin()

    @property
    def may_begin(self) -> bool:
        """Whether it may be called again."""
        return self._num < _ATTEMPTS

    def begin(self) -> None:
        """Call it, once more."""
        if self._num:
            record(RETRIED, deployment=str(getattr(self._method, "deployment_name", "")))
        self._num += 1
        call = _awaited(self._method, self._arguments, self._named)
        self.calls.add(asyncio.ensure_future(call))

    def is_answer(self, task: asyncio.Task[Any]) -> bool:
        """Whether a call that ended was answered, if by an error, and not lost, which says nothing of the next one.

        Ray Serve answers BackPressureError itself, in plain text, and replaces any handler for it (Ray 2.60), so it
        never leaves our routes. A further call that finds no place is none, as long as another one may be answered.
        """
        self.calls.discard(task)
        error = task.exception()
        is_beside = isinstance(error, BackPressureError) and bool(self.calls)
        return not is_beside and not isinstance(error, _LOST)


async def _awaited(method: Any, arguments: Any, named: Any) -> Any:
    """A coroutine, as tasks want one; a call that fails at once fails here, too."""
    call: Awaitable[Any] = method.remote(*arguments, **named)
    return await call


def cause_of(error: BaseException) -> BaseException:
    """What a deployment raised, or `error` itself where it was raised here."""
    return error.cause if isinstance(error, RayTaskError) else error
