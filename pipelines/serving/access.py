"""Who may ask for what: keys, scopes and rates."""

import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers

from pipelines.serving.asked import ADMIN, SCOPES, SEARCH, Asked, asked
from pipelines.serving.config import ServeConfig, is_loopback
from pipelines.serving.keys import ApiKey, find, parse_keys, read_keys
from pipelines.serving.rates import Rates
from pipelines.serving.refusal import RequestRefusedError
from slq.errors import ConfigError

log = logging.getLogger(__name__)
REQUEST_ID = "x-request-id"
KEYS_VARIABLE = "SLQ_API_KEYS"
_LOOK_S = 1.0  # a stat is not free on a network file system
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FREE = frozenset({"/", "/healthz", "/readyz"})
_DOCS = re.compile(r"/(docs|redoc|openapi\.json)(/.*)?")


def keys_of(settings: ServeConfig) -> list[ApiKey] | None:
    """The keys that a service was given, in a file or by the environment; None where it was given none.

    Raises:
        ConfigError: They cannot be read, or come from both.
    """
    path, text = settings.access.keys_file, os.environ.get(KEYS_VARIABLE)
    if path is not None and text is not None:
        raise ConfigError(f"API keys are in {path} and in {KEYS_VARIABLE}; leave one of them out")
    if path is not None:
        return read_keys(path)
    return None if text is None else parse_keys(text, source=KEYS_VARIABLE)


def require_keys(settings: ServeConfig) -> list[ApiKey] | None:
    """The keys of a service that may start with them, or without any.

    Raises:
        ConfigError: It has none, and may not do without; or they cannot be read.
    """
    keys = keys_of(settings)
    if keys is not None:
        return keys
    way_out = f"make some with `slq keys add` and set serve.access.keys_file or {KEYS_VARIABLE}"
    if settings.access.required:
        raise ConfigError(f"serve.access.required is set, and there are no API keys; {way_out}")
    if not is_loopback(settings.host) and not settings.access.open:
        raise ConfigError(
            f"serve.host is {settings.host}, which other machines can reach, and there are no API keys; {way_out}, or "
            "let everyone in with serve.access.open=true"
        )
    return None


class KeyRing:
    """Keys as they are now.

    Args:
        keys: As they were at the start.
        path: Their file, which is looked at again.
        clock: Seconds.
    """

    def __init__(
        self, keys: list[ApiKey], path: Path | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = keys
        self._path = path
        self._clock = clock
        self._looked = -math.inf
        self._seen: tuple[int, int, int] | None = None

    def now(self) -> list[ApiKey]:
        """The keys; the same list until they change. A file that is damaged or gone changes nothing."""
        if self._path is not None and self._clock() - self._looked >= _LOOK_S:
            self._looked = self._clock()
            self._look(self._path)
        return self._keys

    def _look(self, path: Path) -> None:
        try:
            stat = path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError:
            seen = (0, 0, 0)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = read_keys(path)
        except ConfigError as error:  # said once: the next look sees the same file
            log.error("API keys stay as they were: %s", error)  # noqa: TRY400 - no bug of ours


class Access:
    """What each request may do.

    Args:
        settings: Of the service.
        clock: Seconds.

    Raises:
        ConfigError: As `require_keys`.
    """

    def __init__(self, settings: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        keys = require_keys(settings)
        path = settings.access.keys_file
        self._ring = None if keys is None else KeyRing(keys, path, clock)
        self._rates = Rates(settings.access.rate_shares, clock)
        self._known: list[ApiKey] | None = None

    def admit(self, path: str, headers: Headers, request_id: str) -> Asked:
        """The request, if it may go on to its route.

        Raises:
            RequestRefusedError: 401, 403, 404 or 429.
        """
        wanted = self._wanted(path)
        if wanted is None:
            return Asked(request_id=request_id)
        if self._ring is None:
            scopes = SCOPES if self._settings.has_admin else (SEARCH,)
            request = Asked(request_id=request_id, scopes=frozenset(scopes))
            self._require(wanted, request)
            return request
        key = self._key(headers, self._ring)
        hidden = {ADMIN} if self._settings.admin is False else set()
        request = Asked(request_id, key.name, key.owner, frozenset(set(key.scopes) - hidden))
        self._require(wanted, request)
        self._count(key)
        return request

    def _wanted(self, path: str) -> frozenset[str] | None:
        """The scopes of which a path needs one; None where it needs no key. What is not known needs one."""
        switch = self._switch(path)
        if switch == "off":
            raise RequestRefusedError(404, f"{path}: Not Found", "not_found")
        if switch == "open" or path in _FREE:
            return None
        if switch == "key":
            return frozenset(SCOPES)
        is_admin = path == "/admin" or path.startswith("/admin/")
        return frozenset([ADMIN if is_admin else SEARCH])

    def _switch(self, path: str) -> str | None:
        if path == "/metrics":
            return self._settings.access.metrics
        return self._settings.access.docs if _DOCS.fullmatch(path) else None

    def _key(self, headers: Headers, ring: KeyRing) -> ApiKey:
        keys = ring.now()
        if keys is not self._known:
            self._known = keys
            self._rates.keep_only(keys)
        given = _given_key(headers)
        if given is None:
            raise _unknown("send an API key, as `Authorization: Bearer KEY` or `x-api-key: KEY`")
        key = find(keys, given)
        if key is None:
            raise _unknown("this API key is not known")
        if key.has_expired():
            raise _unknown("this API key has expired")
        return key

    def _require(self, wanted: frozenset[str], request: Asked) -> None:
        if wanted & request.scopes:
            return
        if ADMIN in wanted and (self._ring is None or self._settings.admin is False):
            raise _forbidden("this service does not let versions be changed (serve.admin)")
        raise _forbidden(f"this API key lacks the scope {' or '.join(sorted(wanted))!r}")

    def _count(self, key: ApiKey) -> None:
        wait_s = self._rates.enter(key)
        if not wait_s:
            return
        raise RequestRefusedError(
            429,
            "this API key has used up its rate; try again later",
            "rate_limit_error",
            headers={"retry-after": str(math.ceil(wait_s))},
            code="rate_limit_exceeded",
        )


def require_admin() -> None:
    """Check, in a route, what the guard has checked by its path.

    Raises:
        RequestRefusedError: 403.
    """
    if ADMIN not in asked().scopes:
        raise _forbidden(f"this needs the scope {ADMIN!r}")


def _forbidden(message: str) -> RequestRefusedError:
    return RequestRefusedError(403, message, "permission_error")


def _unknown(message: str) -> RequestRefusedError:
    headers = {"www-authenticate": "Bearer"}
    kind, code = "authentication_error", "invalid_api_key"
    return RequestRefusedError(401, message, kind, headers=headers, code=code)


def _given_key(headers: Headers) -> str | None:
    """The key that a request came with."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key")


def request_id_of(headers: Headers) -> str:
    """The id that a client gave its request, or a new one: what else it may have sent would end up in logs."""
    given = headers.get(REQUEST_ID, "")
    return given if _REQUEST_ID_FORM.fullmatch(given) else uuid.uuid4().hex
