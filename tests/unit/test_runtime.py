"""Starting Ray where the machine is busy: again, and an error of ours where it does not come up."""

from typing import Any

import pytest
import ray

from pipelines.recipe import ResourcesConfig
from pipelines.runtime import connect
from slq.errors import ClusterError, ServiceError

LATE = "The current node timed out during startup. This could happen because ..."


class Starting:
    """Stands for `ray.init`: fails so many times.

    Args:
        failures: How often.
        error: With what.
    """

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self, **_: Any) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    for name in ("RAY_TRAIN_V2_ENABLED", "RAY_DEDUP_LOGS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return monkeypatch


def test_ray_that_comes_up_late_is_started_again(no_ray: pytest.MonkeyPatch) -> None:
    starting = Starting(2, Exception(LATE))
    no_ray.setattr(ray, "init", starting)
    with connect(ResourcesConfig()):
        assert starting.calls == 3


def test_ray_that_never_comes_up_is_an_error_that_says_what_to_do(
    no_ray: pytest.MonkeyPatch,
) -> None:
    starting = Starting(9, Exception(LATE))
    no_ray.setattr(ray, "init", starting)
    with (
        pytest.raises(
            ClusterError, match=r"did not start in 3 times half a minute; is this machine"
        ),
        connect(ResourcesConfig()),
    ):
        pass
    assert starting.calls == 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ConnectionError("refused"), ServiceError), (RuntimeError("another"), RuntimeError)],
)
def test_other_errors_are_not_tried_again(
    no_ray: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    starting = Starting(9, error)
    no_ray.setattr(ray, "init", starting)
    with pytest.raises(expected, match=r"refused|another"), connect(ResourcesConfig()):
        pass
    assert starting.calls == 1
