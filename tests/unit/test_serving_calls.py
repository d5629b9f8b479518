"""Calls between deployments: a replica that dies or is silent is replaced by another one, once."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from pipelines.serving.calls import ask, cause_of
from slq.errors import DataError, UnavailableError


class Method:
    """Of a handle: each call answers, raises, or says nothing for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []
        self.given_up = 0

    def remote(self, *arguments: Any, **named: Any) -> Any:
        self.asked.append((arguments, named))
        return self._answer(self.answers.pop(0))

    async def _answer(self, answer: Any) -> Any:
        if answer is None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.given_up += 1
                raise
        if isinstance(answer, Exception):
            raise answer
        return answer


GONE = ActorUnavailableError("down at 10.0.0.9", None)


@pytest.mark.parametrize("lost", [GONE, ActorDiedError(), None])
def test_another_replica_is_asked_the_same(lost: Exception | None) -> None:
    method = Method(lost, "here")
    assert asyncio.run(ask(method, 1, patience_s=0.02, tenant="a")) == "here"
    assert method.asked == [((1,), {"tenant": "a"})] * 2
    assert method.given_up == (lost is None)


@pytest.mark.parametrize("lost", [GONE, None])
def test_after_two_the_client_is_told_to_come_again(lost: Exception | None) -> None:
    method = Method(lost, lost, "too late")
    with pytest.raises(UnavailableError, match="try again later") as caught:
        asyncio.run(ask(method, patience_s=0.02))
    assert len(method.asked) == 2
    assert "10.0.0.9" not in str(caught.value)


def test_a_full_queue_is_not_asked_again() -> None:
    method = Method(BackPressureError(3, 3), "never")
    with pytest.raises(UnavailableError, match="too many requests are waiting"):
        asyncio.run(ask(method))
    assert len(method.asked) == 1


def test_what_a_replica_raises_is_no_loss_of_it() -> None:
    for error in (DataError("top_k is 0"), TimeoutError("of a disk"), TimeoutError()):
        method = Method(error, "never")
        with pytest.raises(type(error)):
            asyncio.run(ask(method, patience_s=5))
        assert len(method.asked) == 1
    remote = RayTaskError("search", "a traceback", DataError("top_k is 0"))
    with pytest.raises(RayTaskError) as caught:
        asyncio.run(ask(Method(remote)))
    assert isinstance(cause_of(caught.value), DataError)


def test_whoever_gives_up_gives_up_the_call() -> None:
    method = Method(None)

    async def scenario() -> None:
        task = asyncio.ensure_future(ask(method))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert method.given_up == 1
