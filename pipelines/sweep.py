"""`slq sweep`: what dimension, precision, index and re-ranking depth cost, and what they find.

Gallery and queries are embedded once, every cell is searched once, every pair is scored once. What is finished stays in
`sweep/` of the run folder, and is not done again while what it depends on is the same.
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark, load_benchmark
from pipelines.corpus import corpus_of, summarise
from pipelines.kept_parts import content_digest
from pipelines.ranking import subsets
from pipelines.recipe import Recipe
from pipelines.sweeping.admission import (
    require_plain_margins,
    require_whole_rankings,
    require_whole_tables,
)
from pipelines.sweeping.cells import Cells, Searched
from pipelines.sweeping.fine import FineStage
from pipelines.sweeping.vectors import committed, encoded_part, vectors_of
from pipelines.tasks import Countdown, collect, model_task, parts
from slq.artifacts import load_adapter_config
from slq.errors import StorageError
from slq.files import write_json
from slq.schema import Item
from slq.sweeps import cells_of, front, quality_of, ranked_again, require_buildable
from slq.sweeps.config import RECALL_AT
from slq.sweeps.quality import kept_of

log = logging.getLogger(__name__)
RESULT = "sweep.json"
_MOST_PARTS, _PART_ITEMS = 64, 128  # that are embedded by a task
FORMULA = "price per hour * (embed_ms + search_ms + fine_ms) / 3.6: one query after the other"
"""Of `cost_per_million`: a million queries of so many milliseconds take ms / 3.6 hours."""
QUALITY = "hit@1"
"""What the Pareto fronts are of."""


def sweep(recipe: Recipe, *, price: float) -> dict[str, Any]:
    """Measure every cell at every depth; run it again to finish what is missing.

    Args:
        recipe: The resolved recipe.
        price: Of one machine for one hour.

    Returns:
        What `sweep.json` holds.

    Raises:
        ArtifactError: There is no adapter, or the data set is damaged.
        ArtifactMismatchError: The data set is of another embedding space.
        ConfigError: A cell cannot be built; it is named before any work is done. Or queries do not rank everything, or
            have several wordings.
        DataError: Gallery, queries and data set do not fit together.
        StorageError: The run folder cannot be written.
    """
    require_plain_margins(recipe)
    dimension = dimension_of(recipe)
    cells = cells_of(recipe.sweep, dimension)
    require_buildable(cells, recipe.sweep, recipe.index.own, dimension=dimension, count=None)
    benchmark = load_benchmark(recipe)
    require_whole_rankings(benchmark)
    count = len(benchmark.items)
    require_buildable(cells, recipe.sweep, recipe.index.own, dimension=dimension, count=count)
    try:
        return _measured(recipe, benchmark, price)
    except OSError as error:
        raise StorageError(
            f"{recipe.storage.sweep} cannot be written: {error}; free space or choose another storage.dir"
        ) from None


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a dry run shows: the cells by name, and how many rows the table will have.

    Raises:
        ArtifactError: There is no adapter.
        ArtifactMismatchError: The data set is of another embedding space.
        ConfigError: A cell cannot be built, or the tables that are there say that queries do not rank everything, or
            have several wordings.
    """
    require_plain_margins(recipe)
    require_whole_tables(recipe)
    dimension = dimension_of(recipe)
    cells = cells_of(recipe.sweep, dimension)
    count = _count(recipe)
    require_buildable(cells, recipe.sweep, recipe.index.own, dimension=dimension, count=count)
    depths = list(recipe.sweep.depths)
    names = [cell.name for cell in cells]
    return {"cells": names, "depths": depths, "rows": len(cells) * len(depths), "items": count}


def dimension_of(recipe: Recipe) -> int:
    """Of the vectors that there are: of the data set, or of the adapter where there is none; errors as `sweep`."""
    found = committed(recipe)
    if found is not None:
        return found.dimension
    return int(load_adapter_config(recipe.storage.adapter).hidden_size)


def _count(recipe: Recipe) -> int | None:
    """Items of the gallery, without reading any; None where nobody knows before."""
    data = recipe.data
    if data.scenes is not None and not data.path("corpus").exists():
        return data.scenes.test + data.scenes.unseen
    if not data.path("corpus").exists() and "://" not in data.corpus:
        return None
    return summarise(corpus_of(recipe).shards(recipe.embed.shard_rows)).num_rows


