"""The training log: what is written comes back, in both forms, however a run ended and wherever it goes on."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.training_log import HISTORY, TENSORBOARD, TrainingLog, read_history
from slq.errors import ArtifactError, StorageError, TrainingError


def metrics(step: int, run: int = 1) -> dict[str, float]:
    return {"loss": run + 1 / step, "seconds/step": 0.25 * step}


def record(folder: Path, first: int, last: int, *, run: int = 1, resume_at: int = 0) -> None:
    with TrainingLog(folder, resume_at=resume_at) as log:
        for step in range(first, last + 1):
            log.write(step, metrics(step, run))


def expected(first: int, last: int, run: int = 1) -> list[dict[str, float]]:
    return [{"step": step, **metrics(step, run)} for step in range(first, last + 1)]


def board(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard itself shows a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / TENSORBOARD))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_what_is_written_comes_back_one_object_a_line(tmp_path: Path) -> None:
    record(tmp_path / "train", 1, 5)
    path = tmp_path / "train" / HISTORY
    assert read_history(path) == expected(1, 5)
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected(1, 5)
    assert board(tmp_path / "train", "loss") == [
        (step, pytest.approx(1 + 1 / step)) for step in range(1, 6)
    ]
    assert [step for step, _ in board(tmp_path / "train", "seconds/step")] == [1, 2, 3, 4, 5]


def test_a_running_log_can_be_read(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        log.write(1, metrics(1))
        assert read_history(tmp_path / HISTORY) == expected(1, 1)
        log.write(2, metrics(2))
        log.sync()
        assert read_history(tmp_path / HISTORY) == expected(1, 2)
        assert [step for step, _ in board(tmp_path, "loss")] == [1, 2]


@pytest.mark.parametrize("resume_at", [0, 1, 3, 5])
def test_a_resumed_run_leaves_every_step_once(tmp_path: Path, resume_at: int) -> None:
    record(tmp_path, 1, 5)
    record(tmp_path, resume_at + 1, 7, run=2, resume_at=resume_at)
    both = expected(1, resume_at) + expected(resume_at + 1, 7, run=2)
    assert read_history(tmp_path / HISTORY) == both
    assert board(tmp_path, "loss") == [
        (entry["step"], pytest.approx(entry["loss"])) for entry in both
    ]


def test_what_the_checkpoint_holds_is_not_written_again(tmp_path: Path) -> None:
    record(tmp_path, 1, 5)
    before = (tmp_path / HISTORY).read_bytes()
    inode = (tmp_path / HISTORY).stat().st_ino
    record(tmp_path, 6, 8, resume_at=5)
    assert (tmp_path / HISTORY).read_bytes().startswith(before)
    assert (tmp_path / HISTORY).stat().st_ino == inode


def test_a_line_torn_at_any_byte_is_left_out_and_cut(tmp_path: Path) -> None:
    record(tmp_path, 1, 3)
    path = tmp_path / HISTORY
    whole = path.read_bytes()
    last_line = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(last_line, len(whole)):
        path.write_bytes(whole[:end])
        assert read_history(path) == expected(1, 2)
    path.write_bytes(whole[:-4] + b"\0" * 64)  # what some file systems leave after a power cut
    assert read_history(path) == expected(1, 2)
    record(tmp_path, 3, 4, run=2, resume_at=2)
    assert read_history(path) == expected(1, 2) + expected(3, 4, run=2)


def test_a_killed_process_loses_no_step_that_it_wrote(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pipelines.training_log import TrainingLog\n"
        "log = TrainingLog(Path(sys.argv[1]))\n"
        "for step in range(1, 21):\n"
        "    log.write(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [entry["step"] for entry in read_history(tmp_path / HISTORY)] == list(range(1, 21))


def test_steps_may_be_left_out_and_lines_may_differ(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log:
        log.write(10, {"loss": 1.0})
        log.write(40, {"loss": 0.5, "text_to_image/hit@1": 0.75})
    assert read_history(tmp_path / HISTORY) == [
        {"step": 10, "loss": 1.0},
        {"step": 40, "loss": 0.5, "text_to_image/hit@1": 0.75},
    ]
    assert board(tmp_path, "text_to_image/hit@1") == [(40, 0.75)]
    with TrainingLog(tmp_path, resume_at=25) as log:
        log.write(26, {"loss": 0.9})
    assert [entry["step"] for entry in read_history(tmp_path / HISTORY)] == [10, 26]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_json_and_nan_when_read(tmp_path: Path, value: float) -> None:
    with TrainingLog(tmp_path) as log:
        log.write(1, {"loss": value, "temperature": 0.07})
    line = (tmp_path / HISTORY).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "temperature": 0.07,
    }
    entry = read_history(tmp_path / HISTORY)[0]
    assert math.isnan(entry["loss"])
    assert entry["temperature"] == 0.07


@pytest.mark.parametrize("step", [0, 4, 5])
def test_a_step_out_of_order_is_refused(tmp_path: Path, step: int) -> None:
    record(tmp_path, 1, 3)
    with TrainingLog(tmp_path, resume_at=3) as log:
        log.write(5, metrics(5))
        with pytest.raises(TrainingError, match=rf"step {step} cannot follow step 5 in .*history"):
            log.write(step, metrics(5))
    assert [entry["step"] for entry in read_history(tmp_path / HISTORY)] == [1, 2, 3, 5]


def test_a_step_of_the_checkpoint_is_refused_even_where_the_history_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), TrainingLog(tmp_path, resume_at=3) as log:
        with pytest.raises(TrainingError, match="step 3 cannot follow step 3"):
            log.write(3, metrics(3))
        log.write(4, metrics(4))
    assert "has no step up to 3" in caplog.text
    assert read_history(tmp_path / HISTORY) == expected(4, 4)


def test_no_metric_may_take_the_name_of_the_step(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as log, pytest.raises(TrainingError, match="called 'step'"):
        log.write(1, {"step": 1.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 2, "lo', r"damaged at line 2: .*; cut the file before that line"),
        (b"[2]", "line 2: it is no object with a step"),
        (b'{"loss": 1.0}', "line 2: it is no object with a step"),
        (b'{"step": 1}', "line 2: step 1 follows step 1"),
        (b'{"step": 2, "loss": "x"}', "line 2: 'loss' is no number"),
        (b"\xff\xfe", "damaged at line 2"),
    ],
)
def test_damage_before_the_last_newline_is_an_error(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / HISTORY
    path.write_bytes(b'{"step": 1}\n' + line + b"\n" + b'{"step": 3}\n')
    with pytest.raises(ArtifactError, match=message):
        read_history(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=message):
        TrainingLog(tmp_path, resume_at=1)
    assert path.read_bytes() == before


def test_a_missing_history_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"history\.jsonl is missing; run `slq train` first"):
        read_history(tmp_path / HISTORY)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written: .*; free space"):
        TrainingLog(tmp_path / "file" / "train")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file.fileno())
    os.close(full)
    with pytest.raises(StorageError, match="No space left on device; free space and run the same"):
        log.write(1, metrics(1))
    with pytest.raises(StorageError, match="No space left on device"):
        log.close()  # what did not fit is still waiting
