"""What stands in the proxies: another replica is asked where one dies, and a proxy's own words get our shape."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.serving import front
from pipelines.serving.front import Front, middlewares

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

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
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
) -> Messages:
    """What a client gets."""
    sent: Messages = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = [] if request_id is None else [(b"x-request-id", request_id)]
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


def test_a_body_that_is_too_long_to_keep_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_KEPT_BYTES", 8)
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
