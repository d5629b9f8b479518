"""How long one more request would wait: what is in hand over the rate of answers, while there is work."""

import pytest

from pipelines.serving.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steady(in_hand: int, interval_s: float, answers: int = 200) -> Pace:
    """A replica that has so many in hand all the time, and answers one each interval."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(in_hand):
        pace.begin()
    for _ in range(answers):
        clock.now += interval_s
        pace.end(is_answered=True)
        pace.begin()
    return pace


@pytest.mark.parametrize(("in_hand", "interval_s"), [(5, 0.01), (50, 0.01), (10, 0.2)])
def test_the_wait_is_what_is_in_hand_times_the_interval(in_hand: int, interval_s: float) -> None:
    pace = steady(in_hand, interval_s)
    assert not pace.is_too_slow(in_hand * interval_s * 1.01)
    assert pace.is_too_slow(in_hand * interval_s * 0.99)


def test_few_are_taken_whatever_the_pace_is() -> None:
    assert not steady(3, 60.0).is_too_slow(0.5)


def test_a_replica_with_little_to_do_refuses_no_burst() -> None:
    """One request a minute says that one was asked, not that no more can be answered."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(100):
        pace.begin()
        clock.now += 0.01
        pace.end(is_answered=True)
        clock.now += 60
    for _ in range(50):
        pace.begin()
    assert not pace.is_too_slow(0.5)


def test_answers_that_come_together_count_as_their_mean() -> None:
    """A pass answers several at once."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(16):
        pace.begin()
    for _ in range(100):
        clock.now += 0.16
        for _ in range(8):
            pace.end(is_answered=True)
            pace.begin()
    assert not pace.is_too_slow(16 * 0.02 * 1.3)
    assert pace.is_too_slow(16 * 0.02 * 0.7)


def test_refusals_tell_nothing_of_the_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(10):
        pace.begin()
    for number in range(2000):
        clock.now += 0.01
        pace.end(is_answered=number % 10 == 0)  # one in ten is answered
        pace.begin()
    assert pace.is_too_slow(10 * 0.1 * 0.95)
    assert not pace.is_too_slow(10 * 0.1 * 1.05)


def test_a_pace_that_grows_is_learnt() -> None:
    pace = steady(10, 1.0)
    assert pace.is_too_slow(5.0)
    clock: Clock = pace._clock  # type: ignore[assignment]
    for _ in range(100):
        clock.now += 0.01
        pace.end(is_answered=True)
        pace.begin()
    assert not pace.is_too_slow(0.5)
