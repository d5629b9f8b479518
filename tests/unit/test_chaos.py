"""What `slq bench chaos` holds data sets against: each kind of damage is found and named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bench.chaos import run
from jobs.bench.chaos.invariants import (
    BrokenInvariantError,
    Snapshot,
    require_sound,
    violations,
)
from jobs.bench.chaos.notes import ENCODED, NOTES, PREPARED, counted, note
from jobs.bench.chaos.runs import Run
from jobs.bench.chaos.stand import corpus_rows
from slq.errors import ConfigError

IDS = [f"{n:02d}" for n in range(20)]
BAD = "03"


def write_shard(folder: Path, shard_id: int, good: list[str], bad: list[str]) -> None:
    """A shard and its commit record, which always vouches for what is written."""
    sums: dict[str, str | None] = {"shards": None, "errors": None}
    for kind, ids in (("shards", good), ("errors", bad)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        if ids:
            path = folder / kind / f"part-{shard_id:06d}.parquet"
            pq.write_table(pa.table({"id": ids}), path)
            sums[kind] = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {
        "shard_id": shard_id,
        "rows": len(good),
        "quarantined": len(bad),
        "sha256": sums["shards"],
        "errors_sha256": sums["errors"],
        "attempt": os.urandom(4).hex(),
    }
    (folder / "commits").mkdir(exist_ok=True)
    (folder / "commits" / f"{shard_id:06d}.json").write_text(json.dumps(record))


def data_set(folder: Path) -> Path:
    write_shard(folder, 0, [one for one in IDS[:10] if one != BAD], [BAD])
    write_shard(folder, 1, IDS[10:], [])
    for name in ("manifest.json", "run.json", "report.json", "run.lock"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return data_set(tmp_path / "clean")


@pytest.fixture
def ours(tmp_path: Path, clean: Path) -> Path:
    return data_set(tmp_path / "ours")


def test_a_sound_data_set_has_no_finding_though_attempts_reports_and_locks_differ(
    ours: Path, clean: Path
) -> None:
    (ours / "report.json").unlink()
    (ours / "run.lock").write_text("another")
    assert violations(ours, clean, IDS) == []
    require_sound(ours, clean, IDS)


def flip_a_byte(folder: Path) -> None:
    path = folder / "shards" / "part-000001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_a_byte_of_the_quarantine(folder: Path) -> None:
    path = folder / "errors" / "part-000000.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


OTHER = "shards/part-000001.parquet has other bytes than in the clean run"
DAMAGES: list[tuple[Callable[[Path], object], list[str]]] = [
    (flip_a_byte, ["shards/part-000001.parquet is not what commits/000001.json says"]),
    (
        flip_a_byte_of_the_quarantine,
        ["errors/part-000000.parquet is not what commits/000000.json says"],
    ),
    (
        lambda folder: write_shard(folder, 1, IDS[10:-1], []),
        ["1 rows are missing: 19", OTHER],
    ),
    (
        lambda folder: write_shard(folder, 1, [*IDS[10:], "12"], []),
        ["1 rows are too many: 12", OTHER],
    ),
    (
        lambda folder: write_shard(folder, 1, [*IDS[10:], BAD], []),  # quarantined, and embedded
        ["1 rows are too many: 03", OTHER],
    ),
    (
        lambda folder: write_shard(folder, 1, [*IDS[11:], "99"], []),
        ["1 rows are missing: 10", "1 rows are too many: 99", OTHER],
    ),
    (lambda folder: write_shard(folder, 1, IDS[:9:-1], []), [OTHER]),
    (
        lambda folder: (folder / "manifest.json").write_text("{ }"),
        ["manifest.json has other bytes than in the clean run"],
    ),
    (
        lambda folder: (folder / "shards" / ".part-000001.parquet.late").touch(),
        ["shards/.part-000001.parquet.late should not be there"],
    ),
    (lambda folder: (folder / "x.partial").touch(), ["x.partial should not be there"]),
    (
        lambda folder: (folder / "commits" / "000001.json").unlink(),
        ["commits/000001.json is missing"],
    ),
    (lambda folder: shutil.rmtree(folder / "errors"), ["errors/part-000000.parquet is missing"]),
]


@pytest.mark.parametrize(("damage", "findings"), DAMAGES)
def test_damage_is_found_and_named(
    ours: Path, clean: Path, damage: Callable[[Path], object], findings: list[str]
) -> None:
    damage(ours)
    assert violations(ours, clean, IDS) == findings
    with pytest.raises(BrokenInvariantError) as caught:
        require_sound(ours, clean, IDS)
    assert str(caught.value) == f"{ours}: {'; '.join(findings)}"


def test_of_many_findings_a_few_are_shown(ours: Path, clean: Path) -> None:
    for n in range(7):
        (ours / f"{n}.partial").touch()
    with pytest.raises(BrokenInvariantError, match=r"4.partial should .* and 2 more findings$"):
        require_sound(ours, clean, IDS)


def test_what_was_committed_must_stay_as_it_was(ours: Path) -> None:
    write_shard(ours, 2, ["z"], [])
    (ours / "shards" / "part-000002.parquet").unlink()  # committed, without its name yet
    before = Snapshot.of(ours)
    assert before.shards == {0, 1, 2}
    assert sorted(before.files) == [
        "commits/000000.json",
        "commits/000001.json",
        "commits/000002.json",
        "errors/part-000000.parquet",
        "shards/part-000000.parquet",
        "shards/part-000001.parquet",
    ]
    assert before.touched(ours) == []
    (ours / "shards" / "part-000002.parquet").touch()
    write_shard(ours, 3, ["y"], [])
    assert before.touched(ours) == []
    (ours / "errors" / "part-000000.parquet").touch()  # the same bytes, written again
    (ours / "commits" / "000001.json").unlink()
    assert before.touched(ours) == [
        "commits/000001.json",
        "errors/part-000000.parquet",
        "shards/part-000001.parquet",
    ]
    assert Snapshot.of(ours / "nothing") == Snapshot(frozenset(), {})


def test_the_corpus_has_each_kind_of_item_and_some_damage() -> None:
    rows = corpus_rows(104, seed=3)
    assert rows == corpus_rows(104, seed=3)
    assert rows != corpus_rows(104, seed=4)
    assert len({row["id"] for row in rows}) == 104
    assert [number for number, row in enumerate(rows) if row["image"] == b"damaged"] == [0, 50]
    kinds = {(row["image"] is not None, row["text"] is not None) for row in rows}
    assert kinds == {(True, False), (False, True), (True, True)}


def test_notes_of_many_writers_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    for count in (1, 2, 3):
        note(PREPARED, count)
    note(ENCODED, 8)
    assert counted(tmp_path / "notes") == {PREPARED: 6, ENCODED: 8}


_FAMILY = """
import subprocess, sys, time
child = "import time; time.sleep(600)"
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
print("started", flush=True)
{end}
"""


def family(tmp_path: Path, end: str) -> Run:
    """A process with two children in sessions of their own, as Ray's are."""
    return Run([sys.executable, "-c", _FAMILY.format(end=end)], tmp_path / "log", {})


