"""How many replicas a load calls for, and that a load that wavers about a level moves none."""

from collections.abc import Sequence

import numpy as np
import pytest
from ray.serve.config import AutoscalingConfig

from pipelines.recipe import Recipe
from pipelines.serving.app import application
from pipelines.serving.load import BUSY, POLICY, Busy, ByLoad, wanted
from pipelines.serving.pinned import Pinned


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_busy_is_the_share_of_time_in_which_a_pass_runs_however_many_run_at_once() -> None:
    clock = _Clock()
    busy = Busy(clock)
    clock.now = 1.0
    with busy.passing():
        clock.now = 2.0
        with busy.passing():  # beside the first
            clock.now = 3.0
        clock.now = 4.0
    clock.now = 10.0
    assert busy.share() == pytest.approx(3 / 10)
    clock.now = 12.0
    assert busy.share() == 0.0  # each time from the last one on


def test_a_pass_that_still_runs_counts_as_far_as_it_has_come() -> None:
    clock = _Clock()
    busy = Busy(clock)
    with busy.passing():
        clock.now = 4.0
        assert busy.share() == 1.0
        clock.now = 6.0
    clock.now = 8.0
    assert busy.share() == pytest.approx(0.5)
    assert busy.share() == 0.0  # no time has passed


def test_a_pass_that_fails_ends_too() -> None:
    clock = _Clock()
    busy = Busy(clock)

    def fail() -> None:
        with busy.passing():
            clock.now = 1.0
            raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        fail()
    clock.now = 2.0
    assert busy.share() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("shares", "current", "calls", "expected"),
    [
        ([0.5], 1, 0.1, 1),
        ([0.71], 1, 0.1, 2),
        ([1.0], 1, 0.1, 2),
        ([1.0, 1.0], 2, 0.1, 3),
        ([0.4, 0.4], 2, 0.1, 2),  # what filled one is no reason to go back to it
        ([0.32, 0.32], 2, 0.1, 2),  # one would have 0.64, within the slack below 0.7
        ([0.25, 0.25], 2, 0.1, 1),
        ([0.0, 0.0, 0.0], 3, 0.0, 1),
        ([0.1], 1, 2.5, 3),  # calls queue before a model that waits for something else
        ([1.0], 2, 1.5, 2),  # the second one has only just started
        ([], 1, 1.5, 2),
        ([], 0, 0.2, 1),
    ],
)
def test_replicas_that_a_load_calls_for(
    shares: list[float], current: int, calls: float, expected: int
) -> None:
    assert wanted(shares, current, calls, target_busy=0.7) == expected


def _moves(loads: Sequence[float], *, start: int) -> list[int]:
    """Replicas after each step of a load (in replicas that are busy all the time), without any delay."""
    current, found = start, []
    for load in loads:
        share = min(1.0, load / current)
        current = min(4, wanted([share] * current, current, 0.0, 0.7))
        found.append(current)
    return found


@pytest.mark.parametrize("level", np.linspace(0.1, 2.5, 49))
def test_a_load_that_wavers_by_a_tenth_moves_replicas_once_at_most(level: float) -> None:
    # Ray's delays and look-back make a tenth of the twenty percent that clients waver by.
    rng = np.random.default_rng(int(level * 1000))
    moves = _moves(level * rng.uniform(0.93, 1.07, 400), start=1)
    changes = np.count_nonzero(np.diff(moves[20:]))
    assert changes <= 1


def test_a_step_up_and_back_down_is_followed() -> None:
    moves = _moves([0.3] * 5 + [1.8] * 10 + [0.3] * 10, start=1)
    assert moves[4] == 1
    assert moves[14] == 3
    assert moves[-1] == 1


class _Context:
    """What Ray Serve 2.60 gives a policy."""

    def __init__(self, shares: dict[str, float], running: list[str], num_requests: float) -> None:
        self.aggregated_metrics = {BUSY: shares} if shares else {}
        self.running_replicas = running
        self.current_num_replicas = len(running)
        self.total_num_requests = num_requests
        self.config = AutoscalingConfig(target_ongoing_requests=8)


def test_the_policy_reads_what_replicas_that_run_have_told() -> None:
    policy = ByLoad(target_busy=0.5)
    assert policy(_Context({"a": 0.9, "gone": 1.0}, ["a"], 2.0)) == (2, {})
    assert policy(_Context({}, ["a"], 20.0)) == (3, {})


def test_ray_finds_the_policy_by_its_name_and_only_the_model_has_it() -> None:
    recipe = Recipe.model_validate({"serve": {"scaling": {"backbone": {"target_busy": 0.4}}}})
    ingress = application(recipe, Pinned("3f2a", "v000001"))
    _, _, backbone, index = ingress._bound_deployment.init_args
    config = backbone._bound_deployment._deployment_config.autoscaling_config
    assert config.policy.policy_kwargs == {"target_busy": 0.4}
    assert config.policy.policy_function == POLICY
    assert config.policy.get_policy().__name__ == ByLoad.__name__
    other = index._bound_deployment._deployment_config.autoscaling_config
    assert other.policy.is_default_policy_function()
