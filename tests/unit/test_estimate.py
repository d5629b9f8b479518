"""What a run will cost: arithmetic against written-out numbers."""

import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.planning import amount, estimate_table
from pipelines.embedding.costs import (
    ESTIMATE,
    Sample,
    Workload,
    comparison,
    estimate_of,
    subject,
    with_estimate,
)
from pipelines.recipe import Recipe, StorageConfig

SAMPLE = Sample(
    rows=1000,
    quarantined=100,
    input_bytes=50_000_000,
    tokens=9_000,
    padded_tokens=10_000,
    prepare_s=20.0,
    encode_s=5.0,
    write_s=4.0,
    written_bytes=2_000_000,
)
LOAD = Workload(
    rows=3_600_000,
    shards=14,
    file_bytes=7_000_000_000,
    encoders=8,
    preparing_cpus=24,
    gpus_per_encoder=0.5,
)


def test_an_estimate_is_the_sample_times_the_corpus() -> None:
    """One row takes 5 ms of an encoder, 20 ms of a preparing CPU and 4 ms to be written."""
    found = estimate_of(SAMPLE, LOAD, price=2.5)
    assert (found.rows, found.rows_are_estimated, found.shards) == (3_600_000, False, 14)
    assert found.sampled_rows == 1000
    assert found.input_bytes == 7_000_000_000
    assert found.item_bytes == 180_000_000_000
    assert found.output_bytes == 7_200_000_000
    assert found.quarantined_share == pytest.approx(0.1)
    assert found.padding_share == pytest.approx(0.1)
    assert found.encoder_rows_per_s == pytest.approx(200)
    assert found.preparing_rows_per_s == pytest.approx(50)
    assert (
        found.preparing_cpus_needed == 32
    )  # 8 encoders at 200 rows/s eat what 32 CPUs at 50 rows/s give
    assert found.encoder_hours == pytest.approx(5)
    assert found.gpu_hours == pytest.approx(2.5)
    assert found.cpu_hours == pytest.approx(24)
    assert found.cost == pytest.approx(12.5)
    assert found.eta_s == pytest.approx(
        3600
    )  # 24 CPU-hours on 24 CPUs; the encoders need 5/8 of it
    assert found.rows_per_s == pytest.approx(1000)


def test_enough_cpus_leave_the_encoders_as_the_limit() -> None:
    found = estimate_of(SAMPLE, dataclasses.replace(LOAD, preparing_cpus=400), price=0)
    assert found.eta_s == pytest.approx(5 / 8 * 3600)
    assert found.cost == 0


def test_rows_that_nobody_counted_are_told_by_bytes() -> None:
    """80 rows in 4 MB: 7 GB hold 140,000."""
    sample = dataclasses.replace(SAMPLE, known_rows=80, known_bytes=4_000_000)
    found = estimate_of(sample, dataclasses.replace(LOAD, rows=None), price=1)
    assert (found.rows, found.rows_are_estimated) == (140_000, True)
    assert found.output_bytes == 280_000_000


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (17, "17 B"), (999, "999 B"), (999.6, "1 kB"), (4_230_000, "4.23 MB"), (1.79e12, "1.79 TB")],
)  # fmt: skip
def test_amounts_are_read_by_people(size: float, text: str) -> None:
    assert amount(size) == text


def test_the_table_says_what_each_number_is_told_from() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(estimate_table(estimate_of(SAMPLE, LOAD, price=2.5)))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    for line in (
        "rows 3,600,000 counted",
        "quarantined 10.0% in a sample of 1,000 rows",
        "preparing CPUs 24 the encoders need 32",
        "encoder-hours 5 2.5 GPU-hours",
        "cost 12.50 at 2.50 per encoder-hour",
        "ETA 60 min at 1000.0 rows/s, after the models are loaded",
    ):
        assert line in lines


# ---- what came of it ----

REPORT: dict[str, Any] = {"rows": 36_000, "quarantined": 1800, "seconds": 60.0, "rows_per_s": 800.0}


def test_a_run_is_compared_with_its_plan() -> None:
    estimate = estimate_of(SAMPLE, LOAD, price=2.5).to_json()
    found = comparison(json.loads(json.dumps(estimate)), REPORT, output_bytes=90)
    assert found == {
        "rows_per_s": (pytest.approx(1000), 800),
        "hours": (pytest.approx(0.01), pytest.approx(1 / 60)),
        "output_bytes": (7_200_000_000, 90),
        "quarantined_share": (pytest.approx(0.1), 0.05),
    }


def test_a_report_holds_the_plan_of_this_run_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe(storage=StorageConfig(dir=tmp_path))
    assert with_estimate(REPORT, recipe, "abc", 90) == REPORT  # nothing was planned
    stored = subject(recipe, "abc") | estimate_of(SAMPLE, LOAD, price=2.5).to_json()
    (tmp_path / ESTIMATE).write_text(json.dumps(stored))
    with caplog.at_level(logging.INFO):
        found = with_estimate(REPORT, recipe, "abc", 90)
    assert found.items() >= REPORT.items()
    assert found["planned"]["rows_per_s"] == pytest.approx(1000)
    assert "rows_per_s: 1000 were planned, 800 came" in caplog.text
    (tmp_path / ESTIMATE).write_text(json.dumps(stored | {"fingerprint": "of another adapter"}))
    assert with_estimate(REPORT, recipe, "abc", 90) == REPORT
    (tmp_path / ESTIMATE).write_text("{")
    assert with_estimate(REPORT, recipe, "abc", 90) == REPORT


def test_a_run_that_read_nothing_is_not_compared(tmp_path: Path) -> None:
    recipe = Recipe(storage=StorageConfig(dir=tmp_path))
    stored = subject(recipe, "abc") | estimate_of(SAMPLE, LOAD, price=2.5).to_json()
    (tmp_path / ESTIMATE).write_text(json.dumps(stored))
    nothing = REPORT | {"rows": 0}
    assert with_estimate(nothing, recipe, "abc", 90) == nothing