def test_a_run_knows_its_processes_and_kills_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with family(tmp_path, "time.sleep(600)") as run:
            assert run.wait_for(lambda: len(run.processes()) == 3, 30)
            assert run.processes()[0].pid == run.pid
            assert len(run.workers("time.sleep(600)")) == 3 - 1
            assert run.wait(0.01) is None
            run.kill(whole=False)
            orphans = run.processes()
            assert len(orphans) == 2
            monkeypatch.setattr("jobs.bench.chaos.runs._LEAVE_S", 0.1)
            with pytest.raises(BrokenInvariantError, match=f"still has .*{orphans[0].pid} python"):
                run.require_gone()
        psutil.wait_procs(orphans, timeout=30)
        run.require_gone()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_run_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with family(tmp_path, "sys.exit('nothing works')") as run:
        code = run.wait(30)
        assert code == 1
        assert not run.wait_for(lambda: False, 30)  # it will not come any more
        with pytest.raises(
            BrokenInvariantError, match=r"ended with exit code 1 .*\nstarted\nnothing works$"
        ):
            run.require_success(code)
        with pytest.raises(BrokenInvariantError, match="the run did not end after"):
            run.require_success(None)
        with pytest.raises(BrokenInvariantError, match="the run ended with SIGKILL after"):
            run.require_success(-9)


def test_a_run_joins_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    command = [sys.executable, "-c", "import os; print(os.environ.get('RAY_ADDRESS'))"]
    with Run(command, tmp_path / "log", {"EXTRA": "1"}) as run:
        run.require_success(run.wait(30))
    assert (tmp_path / "log").read_text() == "None\n"


def test_an_unknown_failpoint_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="failpoint 'comit' is unknown; there are plan_written"):
        run(["--points", "commit_after,comit"])
