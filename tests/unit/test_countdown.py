"""Lines of progress: not too many, always the last one, none for what takes no time."""

import time

import pytest

from pipelines import tasks
from pipelines.tasks import Countdown


def lines(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], *, quiet_s: float = 0.0
) -> list[str]:
    shown: list[str] = []
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(tasks, "show", shown.append)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    countdown = Countdown("did", len(seconds), quiet_s=quiet_s)
    for _ in seconds:
        countdown.ended()
    return shown


def test_a_line_comes_at_most_once_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, [0.5, 0.9, 2.0, 2.4]) == [
        "did 1/4  ETA 2 s",
        "did 3/4  ETA 1 s",
        "did 4/4  ETA 0 s",
    ]


def test_what_ends_at_once_shows_one_line_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, [0.1, 0.2]) == ["did 1/2  ETA 0 s", "did 2/2  ETA 0 s"]
    assert lines(monkeypatch, [0.1, 0.2], quiet_s=1.0) == []
    assert lines(monkeypatch, [0.5, 3.0, 3.5], quiet_s=1.0) == [
        "did 2/3  ETA 2 s",
        "did 3/3  ETA 0 s",
    ]
