"""A language model behind an OpenAI-compatible endpoint: `POST /chat/completions`, bounded in every way.

The key is read from the environment where it is used, and stands in no recipe, log, error or file.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random

from slq.errors import ConfigError
from slq.karr.config import EndpointConfig
from slq.karr.prompts import Message, prompt_hash
from slq.karr.reasons import RejectedError
from slq.karr.rewriting import Completion

_FATAL = {
    401: "refused the key",
    403: "refused the key",
    404: "does not know this address or model",
}
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class _TryAgainError(Exception):
    """A failure that may pass; `wait_s` is what the server asks for, or None."""

    def __init__(self, problem: str, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


class Pace:
    """Lets so many requests a minute pass, evenly; any thread may wait.

    Args:
        per_minute: None for no limit.
        clock: Seconds that only grow.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = clock()
        self._turn = threading.Lock()

    def wait(self) -> None:
        """Return when it is this request's turn."""
        with self._turn:
            now = self._clock()
            at = max(now, self._next)
            self._next = at + self._gap
        if at > now:
            self._sleep(at - now)


def require_key(config: EndpointConfig) -> None:
    """Check that the key is there and can stand in a header.

    Raises:
        ConfigError: The variable is not set, or holds what no header can.
    """
    key = _key(config)
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"karr: environment variable {config.api_key_env} holds white space inside, or signs that no HTTP header "
            "can carry; export the key alone"
        )
    if config.api_key_env is not None and not key:
        raise ConfigError(
            f"karr: environment variable {config.api_key_env} is not set, and {config.url} needs its key; export it on "
            "the machines of driver and workers, or set api_key_env to null for an endpoint without one"
        )


def _key(config: EndpointConfig) -> str:
    """The key, read where it is used; empty where none is sent."""
    return os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""


class Endpoint:
    """Answers chats by HTTP.

    Args:
        config: Where, and how much is asked.
        workers: That share concurrency and rate.
        sleep: Waits so many seconds between two tries.

    Raises:
        ConfigError: The key is not set, or cannot be one.
    """

    def __init__(
        self,
        config: EndpointConfig,
        *,
        workers: int = 1,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        require_key(config)
        self._config, self._sleep = config, sleep
        rate = config.requests_per_minute
        self._pace = Pace(rate / workers if rate else None, sleep=sleep)
        self._room = threading.BoundedSemaphore(max(1, config.concurrency // workers))
        self._client = httpx.Client(timeout=config.timeout_s, follow_redirects=False)

    @property
    def name(self) -> str:
        """See `LanguageModel.name`."""
        return self._config.model

    def settings(self, seed: int) -> dict[str, Any]:
        """See `LanguageModel.settings`; where the endpoint is does not change an answer."""
        config = self._config
        return {
            "model": config.model,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "json_mode": config.json_mode,
            "seed": seed,
        }

    def complete(self, chat: list[Message], seed: int) -> Completion:
        """See `LanguageModel.complete`; failures that may pass are tried again, with growing waits.

        Raises:
            ConfigError: The endpoint refuses key, address or model: no other request would fare better.
            RejectedError: `unanswered`, after all tries or where this request alone is refused; `unparseable` where the
                answer is not of the endpoint's own form.
        """
        retrying = Retrying(
            stop=stop_after_attempt(self._config.attempts),
            wait=self._wait_s,
            retry=retry_if_exception_type(_TryAgainError),
            sleep=self._sleep,
            reraise=True,
        )
        body = self._body(chat, seed)
        try:
            text = retrying(self._asked, body)
        except _TryAgainError as error:
            raise RejectedError(
                "unanswered", f"{self._config.attempts} requests failed, the last one: {error}"
            ) from None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Completion(text, prompt_hash(chat, self.settings(seed)), now)

    def _wait_s(self, state: RetryCallState) -> float:
        config = self._config
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_s if isinstance(error, _TryAgainError) else None
        growing = (wait_exponential(multiplier=0.5) + wait_random(0, 0.5))(state)
        return min(config.max_wait_s, max(asked or 0.0, growing))

    def _body(self, chat: list[Message], seed: int) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": chat,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": seed,
        }
        return {**body, "response_format": {"type": "json_object"}} if config.json_mode else body

    def _asked(self, body: dict[str, Any]) -> str:
        """One request's answer.

        Raises:
            ConfigError: As `complete`; so is RejectedError.
            _TryAgainError: It may go better next time.
        """
        with self._room:
            self._pace.wait()
            try:
                status, headers, data = self._sent(body)
            except httpx.TimeoutException:
                raise _TryAgainError(f"no answer in {self._config.timeout_s:g} s") from None
            except httpx.HTTPError as error:
                raise _TryAgainError(type(error).__name__) from None  # its text may hold a header
        if status in _FATAL:
            raise ConfigError(
                f"karr: {self._config.url} answered {status}: it {_FATAL[status]} (model {self._config.model}, key "
                f"from {self._config.api_key_env or 'nowhere'}); mend the endpoint section and run it again"
            )
        if status in _AGAIN:
            raise _TryAgainError(f"status {status}", _seconds(headers.get("retry-after")))
        if status != httpx.codes.OK:
            raise RejectedError("unanswered", f"the endpoint refused this request with {status}")
        return _content(data)

    def _sent(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and as many bytes of the answer as may be."""
        key = _key(self._config)
        headers = {
            "Accept-Encoding": "identity"
        }  # what is packed may be far larger than what is read
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = bytearray()
        deadline = time.monotonic() + self._config.timeout_s  # httpx's own is for each read
        url = f"{self._config.url.rstrip('/')}/chat/completions"
        with self._client.stream("POST", url, json=body, headers=headers) as answer:
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > self._config.max_answer_bytes:
                    raise RejectedError(
                        "unparseable", f"the answer has more than {len(data)} bytes"
                    )
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer came too slowly")
            return answer.status_code, answer.headers, bytes(data)


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None  # a date; the growing wait serves as well


def _content(data: bytes) -> str:
    """The text of the first choice.

    Raises:
        RejectedError: `unparseable`.
    """
    try:
        text = httpx.Response(200, content=data).json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise RejectedError("unparseable", f"no chat completion: {type(error).__name__}") from None
    if not isinstance(text, str):
        raise RejectedError("unparseable", "the completion has no text")
    return text
