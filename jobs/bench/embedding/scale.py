"""Time per row and peak memory of all processes, from few rows to many, with models that cost nothing."""

import shutil
import statistics
from pathlib import Path
from typing import Any

from jobs.bench.embedding.inputs import recipe_for, write_texts
from jobs.bench.embedding.memory import PeakMemory
from pipelines.commits import record_name
from pipelines.embed import embed
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from pipelines.runtime import connect

STAND_IN = "jobs.bench.embedding.stand_in"
_SHARD_ROWS, _PIECE_ROWS = 200, 100
"""Small, as the driver's work grows with shards: a million rows are as many as 1.3 * 10^9 of the default size."""
_LEFT_OUT = 5  # a fifth of the shards at either end


def measure_scale(folder: Path, sizes: list[int], *, repeats: int) -> dict[str, Any]:
    """For each number of rows: microseconds per row while the flow is full, and peak MiB.

    Small runs are repeated, and their median counts; one of a million rows is its own average. `time_per_row` and
    `peak_memory` are the largest value over the smallest.
    """
    rows: dict[str, dict[str, Any]] = {}
    for size in sizes:
        runs = [_measured(folder, size) for _ in range(repeats if size <= 100_000 else 1)]
        rows[str(size)] = {
            "us_per_row": round(statistics.median(run["us_per_row"] for run in runs), 2),
            "peak_mib": round(statistics.median(run["peak_mib"] for run in runs), 1),
            "us_per_row_of_runs": [round(run["us_per_row"], 2) for run in runs],
            "peak_mib_of_runs": [round(run["peak_mib"], 1) for run in runs],
        }
    times = [row["us_per_row"] for row in rows.values()]
    peaks = [row["peak_mib"] for row in rows.values()]
    return {
        "time_per_row": round(max(times) / min(times), 3),
        "peak_memory": round(max(peaks) / min(peaks), 3),
        "rows": rows,
    }


def _measured(folder: Path, size: int) -> dict[str, float]:
    recipe = recipe_for(
        folder,
        write_texts(folder, size),
        f"scale-{size}",
        shard_rows=_SHARD_ROWS,
        piece_rows=_PIECE_ROWS,
    )
    shutil.rmtree(recipe.storage.embeddings, ignore_errors=True)
    with PeakMemory() as memory, connect(recipe.resources):
        embed(recipe, models=STAND_IN)
    us_per_row = 1e6 * s_per_row(recipe)
    shutil.rmtree(recipe.storage.embeddings)
    return {"us_per_row": us_per_row, "peak_mib": memory.peak_bytes / 2**20}


def s_per_row(recipe: Recipe) -> float:
    """Seconds per row of a run between the commits that end the first fifth of its shards and the fourth.

    At the first commit the pipeline holds shards that are nearly done, and after it a run of few shards would look
    faster than one of many; in between as many enter it as leave it.
    """
    commits = Ledger(recipe.storage.embeddings).commits()
    folder = Path(recipe.storage.embeddings)
    made = sorted(
        ((folder / record_name(n)).stat().st_mtime, one.rows) for n, one in commits.items()
    )
    edge = len(made) // _LEFT_OUT
    middle = made[edge : len(made) - edge]
    return (middle[-1][0] - middle[0][0]) / sum(rows for _, rows in middle[1:])
