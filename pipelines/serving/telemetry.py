"""What is told of a request while it is answered: how long each stage took, here and in the deployments it asks.

A request has one `Account`. `with stage("search"):` adds to it, and makes a span. What a deployment measured for a
request comes back with its answer, so that metrics, log line and `timings_ms` are made in one place, from one source.
"""

import asyncio
import contextvars
import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ray import serve
from ray.serve.exceptions import RayServeException

from pipelines.serving import logs, traces
from pipelines.serving.asked import Asked, answering, asked
from pipelines.serving.config import TelemetryConfig
from pipelines.serving.metrics import BATCH_SIZE, record

T = TypeVar("T")
Stage = Literal["queue", "embed", "search", "fetch", "fine"]
STAGES: tuple[Stage, ...] = ("queue", "embed", "search", "fetch", "fine")
"""`queue`: until a model begins with it; `embed`: reading the query, and its pass; `search`: the index; `fetch`:
reading candidates; `fine`: scoring them."""
_WITHOUT_SPAN = "queue"  # it is what is left of another stage


@dataclass(slots=True)
class Account:
    """What is known of how a request is answered.

    Attributes:
        stages: Seconds of each stage, without those of stages inside of it.
        facts: What a log line tells of the answer.
    """

    stages: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Frame:
    """A stage that goes on; `inner` are seconds of stages inside of it."""

    inner: float = 0.0


_ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)
_FRAME: ContextVar[_Frame | None] = ContextVar("frame", default=None)


@contextmanager
def accounting() -> Iterator[Account]:
    """An account of what is done meanwhile."""
    account, outer, frame = Account(), _ACCOUNT.get(), _FRAME.get()
    _ACCOUNT.set(account)
    _FRAME.set(None)
    try:
        yield account
    finally:
        _ACCOUNT.set(outer)
        _FRAME.set(frame)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """Count the time of what is done meanwhile, threads included that `asyncio.to_thread` starts."""
    outer, frame = _FRAME.get(), _Frame()
    _FRAME.set(frame)
    began = time.perf_counter()
    try:
        if name == _WITHOUT_SPAN:
            yield
        else:
            with traces.span(name):
                yield
    finally:
        elapsed = time.perf_counter() - began
        _FRAME.set(outer)
        _put(name, max(0.0, elapsed - frame.inner))
        if outer is not None:
            outer.inner += elapsed


def _put(name: str, seconds: float) -> None:
    account = _ACCOUNT.get()
    if account is not None:
        account.stages[name] = account.stages.get(name, 0.0) + seconds


def spent(name: Stage, seconds: float) -> None:
    """Count time that was measured elsewhere, inside of the stage that goes on."""
    _put(name, seconds)
    frame = _FRAME.get()
    if frame is not None:
        frame.inner += seconds


def timings_ms() -> dict[str, float]:
    """Milliseconds of each stage of the request so far; 0 for one that it did not have."""
    account = _ACCOUNT.get() or Account()
    return {name: 1000 * account.stages.get(name, 0.0) for name in STAGES}


def note(**facts: Any) -> None:
    """Tell something of the answer for log line and metrics; never what was asked.

    Args:
        facts: `reranked`, `degraded_reasons`, `index_version`, `model`, or others for the log line alone.
    """
    account = _ACCOUNT.get()
    if account is not None:
        account.facts.update(facts)


@dataclass(frozen=True, slots=True)
class Told:
    """What a deployment is told of the request that it is asked for.

    Attributes:
        request_id: Of the request.
        trace: Its trace context.
    """

    request_id: str
    trace: traces.Carrier


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """An answer of a deployment.

    Attributes:
        value: The answer.
        stages: Seconds of stages that it took there.
    """

    value: T
    stages: dict[str, float]


def told() -> Told:
    """What to tell a deployment of the request that is being answered."""
    return Told(asked().request_id, traces.carrier())


def replying(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[Any]]:
    """Let a method of a deployment answer with a `Reply` where it is called with `told=`, and as it is elsewhere."""

    @functools.wraps(method)
    async def replied(*given: Any, told: Told | None = None, **named: Any) -> Any:
        if told is None:
            return await method(*given, **named)
        outer = asked()  # of the same request, where the deployment is in the process that asks it
        answering(Asked(request_id=told.request_id))
        try:
            with accounting() as account, traces.continued(told.trace):
                value = await method(*given, **named)
        finally:
            answering(outer)
        return Reply(value, account.stages)

    return replied


def heard(answer: Any) -> Any:
    """The value of an answer; the stages of a reply are counted."""
    if not isinstance(answer, Reply):
        return answer
    for name, seconds in answer.stages.items():
        spent(name, seconds)  # type: ignore[arg-type]  # only `stage` and `spent` name them
    return answer.value


@dataclass(frozen=True, slots=True)
class Passed(Generic[T]):
    """What a pass that several requests shared made of one input.

    Attributes:
        value: The result.
        began: When the pass began (s, of `time.perf_counter`).
        ended: When it ended.
        size: Inputs that shared it.
    """

    value: T
    began: float
    ended: float
    size: int


async def in_thread(threads: Executor, run: Callable[..., T], *given: Any) -> T:
    """What a call gives in one of some threads; what it tells is told of the request that asks."""
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(threads, context.run, functools.partial(run, *given))


async def shared_pass(
    threads: Executor, run: Callable[..., Sequence[T]], *given: Any, size: int
) -> list[Passed[T]]:
    """Run a pass in a thread.

    Args:
        threads: Where.
        run: Gives one result per input, in order.
        given: Its arguments.
        size: How many inputs there are.
    """
    began = time.perf_counter()
    results = await in_thread(threads, run, *given)
    ended = time.perf_counter()
    record(BATCH_SIZE, size)
    return [Passed(result, began, ended, size) for result in results]


def results_of(name: Stage, passed: Sequence[Passed[T]]) -> list[T]:
    """The results of passes; their time counts for this request, each pass once, and is not divided by its size."""
    for began, ended, size in {(one.began, one.ended, one.size) for one in passed}:
        spent(name, ended - began)
        traces.past_span(name, began, ended, batch_size=size)
    return [one.value for one in passed]


def begin(settings: TelemetryConfig) -> None:
    """Let a replica log and trace as its service shall; outside of one, and for its second part, it does nothing."""
    try:
        replica = serve.get_replica_context()
    except RayServeException:
        return
    _begin(settings, replica.replica_tag, replica.deployment)


@functools.cache  # parts that are together in one process each ask for it
def _begin(settings: TelemetryConfig, replica_tag: str, deployment: str) -> None:
    logs.begin(settings)
    if settings.traces is not None:
        about = {
            "service.name": "slq",
            "service.instance.id": replica_tag,
            "slq.deployment": deployment,
        }
        traces.begin(settings.traces, settings.trace_share, about)
