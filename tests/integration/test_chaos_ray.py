"""`slq bench chaos` with a few kills: the flow survives them, and the result says what was met."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        "SLQ_CHAOS" not in os.environ,
        reason="takes minutes and starts some ten Rays; set SLQ_CHAOS=1, or run `slq bench chaos`",
    ),
]
_OPTIONS = ["--seed", "3", "--rows", "100", "--kills", "1", "--worker-kills", "2"]


def test_drivers_and_workers_are_killed_and_no_row_is_lost() -> None:
    points = ["commit_after", "piece_after_write"]
    command = [sys.executable, "-m", "jobs.cli", "bench", "chaos", "--points", ",".join(points)]
    done = subprocess.run([*command, *_OPTIONS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "seed 3" in done.stderr
    found = json.loads(done.stdout)
    assert (found["seed"], found["rows"], found["shards"]) == (3, 100, 4)
    assert len(found["kills"]["killed"]) == len(found["kills"]["finished"]) == 1
    assert [one["point"] for one in found["points"]] == points
    assert found["points"][0]["shards_before"] == found["points"][0]["nth"]
    assert found["points"][1]["embedded"] == 98  # two are damaged
    assert sum(found["workers"]["killed"].values()) == 2
    assert found["workers"]["embedded"] == 98
