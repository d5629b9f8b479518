"""Time per row and peak memory of all processes, from few rows to many, with models that cost nothing."""

import shutil
import statistics
from pathlib import Path
from typing import Any

from jobs.bench.embedding.costs import Costs
from jobs.bench.embedding.inputs import recipe_for, write_texts
from pipelines.commits import record_name
from pipelines.embed import embed
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from pipelines.runtime import connect

STAND_IN = "jobs.bench.embedding.stand_in"
_SHARD_ROWS, _PIECE_ROWS = 200, 100
"""Small, as the driver's work grows with shards: a million rows are as many as 1.3 * 10^9 of the default size."""
_LEFT_OUT = 5  # a fifth of the shards at either end
_REPEATED_ROWS = 100_000
_MEASURES = {
    "us_per_row": "time_per_row",
    "cpu_us_per_row": "cpu_per_row",
    "peak_mib": "peak_memory",
}


def measure_scale(folder: Path, sizes: list[int], *, repeats: int) -> dict[str, Any]:
    """For each number of rows: microseconds per row while the flow is full, by the clock and of processors; peak MiB.

    Runs of up to 100,000 rows are repeated in turn, and their medians count; one of a million is its own average.
    `time_per_row`, `cpu_per_row` and `peak_memory` are the largest value over the smallest.
    """
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for n in range(repeats):
        for size in sizes:
            if n == 0 or size <= _REPEATED_ROWS:
                runs[size].append(_measured(folder, size))
    medians = {
        str(size): {
            name: round(statistics.median(run[name] for run in found), 2) for name in _MEASURES
        }
        for size, found in runs.items()
    }
    spread = {}
    for measure, name in _MEASURES.items():
        values = [row[measure] for row in medians.values()]
        spread[name] = round(max(values) / min(values), 3)
    rounded = {
        str(size): [{name: round(run[name], 2) for name in _MEASURES} for run in found]
        for size, found in runs.items()
    }
    return {**spread, "rows": medians, "runs": rounded}


def _measured(folder: Path, size: int) -> dict[str, float]:
    recipe = recipe_for(
        folder,
        write_texts(folder, size),
        f"scale-{size}",
        shard_rows=_SHARD_ROWS,
        piece_rows=_PIECE_ROWS,
    )
    shutil.rmtree(recipe.storage.embeddings, ignore_errors=True)
    with Costs() as costs, connect(recipe.resources):
        embed(recipe, models=STAND_IN)
    start, end, rows = middle_of(recipe)
    shutil.rmtree(recipe.storage.embeddings)
    return {
        "us_per_row": 1e6 * (end - start) / rows,
        "cpu_us_per_row": 1e6 * costs.cpu_s(start, end) / rows,
        "peak_mib": costs.peak_bytes / 2**20,
    }


def middle_of(recipe: Recipe) -> tuple[float, float, int]:
    """When a run had committed the first fifth of its shards, when the fourth, and the rows in between.

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
    return middle[0][0], middle[-1][0], sum(rows for _, rows in middle[1:])
