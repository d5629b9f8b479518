"""An S3 server on this machine that fails as real ones do: moto behind a middleware that breaks a share of answers."""

import io
import random
import secrets
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import s3fs
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

UNAVAILABLE, RESET, LOST, CUT = "unavailable", "reset", "lost", "cut"
FAULTS = (UNAVAILABLE, RESET, LOST, CUT)
"""503; connection reset before the request is applied; applied, then reset; an answer that ends before its length."""
_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultyStore:
    """The middleware; `share` may be changed while it serves.

    Requests are applied one after the other, so that conditional puts are as exclusive as in S3; moto's own are not.

    Args:
        app: The server behind it.
        share: Of requests that fail; 1 is an outage.
        faults: Which ways to fail.
        seed: Of the schedule.
        most: Faults after which all requests are answered; None for no end.
    """

    def __init__(
        self, app: Any, share: float, faults: tuple[str, ...], seed: int, most: int | None
    ) -> None:
        self.bucket = (
            f"bucket-{secrets.token_hex(4)}"  # moto keeps its buckets from server to server
        )
        self.share, self.faults, self.most = share, faults, most
        self.count: Counter[str] = Counter()
        self._app, self._random = app, random.Random(seed)
        self._one_by_one = threading.Lock()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterator[bytes]:
        with self._one_by_one:
            over = self.most is not None and self.count.total() - self.count["none"] >= self.most
            broken = not over and self._random.random() < self.share
            fault = self._random.choice(self.faults) if broken else "none"
            self.count[fault] += 1
            if fault == RESET:
                self._reset(environ)
            if fault == UNAVAILABLE:
                start_response("503 Slow Down", [("Content-Length", str(len(_SLOW_DOWN)))])
                return iter([b"" if environ["REQUEST_METHOD"] == "HEAD" else _SLOW_DOWN])
            status, headers, body = self._apply(environ)
        if fault == LOST or (fault == CUT and not body):
            self._reset(environ)
        start_response(status, headers)
        return self._cut(environ, body) if fault == CUT else iter([body])

    def _apply(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        answered: list[Any] = []
        chunks = self._app(environ, lambda *answer: answered.extend(answer) or io.BytesIO().write)
        body = b"".join(chunks)
        if hasattr(chunks, "close"):
            chunks.close()
        return answered[0], answered[1], body

    def _cut(self, environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        self._reset(environ)

    @staticmethod
    def _reset(environ: dict[str, Any]) -> None:
        connection = environ["werkzeug.socket"]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        connection.shutdown(socket.SHUT_RDWR)  # else the server would wait for the next request
        raise ConnectionResetError("a fault on purpose")


class _Handler(MotoRequestHandler):
    def log(self, *_: object) -> None:
        """No line per request."""


@contextmanager
def faulty_store(
    share: float = 0.2, faults: tuple[str, ...] = FAULTS, seed: int = 0, most: int | None = None
) -> Iterator[FaultyStore]:
    """A server with an empty bucket; the environment says where it is and with which key, also to subprocesses."""
    store = FaultyStore(DomainDispatcherApplication(create_backend_app), 0.0, faults, seed, most)
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # instances are kept with the endpoint they first met
        s3fs.S3FileSystem().mkdir(store.bucket)
        store.share = share
        yield store
    server.shutdown()
    thread.join()
    server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()
