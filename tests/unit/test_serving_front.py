"""What stands in the proxies: another replica is asked where one dies, and a proxy's own words get our shape."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message

from pipelines.serving import front, incoming
from pipelines.serving.config import ServeConfig
from pipelines.serving.front import Front, _Answer, middlewares
from pipelines.serving.incoming import KEPT_BYTES, MOST_BYTES, Body

BODY = [b"first ", b"and last"]
Messages = list[Any]


def plain(status: int, text: bytes) -> Messages:
    """What a proxy of Ray Serve says itself."""
    headers = [[b"content-type", b"text/plain; charset=utf-8"], [b"X-Request-ID", b"r-1"]]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": text},
    ]


def of_ours(status: int, said: dict[str, Any]) -> Messages:
    payload = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"r-1")]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": payload},
    ]


DEATH: Messages = []
"""What a proxy says where the replica that it called dies."""


class Proxy:
    """An application that reads the body as a replica would, and answers what it is told, one after the other."""

    def __init__(self, *answers: Messages) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.ids: list[list[bytes]] = []
        self.headers: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        self.headers.append(dict(scope["headers"]))
        self.ids.append([v for k, v in scope["headers"] if k == b"x-request-id"])
        scope["path"] = "cut by the proxy"
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        for message in self.answers.pop(0):
            if isinstance(message, Exception):
                raise message
            await send(message)


def receiving(parts: list[bytes], *, leaves: bool = False) -> Callable[[], Any]:
    """A client that sends a body in parts, once."""
    messages: Messages = [
        {"type": "http.request", "body": part, "more_body": n + 1 < len(parts)}
        for n, part in enumerate(parts)
    ]
    if leaves:
        messages[-1] = {"type": "http.disconnect"}

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    return receive


def asked(
    proxy: Proxy,
    parts: list[bytes] = BODY,
    *,
    leaves: bool = False,
    request_id: bytes | None = b"r-1",
    headers: Messages | None = None,
) -> Messages:
    """What a client gets."""
    sent: Messages = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = [] if request_id is None else [(b"x-request-id", request_id)]
    given += headers or []
    scope = {"type": "http", "path": "/search", "method": "POST", "headers": given}
    asyncio.run(Front(proxy)(scope, receiving(parts, leaves=leaves), send))
    return sent


def test_an_answer_goes_on_as_it_is() -> None:
    answer = of_ours(200, {"results": []})
    proxy = Proxy(answer)
    assert asked(proxy) == answer
    assert proxy.bodies == [b"first and last"]


@pytest.mark.parametrize("request_id", [b"r 1\r\nx: y", b"x" * 65, "\u00fc".encode(), b"", None])
def test_an_id_that_is_none_never_reaches_logs_and_comes_back_once(
    request_id: bytes | None,
) -> None:
    ours = of_ours(200, {})
    ours[0]["headers"] = [*ours[0]["headers"], (b"X-Request-ID", b"of Ray Serve")]
    proxy = Proxy(ours)
    start, _ = asked(proxy, request_id=request_id)
    ((seen,),) = proxy.ids
    assert re.fullmatch(rb"[0-9a-f]{32}", seen)
    assert [v for k, v in start["headers"] if k.lower() == b"x-request-id"] == [seen]


def test_where_a_replica_dies_another_one_gets_the_same_request() -> None:
    answer = of_ours(200, {"results": []})
    proxy = Proxy(DEATH, answer)
    assert asked(proxy) == answer
    assert proxy.bodies == [b"first and last"] * 2
    assert proxy.paths == ["/search"] * 2


def test_a_death_that_leaves_the_proxy_as_an_error_is_one_too() -> None:
    answer = of_ours(200, {"results": []})
    proxy = Proxy([ConnectionError("lost")], answer)
    assert asked(proxy) == answer
    start, _ = asked(Proxy(*[[ConnectionError("lost")]] * 2))
    assert start["status"] == 503


def test_an_answer_that_breaks_off_is_not_begun_again() -> None:
    begun = of_ours(200, {"results": []})[:1]
    proxy = Proxy([*begun, ConnectionError("lost")], of_ours(200, {}))
    with pytest.raises(ConnectionError):
        asked(proxy)
    assert len(proxy.bodies) == 1


def test_where_they_all_die_the_client_is_told_to_come_again() -> None:
    proxy = Proxy(*[DEATH] * 9)
    start, body = asked(proxy)
    assert len(proxy.bodies) == 2
    assert start["status"] == 503
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"1"
    assert headers[b"x-request-id"] == b"r-1"
    assert int(headers[b"content-length"]) == len(body["body"])
    error = json.loads(body["body"])["error"]
    assert error["type"] == "service_unavailable"
    assert "down or restarting" in error["message"]


def test_what_no_replica_takes_is_not_tried_again_and_gets_our_shape() -> None:
    proxy = Proxy(plain(503, b"Request dropped due to backpressure"))
    start, body = asked(proxy)
    assert len(proxy.bodies) == 1
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert "too many requests" in json.loads(body["body"])["error"]["message"]


def test_a_deployment_that_failed_is_not_called_busy() -> None:
    words = b"Deployment(name='Ingress', app='slq') is unavailable because it failed to deploy."
    proxy = Proxy(plain(503, words))
    start, body = asked(proxy)
    assert len(proxy.bodies) == 1
    assert start["status"] == 503
    message = json.loads(body["body"])["error"]["message"]
    assert message == "the service is down or restarting; try again later"


def test_what_the_proxy_says_of_both_is_what_ray_says() -> None:
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    assert front._IS_FULL.decode() in BackPressureError(1, 1).message
    assert front._IS_FULL.decode() not in DeploymentUnavailableError("x").message


@pytest.mark.parametrize("status", [500, 503, 404])
def test_our_own_errors_are_the_clients(status: int) -> None:
    answer = of_ours(status, {"error": {"message": "x"}})
    proxy = Proxy(answer)
    assert asked(proxy) == answer
    assert len(proxy.bodies) == 1


def test_a_plain_text_that_is_no_failure_goes_on() -> None:
    answer = plain(200, b"success")
    start, body = asked(Proxy(answer))
    assert (start["status"], body["body"]) == (200, b"success")


STEERING = [
    b"x-request-timeout-seconds",
    b"X-Request-Timeout-Seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
    b"x-session-id",
    b"x_session_id",
]


@pytest.mark.parametrize("name", STEERING)
@pytest.mark.parametrize("value", [b"?1", b"\xff"])
def test_no_client_steers_a_proxy(name: bytes, value: bytes) -> None:
    answer = of_ours(200, {})
    proxy = Proxy(answer)
    assert asked(proxy, headers=[(name, value), (b"accept", b"*/*")]) == answer
    (seen,) = proxy.headers
    assert seen == {b"x-request-id": b"r-1", b"accept": b"*/*"}


def test_they_are_the_headers_that_ray_obeys() -> None:
    from ray.serve._private import constants
    from ray.serve._private.constants import SERVE_MULTIPLEXED_MODEL_ID

    assert {
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
        constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        SERVE_MULTIPLEXED_MODEL_ID.replace("_", "-"),
        constants.SERVE_SESSION_ID,
    } == {name.decode() for name in front._STEERING}


def test_a_header_that_a_proxy_could_not_read_is_refused_before_it_sees_it() -> None:
    proxy = Proxy()
    start, body = asked(proxy, headers=[(b"user-agent", b"\xe9")])
    assert start["status"] == 400
    assert dict(start["headers"])[b"x-request-id"] == b"r-1"
    assert "UTF-8" in json.loads(body["body"])["error"]["message"]
    assert proxy.paths == []


@pytest.mark.parametrize("length", [b"%d" % (MOST_BYTES + 1), b"9" * 5000])
def test_a_body_that_is_announced_as_too_long_is_not_read(length: bytes) -> None:
    proxy = Proxy()
    start, body = asked(proxy, [], headers=[(b"content-length", length)])
    assert start["status"] == 413
    assert dict(start["headers"])[b"connection"] == b"close"
    assert json.loads(body["body"])["error"]["type"] == "too_large"
    assert proxy.paths == []


def test_a_body_of_the_most_bytes_passes() -> None:
    answer = of_ours(200, {})
    length = [(b"content-length", b"%d" % MOST_BYTES)]
    assert asked(Proxy(answer), headers=length) == answer


# ---- a proxy that reads ahead, as Ray's does ----


class Client:
    """Sends parts when it is let, then waits; counts what it was asked for."""

    def __init__(self, *parts: Message) -> None:
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.count = 0
        for part in parts:
            self.parts.put_nowait(part)

    async def receive(self) -> Message:
        message = await self.parts.get()
        self.count += 1
        return message


class Ahead:
    """Reads in a task of its own, until the client is gone or the answer over, and never waits for that task's end.

    An answer is what a replica says once it has so many bytes; None is its death.
    """

    def __init__(self, *answers: tuple[int, Messages | None]) -> None:
        self.answers = list(answers)
        self.bodies: list[bytearray] = []
        self.changed = asyncio.Event()

    async def __call__(self, _scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        self.bodies.append(body)
        reading = asyncio.create_task(self._read(receive, body))
        num_bytes, answer = self.answers.pop(0)
        while len(body) < num_bytes and not reading.done():
            self.changed.clear()
            await self.changed.wait()
        if len(body) >= num_bytes:
            for message in answer or []:
                await send(message)
        reading.cancel()

    async def _read(self, receive: Any, body: bytearray) -> None:
        try:
            while True:
                message = await receive()
                body += message.get("body", b"")
                self.changed.set()
                if message["type"] == "http.disconnect":
                    return
        finally:
            self.changed.set()


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def answered(proxy: Ahead, client: Client) -> Messages:
    sent: Messages = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/search", "method": "POST", "headers": []}
    await Front(proxy)(scope, client.receive, send)
    return sent


@pytest.mark.parametrize("first", [0, 3, 6])
def test_a_loop_that_was_ended_takes_nothing_from_the_next(first: int) -> None:
    async def scenario() -> None:
        proxy = Ahead((first, None), (6, of_ours(200, {})))
        client = Client(part(b"abc"))
        asking = asyncio.create_task(answered(proxy, client))
        await asyncio.sleep(0)
        client.parts.put_nowait(part(b"def", more=False))
        start, _ = await asking
        assert start["status"] == 200
        assert proxy.bodies[-1] == b"abcdef"
        assert client.count == 2

    asyncio.run(scenario())


def test_a_loop_that_still_waits_gives_what_comes_to_the_next() -> None:
    async def scenario() -> None:
        client = Client(part(b"abc"))
        body = Body(client.receive)
        old = body.from_start()
        assert (await old())["body"] == b"abc"
        waiting = asyncio.create_task(old())
        await asyncio.sleep(0)
        new = body.from_start()
        assert (await new())["body"] == b"abc"
        next_one = asyncio.create_task(new())
        await asyncio.sleep(0)
        client.parts.put_nowait(part(b"def", more=False))
        assert (await next_one)["body"] == b"def"
        assert await waiting == {"type": "http.disconnect"}
        third = body.from_start()
        assert [(await third())["body"] for _ in range(2)] == [b"abc", b"def"]

    asyncio.run(scenario())


def test_nothing_is_kept_once_the_answer_is_begun() -> None:
    async def scenario() -> None:
        client = Client(part(b"abc"), part(b"def"))
        body = Body(client.receive)
        first = body.from_start()
        assert [(await first())["body"] for _ in range(2)] == [b"abc", b"def"]
        second = body.from_start()
        assert (await second())["body"] == b"abc"

        async def send(_: Message) -> None:
            """A client that reads."""

        await _Answer(send, "r-1", body).send(of_ours(200, {})[0])
        assert not body._kept
        assert (await second())["body"] == b"def"  # what it has not read yet is not lost
        client.parts.put_nowait(part(b"ghi", more=False))
        assert (await second())["body"] == b"ghi"
        assert not body._kept

    asyncio.run(scenario())


def test_whoever_sends_without_end_is_cut_off() -> None:
    async def scenario() -> None:
        class Endless(Client):
            async def receive(self) -> Message:
                self.count += 1
                return part(b" " * 2**20)

        class Counting(Ahead):
            async def _read(self, receive: Any, body: bytearray) -> None:
                while (await receive())["type"] != "http.disconnect":
                    await asyncio.sleep(0)
                self.changed.set()

        client, proxy = Endless(), Counting((1, None), (1, None))
        start, body = await answered(proxy, client)
        assert start["status"] == 413
        assert dict(start["headers"])[b"connection"] == b"close"
        assert json.loads(body["body"])["error"]["type"] == "too_large"
        assert client.count == MOST_BYTES // 2**20 + 1
        assert len(proxy.bodies) == 1

    asyncio.run(scenario())


def test_a_body_is_kept_up_to_a_limit() -> None:
    async def scenario() -> None:
        whole = part(b" " * KEPT_BYTES)
        client = Client(whole, part(b"x"))
        body = Body(client.receive)
        receive = body.from_start()
        await receive()
        assert body.is_kept
        await receive()
        assert not body.is_kept
        assert not body._kept

    asyncio.run(scenario())


def test_the_settings_allow_less_than_a_proxy_takes() -> None:
    assert ServeConfig().max_body_bytes < MOST_BYTES


def test_a_body_that_is_too_long_to_keep_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "KEPT_BYTES", 8)
    proxy = Proxy(DEATH, of_ours(200, {}))
    start, _ = asked(proxy)
    assert start["status"] == 503
    assert proxy.bodies == [b"first and last"]


def test_whoever_is_gone_is_not_answered_again() -> None:
    proxy = Proxy(DEATH, of_ours(200, {}))
    asked(proxy, [b"first ", b""], leaves=True)
    assert len(proxy.bodies) == 1


def test_rays_proxies_load_it() -> None:
    """By the name that the commands put into the environment, and as Ray checks it."""
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    found = call_function_from_import_path(front.IMPORT_PATH)
    (one,) = validate_http_proxy_callback_return(found)
    assert one.cls is Front is middlewares()[0].cls
    from ray.serve._private import constants

    assert hasattr(constants, front.VARIABLE)
