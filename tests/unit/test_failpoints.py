"""Failpoints: a process dies where the environment says, and nowhere else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.failpoints import FAILPOINTS, IN_WORKERS, MARK, VARIABLE, reach
from slq.errors import ConfigError

_LOOP = """
from pipelines.failpoints import reach
for step in range(3):
    print(step, flush=True)
    reach("piece_after_write")
    reach("sweep")
"""


def run_loop(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _LOOP],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("failpoint", "steps"),
    [("sweep", 1), ("sweep:1", 1), ("sweep:3", 3), ("piece_after_write:2", 2), ("commit_after", 3)],
)
def test_a_process_dies_when_it_gets_to_its_point_for_the_nth_time(
    failpoint: str, steps: int
) -> None:
    done = run_loop({VARIABLE: failpoint})
    assert done.stdout.split() == [str(step) for step in range(steps)]
    assert done.returncode == (0 if failpoint == "commit_after" else -signal.SIGKILL)


def test_of_the_processes_that_share_a_mark_one_dies(tmp_path: Path) -> None:
    environment = {VARIABLE: "sweep:2", MARK: str(tmp_path / "died")}
    codes = [run_loop(environment).returncode for _ in range(3)]
    assert codes == [-signal.SIGKILL, 0, 0]


def test_points_of_workers_are_points() -> None:
    assert set(FAILPOINTS) > IN_WORKERS


def test_without_the_variable_no_point_does_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in FAILPOINTS:
        reach(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("comit_after", "'comit_after' is unknown; did you mean commit_after?"),
        ("xyz", "'xyz' is unknown; there are plan_written, piece_before_write"),
        ("sweep:0", "'sweep:0' counts wrongly; write sweep:N to die"),
        ("sweep:x", "'sweep:x' counts wrongly"),
        ("sweep:", "'sweep:' counts wrongly"),
    ],
)
def test_a_wrong_variable_is_told(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match=f"^{VARIABLE}: {message}".replace("?", r"\?")):
        reach("sweep")