def _measured(recipe: Recipe, benchmark: Benchmark, price: float) -> dict[str, Any]:
    found = committed(recipe)

    def encode(items: Sequence[Item], what: str) -> NDArray[np.float32]:
        task = model_task(encoded_part, recipe.resources.gpus_per_worker)
        recipe_json, everything = recipe.model_dump_json(), list(items)
        number = min(_MOST_PARTS, -(-len(everything) // _PART_ITEMS))
        tasks = [
            task.remote(recipe_json, everything[part]) for part in parts(len(everything), number)
        ]
        return np.concatenate(collect(tasks, f"sweep embedded {what}, part"))

    vectors = vectors_of(recipe, benchmark, found, encode)
    run: list[str] = []
    cells = Cells(recipe, vectors, lambda cell: run.append(cell.name))
    wanted = cells_of(recipe.sweep, vectors.dimension)
    missing = [cell for cell in wanted if cells.finished(cell) is None]
    countdown = Countdown("sweep cell", len(missing))
    searched = []
    for cell in wanted:
        searched.append(cells.searched(cell))
        if cell in missing:
            countdown.ended()
    log.info("%d cells searched, %d were finished before", len(run), len(wanted) - len(run))
    exact = cells.exact.search(vectors.queries, min(RECALL_AT, len(vectors.gallery)))[1]
    fine = FineStage(recipe, benchmark, content_digest(benchmark.items, benchmark.queries))
    rows = _rows(recipe, benchmark, searched, exact, fine)
    result = {
        "adapter": load_adapter_config(recipe.storage.adapter).fingerprint,
        "vectors": {"gallery": vectors.origin, "encoded_now": vectors.encoded},
        "num_items": len(benchmark.items),
        "num_queries": len(benchmark.queries),
        "searched_now": run,
        "scored_now": fine.scored,
        "search_threads": recipe.sweep.num_threads,
        "model_threads": recipe.eval.num_threads,
        "price_per_hour": price,
        "formula": FORMULA,
        "cells": priced(rows, price),
    }
    write(recipe, result)
    return result


def _rows(
    recipe: Recipe,
    benchmark: Benchmark,
    searched: Sequence[Searched],
    exact: NDArray[np.int64],
    fine: FineStage,
) -> list[dict[str, Any]]:
    """A row per cell and depth."""
    pessimistic = [one.found.pessimistic(benchmark.relevant) for one in searched]
    depths = recipe.sweep.depths
    readings = fine.read([found for found, _ in pessimistic], max(depths))
    times = fine.times(pessimistic[0][0], depths)
    kinds = subsets(benchmark)
    rows = []
    for one, (found, right) in zip(searched, pessimistic, strict=True):
        kept = kept_of(one.found, exact)
        for depth in depths:
            again = ranked_again(found, right, readings, depth)
            rows.append(
                {
                    "name": one.cell.name + (f", {depth} re-ranked" if depth else ""),
                    "dimension": one.cell.dimension,
                    "precision": one.cell.precision,
                    "index": one.cell.index,
                    "depth": depth,
                    **quality_of(again, kept),
                    **one.facts,
                    "fine_ms": times["fine_ms"][str(depth)],
                    "embed_ms": times["embed_ms"],
                    "kinds": {name: quality_of(again, kept, mask) for name, mask in kinds.items()},
                }
            )
    return rows


def priced(rows: Sequence[Mapping[str, Any]], price: float) -> list[dict[str, Any]]:
    """Rows with what a query takes, what a million of them cost, and whether another row beats them.

    Times that agree in two digits count as equal there.

    Args:
        rows: With `embed_ms`, `search_ms`, `fine_ms`, `bytes_per_vector` and `hit@1`.
        price: Of one machine for one hour.
    """
    totals = [row["embed_ms"] + row["search_ms"] + row["fine_ms"] for row in rows]
    values = [row[QUALITY] for row in rows]
    fast = front([float(f"{total:.2g}") for total in totals], values)  # noise puts none on a front
    small = front([row["bytes_per_vector"] for row in rows], values)
    return [
        {
            **row,
            "ms": total,
            "cost_per_million": price * total / 3.6,
            "on_latency_front": is_fast,
            "on_bytes_front": is_small,
        }
        for row, total, is_fast, is_small in zip(rows, totals, fast, small, strict=True)
    ]


def write(recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Write `sweep.json`, `sweep.parquet` and `sweep.csv`.

    Raises:
        StorageError: They cannot be written.
    """
    folder = recipe.storage.sweep
    folder.mkdir(parents=True, exist_ok=True)
    rows = [flattened(row) for row in result["cells"]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sweep.parquet")
    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "sweep.csv").write_text(text.getvalue(), encoding="utf-8")
    write_json(folder / RESULT, result)


def flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in plain columns: the ends of an interval as `_low` and `_high`, a kind's value as `kind/value`."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name == "kinds":
            for kind, report in value.items():
                flat |= {f"{kind}/{key}": one for key, one in flattened(report).items()}
        elif name.endswith("_interval"):
            flat |= {f"{name[:-9]}_low": value[0], f"{name[:-9]}_high": value[1]}
        else:
            flat[name] = value
    return flat
