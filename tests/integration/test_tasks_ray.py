"""Waiting for Ray tasks: results in order, one failure ends the waiting."""

import time

import pytest
import ray

from pipelines.tasks import collect, model_task
from slq.errors import DataError, SlqError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_results_come_in_the_order_of_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    def late(number: int) -> int:
        time.sleep(0.3 * (number == 0))
        return number

    task = ray.remote(num_cpus=0)(late)
    assert collect([task.remote(n) for n in range(4)], "did") == [0, 1, 2, 3]
    assert "did 4/4  ETA 0 s" in capsys.readouterr().err


def test_the_first_failure_is_raised_at_once_and_the_rest_is_cancelled() -> None:
    def fail_or_wait(number: int) -> None:
        if number == 0:
            raise DataError("no item 0")
        for _ in range(600):  # an interrupt comes between two steps of Python
            time.sleep(0.1)

    task = ray.remote(num_cpus=0, max_retries=0)(fail_or_wait)
    tasks = [task.remote(n) for n in range(3)]
    started = time.monotonic()
    with pytest.raises(SlqError, match="no item 0"):
        collect(tasks, "did")
    assert time.monotonic() - started < 30
    for task_ref in tasks[1:]:
        with pytest.raises(ray.exceptions.TaskCancelledError):
            ray.get(task_ref, timeout=30)


def test_a_process_with_a_gpu_would_be_kept_for_the_next_task() -> None:
    """Ray's default ends it after each task, and with it the model that it has loaded."""

    def size(items: list[int]) -> int:
        return len(items)

    assert model_task(size, 1.0)._default_options["max_calls"] == 0
    assert ray.remote(num_gpus=1.0)(size)._default_options["max_calls"] == 1
