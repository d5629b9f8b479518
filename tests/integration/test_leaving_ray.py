"""Worker processes that end without the destructors of Ray's core, and drivers that do not."""

import atexit
import time
from pathlib import Path

import psutil
import pytest
import ray

from pipelines import leaving

pytestmark = pytest.mark.ray


class Leaver:
    """Notes which of the callbacks at its end are run."""

    def __init__(self, notes: str) -> None:
        atexit.register(lambda: Path(notes).write_text("registered before, so it would run after"))
        leaving.leave_without_destructors()
        leaving.leave_without_destructors()

    def pid(self) -> int:
        return psutil.Process().pid


def test_a_worker_ends_as_soon_as_python_has(ray_cluster: None, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    actor = ray.remote(num_cpus=0)(Leaver).remote(str(notes))
    process = psutil.Process(ray.get(actor.pid.remote()))
    del actor  # Ray ends it in good order
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running()
    time.sleep(0.2)
    assert not notes.exists()


def test_a_driver_keeps_its_own_end(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(atexit, "register", registered.append)
    leaving.leave_without_destructors.cache_clear()
    leaving.leave_without_destructors()
    assert registered == []
