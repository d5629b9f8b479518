"""What an ingress replica takes on: requests, bytes and time, and what is beyond is refused at once."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipelines.serving.access import Access
from pipelines.serving.config import ServeConfig
from pipelines.serving.gate import Gate
from pipelines.serving.watch import Watch


class Server:
    """An application behind the gate that answers when it is let."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ServeConfig(**settings)
        self.access = Access(self.settings)
        self.let = asyncio.Event()
        self.running = 0
        self.cancelled = 0
        self.fault: Exception | None = None
        self.gate = Gate(self.app, lambda: self)

    async def app(self, _scope: Any, _receive: Any, send: Any) -> None:
        self.running += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.fault is not None:
            raise self.fault
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(
        self, path: str = "/search", *, method: str = "POST", **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of an answer."""
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("a body is read")

        raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        scope = {"type": "http", "path": path, "method": method, "headers": raw}
        await self.gate(scope, receive, send)
        found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return sent[0]["status"], json.loads(sent[1]["body"]), found


def running(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


async def begun(server: Server, *calls: Any) -> list[Any]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.01)
    return tasks


@pytest.mark.parametrize("length", ["3", "x", None])
def test_what_is_beyond_the_number_in_hand_is_refused_without_reading_it(
    length: str | None,
) -> None:
    async def scenario() -> None:
        server = Server(max_in_flight=2)
        two = await begun(server, server.ask(), server.ask())
        headers = {} if length is None else {"content_length": length}
        status, body, told = await server.ask(**headers)
        assert (status, told["retry-after"], body["error"]["type"]) == (
            503,
            "1",
            "service_unavailable",
        )
        assert server.running == 2
        server.let.set()
        assert [(await one)[0] for one in two] == [200, 200]
        assert (await server.ask())[0] == 200

    running(scenario)


def test_bodies_together_are_bounded_and_one_without_a_length_counts_as_the_longest() -> None:
    async def scenario() -> None:
        server = Server(max_in_flight_bytes=100, max_body_bytes=60)
        (first,) = await begun(server, server.ask(content_length="50"))
        assert (await server.ask(content_length="51"))[0] == 503
        assert (await server.ask(transfer_encoding="chunked"))[0] == 503
        (second,) = await begun(server, server.ask(content_length="50"))
        (empty,) = await begun(server, server.ask())
        assert server.running == 3
        server.let.set()
        for one in (first, second, empty):
            assert (await one)[0] == 200
        assert (await server.ask(transfer_encoding="chunked"))[0] == 200

    running(scenario)


def test_a_body_larger_than_all_that_may_be_in_hand_is_taken_alone() -> None:
    async def scenario() -> None:
        server = Server(max_in_flight_bytes=10, max_body_bytes=60)
        server.let.set()
        assert (await server.ask(content_length="50"))[0] == 200

    running(scenario)


def test_a_request_that_takes_too_long_is_given_up_with_504() -> None:
    async def scenario() -> None:
        server = Server(timeout_s=0.05, max_in_flight=1)
        status, body, told = await server.ask()
        assert (status, body["error"]["type"], told["retry-after"]) == (504, "timeout", "1")
        assert "serve.timeout_s" in body["error"]["message"]
        assert (server.running, server.cancelled) == (0, 1)
        server.let.set()
        assert (await server.ask())[0] == 200  # its place is free again

    running(scenario)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_whoever_watches_is_always_answered(path: str) -> None:
    async def scenario() -> None:
        server = Server(max_in_flight=1)
        await begun(server, server.ask())
        (watching,) = await begun(server, server.ask(path))
        server.let.set()
        assert (await watching)[0] == 200

    running(scenario)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_a_body_for_whoever_watches_counts_as_any_other(path: str) -> None:
    async def scenario() -> None:
        server = Server(max_in_flight_bytes=100, max_body_bytes=60)
        await begun(server, server.ask(content_length="50"))
        assert (await server.ask(path, content_length="51"))[0] == 503
        assert (await server.ask(path, transfer_encoding="chunked"))[0] == 503
        (watching,) = await begun(server, server.ask(path, content_length="0"))
        server.let.set()
        assert (await watching)[0] == 200

    running(scenario)


def test_a_length_of_thousands_of_digits_is_left_to_the_guard() -> None:
    async def scenario() -> None:
        server = Server()
        server.let.set()
        assert (await server.ask(content_length="9" * 5000))[0] == 200

    running(scenario)


def test_a_time_limit_of_something_else_is_none_of_the_gate() -> None:
    async def scenario() -> None:
        server = Server(timeout_s=60)
        server.let.set()
        server.fault = TimeoutError("of a socket")
        with pytest.raises(TimeoutError, match="of a socket"):
            await server.ask()

    running(scenario)


@pytest.mark.parametrize(("settings", "status"), [({}, 503), ({"timeout_s": 0.05}, 504)])
def test_a_refusal_has_an_id_and_is_not_sniffed(settings: dict[str, Any], status: int) -> None:
    async def scenario() -> None:
        server = Server(max_in_flight=1, **settings)
        if status == 503:
            await begun(server, server.ask())
        server.gate = Watch(server.gate, lambda: server)  # type: ignore[assignment]
        found, _, told = await server.ask(x_request_id="r-1")
        assert (found, told["x-request-id"]) == (status, "r-1")
        assert told["x-content-type-options"] == "nosniff"
        server.let.set()

    running(scenario)


def test_what_would_wait_too_long_is_refused_and_other_routes_are_not() -> None:
    async def scenario() -> None:
        server = Server(max_wait_s=0.05)
        server.let.set()
        many = await begun(server, *[server.ask() for _ in range(20)])
        await asyncio.gather(*many)
        assert [one.result()[0] for one in many] == [200] * 20
        server.gate._pace._interval_s = 0.02  # fifty a second
        server.let.clear()
        four = await begun(server, *[server.ask() for _ in range(4)])
        assert (await server.ask())[0] == 503
        (reading,) = await begun(server, server.ask("/info", method="GET"))
        server.let.set()
        assert [(await one)[0] for one in [*four, reading]] == [200] * 5
        assert (await server.ask())[0] == 200

    running(scenario)
