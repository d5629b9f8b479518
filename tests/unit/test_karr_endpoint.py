"""A language model behind HTTP: failures that pass are tried again, the rest are told; keys go nowhere else."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.karr.endpoint import Endpoint, Pace, require_key
from pipelines.karr.kept import KeptAnswers
from pipelines.storage import open_store
from slq.errors import ConfigError
from slq.karr.config import EndpointConfig
from slq.karr.prompts import CHOOSE, messages, prompt_hash
from slq.karr.reasons import RejectedError
from tests.language_server import LanguageServer, serving

CAPTION = "a dog left of two owls"
SECRET = "sk-very-secret-0123"


def chat(number: int = 0) -> list[dict[str, Any]]:
    return messages(CHOOSE, {"caption": CAPTION, "number": str(number)})


def endpoint(server: LanguageServer, waits: list[float] | None = None, **changes: Any) -> Endpoint:
    """One whose waits are noted and not slept."""
    settings = {"url": server.url, "model": "stub", "timeout_s": 5.0, **changes}
    noted = [] if waits is None else waits
    return Endpoint(EndpointConfig(**settings), sleep=noted.append)


def test_a_question_is_asked_as_the_api_wants_it() -> None:
    with serving(LanguageServer()) as server:
        found = endpoint(server, temperature=0.3, max_tokens=50).complete(chat(), 7)
    (body,) = server.bodies
    assert body == {
        "model": "stub",
        "messages": chat(),
        "temperature": 0.3,
        "max_tokens": 50,
        "seed": 7,
        "response_format": {"type": "json_object"},
    }
    assert json.loads(found.text)["name"] in CAPTION
    assert server.keys == [None]


def test_faults_that_pass_are_tried_again() -> None:
    waits: list[float] = []
    with serving(LanguageServer(faults=1.0, slow_s=1.3)) as server:
        model = endpoint(server, waits, timeout_s=1.0)
        for number in range(10):
            assert json.loads(model.complete(chat(number), 0).text)["name"] in CAPTION
    assert set(server.asked.values()) == {2}
    assert len(waits) == 10
    assert all(0.4 < wait < 1.1 for wait in waits)


def test_what_is_never_answered_is_rejected_after_all_tries_with_growing_waits() -> None:
    waits: list[float] = []
    reasons = []
    with serving(LanguageServer(lost=1.0)) as server:
        model = endpoint(server, waits, attempts=4, max_wait_s=3.0)
        for number in range(8):
            with pytest.raises(RejectedError) as caught:
                model.complete(chat(number), 0)
            reasons.append((caught.value.reason, str(caught.value)))
    assert {reason for reason, _ in reasons} == {"unanswered"}
    texts = {text for _, text in reasons}
    assert texts == {
        "4 requests failed, the last one: status 500",
        "the endpoint refused this request with 400",
    }
    first = waits[:3]
    assert first == sorted(first)
    assert max(waits) <= 3.0


def test_a_server_that_is_not_there_is_unanswered() -> None:
    with serving(LanguageServer()) as server:
        pass
    with pytest.raises(RejectedError, match="2 requests failed, the last one: ConnectError"):
        endpoint(server, attempts=2).complete(chat(), 0)


def test_a_wrong_key_ends_the_run_and_is_never_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STUB_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with serving(LanguageServer(key="another")) as server:
        model = endpoint(server, api_key_env="STUB_KEY")
        with pytest.raises(
            ConfigError, match=r"answered 401: it refused the key \(model stub, key from STUB_KEY\)"
        ) as caught:
            model.complete(chat(), 0)
    assert SECRET not in str(caught.value) + repr(caught.value.__cause__) + caplog.text
    assert server.keys == [f"Bearer {SECRET}"]


def test_the_right_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", f" {SECRET}\n")
    with serving(LanguageServer(key=SECRET)) as server:
        assert endpoint(server, api_key_env="STUB_KEY").complete(chat(), 0).text


@pytest.mark.parametrize("key", ["", "  ", "two words", "tab\tin", "l\u00e4cheln", "line\nbreak"])
def test_a_key_that_no_header_can_carry_is_refused_untold(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_KEY", key)
    with pytest.raises(ConfigError, match="environment variable STUB_KEY") as caught:
        require_key(EndpointConfig(api_key_env="STUB_KEY"))
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "content", "reason"),
    [
        (200, b"no json", "unparseable"),
        (200, b"{}", "unparseable"),
        (200, b'{"choices": []}', "unparseable"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "unparseable"),
        (200, b'{"choices": [{"message": {"content": [1]}}]}', "unparseable"),
        (200, b"x" * 5000, "unparseable"),
        (302, b"", "unanswered"),
        (422, b"", "unanswered"),
    ],
)
def test_answers_of_another_form_are_rejected(status: int, content: bytes, reason: str) -> None:
    model = Endpoint(EndpointConfig(max_answer_bytes=4096), sleep=lambda _: None)
    answer = httpx.Response(
        status, content=content, headers={"location": "http://elsewhere.invalid"}
    )
    model._client = httpx.Client(transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(RejectedError) as caught:
        model.complete(chat(), 0)
    assert caught.value.reason == reason


def test_the_wait_that_a_server_asks_for_is_kept_within_the_limit() -> None:
    asked = iter(["7", "5000", "Wed, 21 Oct 2026 07:28:00 GMT"])

    def busy(_: httpx.Request) -> httpx.Response:
        return httpx.Response(429, headers={"retry-after": next(asked)})

    waits: list[float] = []
    model = Endpoint(EndpointConfig(attempts=3, max_wait_s=20.0), sleep=waits.append)
    model._client = httpx.Client(transport=httpx.MockTransport(busy))
    with pytest.raises(RejectedError):
        model.complete(chat(), 0)
    assert waits == [7.0, 20.0]


def test_no_more_requests_are_under_way_than_may_be() -> None:
    with serving(LanguageServer(faults=0.9, slow_s=0.03)) as server:
        model = Endpoint(
            EndpointConfig(url=server.url, concurrency=6), workers=2, sleep=lambda _: None
        )
        threads = [threading.Thread(target=model.complete, args=(chat(n), 0)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert 1 <= server.most_at_once <= 3


def test_a_pace_is_kept_whoever_waits() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))

    pace = Pace(30, clock=lambda: now[0], sleep=sleep)
    for _ in range(3):
        pace.wait()
    assert slept == [2.0, 4.0]  # nobody moved the clock, so each waits behind the others
    now[0] += 60
    pace.wait()
    assert slept == [2.0, 4.0]
    free = Pace(None, clock=lambda: now[0], sleep=sleep)
    for _ in range(100):
        free.wait()
    assert slept == [2.0, 4.0]


def test_answers_are_kept_by_model_prompt_and_seed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with serving(LanguageServer()) as server:
        model = KeptAnswers(endpoint(server), store)
        first = model.complete(chat(), 0)
        assert KeptAnswers(endpoint(server), store).complete(chat(), 0) == first
        assert len(server.bodies) == 1
        KeptAnswers(endpoint(server), store).complete(chat(), 1)
        KeptAnswers(endpoint(server, model="other"), store).complete(chat(), 0)
        assert len(server.bodies) == 3
    assert dict(model.counts) == {"asked": 1}
    assert first.prompt_hash == prompt_hash(chat(), model.settings(0))


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with serving(LanguageServer()) as server:
        model = KeptAnswers(endpoint(server), store)
        first = model.complete(chat(), 0)
        (path,) = tmp_path.rglob("*.json")
        for damage in ("{", "{}", json.dumps({**json.loads(path.read_text()), "prompt_hash": "0"})):
            path.write_text(damage)
            assert model.complete(chat(), 0).text == first.text
        assert len(server.bodies) == 4
        assert json.loads(path.read_text())["prompt_hash"] == first.prompt_hash


def test_failures_are_not_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with serving(LanguageServer(lost=1.0)) as server, pytest.raises(RejectedError):
        KeptAnswers(endpoint(server, attempts=1), store).complete(chat(), 0)
    assert list(tmp_path.rglob("*.json")) == []
