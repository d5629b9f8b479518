"""Calls between deployments: a replica that dies or is silent is replaced by another one, once."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from pipelines.serving import calls
from pipelines.serving.calls import ask, cause_of
from slq.errors import DataError, UnavailableError


@dataclass
class Later:
    """An answer that takes a while (s)."""

    value: str
    after_s: float


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
        if isinstance(answer, Later):
            await asyncio.sleep(answer.after_s)
            return answer.value
        return answer


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun."""
    monkeypatch.setattr(calls, "_tokens", calls._Tokens())


async def asked(*arguments: Any, **named: Any) -> Any:
    """An answer, once whoever else was asked knows that he need not."""
    answer = await ask(*arguments, **named)
    await asyncio.sleep(0)
    return answer


GONE = ActorUnavailableError("down at 10.0.0.9", None)


@pytest.mark.parametrize("lost", [GONE, ActorDiedError(), None])
def test_another_replica_is_asked_the_same(lost: Exception | None) -> None:
    method = Method(lost, "here")
    assert asyncio.run(asked(method, 1, patience_s=0.02, tenant="a")) == "here"
    assert method.asked == [((1,), {"tenant": "a"})] * 2
    assert method.given_up == (lost is None)


def test_whoever_answers_first_is_heard_and_the_others_are_given_up() -> None:
    async def scenario() -> None:
        slow = Method(Later("first", 0.1), None)
        assert await ask(slow, patience_s=0.02) == "first"
        await asyncio.sleep(0)
        assert (len(slow.asked), slow.given_up) == (2, 1)

    asyncio.run(scenario())


def test_a_silent_replica_is_not_let_go_of_before_another_one_answers() -> None:
    """Ray Serve sends further calls where fewer are under way; one that is given up would make room there."""
    method = Method(None, Later("second", 0.1))

    async def scenario() -> None:
        task = asyncio.ensure_future(ask(method, patience_s=0.02))
        while len(method.asked) < 2:
            await asyncio.sleep(0.005)
        assert method.given_up == 0
        assert await task == "second"

    asyncio.run(scenario())


def test_after_two_deaths_the_client_is_told_to_come_again() -> None:
    method = Method(GONE, ActorDiedError(), "too late")
    with pytest.raises(UnavailableError, match="try again later") as caught:
        asyncio.run(ask(method))
    assert len(method.asked) == 2
    assert "10.0.0.9" not in str(caught.value)


def test_where_many_are_silent_they_are_given_time_and_not_asked_twice() -> None:
    """All have too much to do then, and asking again would give them more."""
    methods = [
        Method(Later("late", 0.2), Later("late", 0.2), Later("late", 0.2)) for _ in range(40)
    ]

    async def scenario() -> None:
        answers = await asyncio.gather(*[ask(method, patience_s=0.02) for method in methods])
        assert answers == ["late"] * 40

    asyncio.run(scenario())
    assert sum(len(method.asked) for method in methods) <= 40 + 10


def test_a_second_call_that_finds_no_place_leaves_the_first_one_its_time() -> None:
    method = Method(Later("first", 0.1), BackPressureError(3, 3), BackPressureError(3, 3))
    assert asyncio.run(ask(method, patience_s=0.02)) == "first"
    full = Method(GONE, BackPressureError(3, 3), "never")
    with pytest.raises(UnavailableError, match="too many requests are waiting"):
        asyncio.run(ask(full))


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
