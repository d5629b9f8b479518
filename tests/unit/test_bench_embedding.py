"""What the embedding benchmarks compute from a run's files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.bench.embedding.costs import Costs, tree_bytes
from jobs.bench.embedding.inputs import recipe_for, write_texts
from jobs.bench.embedding.scale import middle_of
from pipelines.commits import Commit, record_name


def test_the_peak_of_memory_is_that_of_all_processes() -> None:
    holding = "import time; data = b'x' * 2**27; print('ready', flush=True); time.sleep(60)"
    with Costs() as memory:
        before = tree_bytes()
        child = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        grown = tree_bytes() - before
        time.sleep(1.2)  # two samples
        child.kill()
        child.communicate()
    assert 2**27 <= grown < 2**27 + 2**25
    assert memory.peak_bytes >= before + 2**27


def test_processor_time_is_that_of_all_processes_even_of_those_that_ended() -> None:
    working = "import time; end = time.process_time() + 1.5\nwhile time.process_time() < end: pass"
    with Costs() as costs:
        time.sleep(1.2)  # two samples
        start = time.time()
        subprocess.run([sys.executable, "-c", working + "\ntime.sleep(1.2)"], check=True)
        end = time.time()
        time.sleep(1.2)  # two samples
    assert 1.2 < costs.cpu_s(start, end) < 3.0
    assert costs.cpu_s(end, end) == 0.0


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([(0, 500, 110.0), (1, 900, 100.0), (2, 300, 104.0)], (100.0, 110.0, 500 + 300)),
        (
            [(0, 7, 10.0), (1, 20, 60.0), (2, 30, 50.0), (3, 40, 70.0), (4, 9, 1000.0)],
            (50.0, 70.0, 20 + 40),  # the first to be committed and the last are left out
        ),
    ],
)
def test_time_per_row_counts_the_middle_of_a_run_in_the_order_of_commits(
    tmp_path: Path, made: list[tuple[int, int, float]], expected: tuple[float, float, int]
) -> None:
    recipe = recipe_for(tmp_path, write_texts(tmp_path, 3), "run")
    folder = Path(recipe.storage.embeddings)
    (folder / "commits").mkdir(parents=True)
    for shard_id, rows, at_s in made:
        commit = Commit(shard_id, rows, 0, sha256="0" * 64, bytes=1, attempt="a")
        path = folder / record_name(shard_id)
        path.write_text(commit.to_json())
        os.utime(path, (at_s, at_s))
    assert middle_of(recipe) == expected
