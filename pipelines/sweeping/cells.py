"""The coarse stage of each cell: built, searched by all queries, and timed beside exact search; kept once finished."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.recipe import Recipe
from pipelines.sweeping.vectors import Vectors
from slq.arrow import vector_column
from slq.errors import StorageError
from slq.index.codes import threads
from slq.sweeps import Cell, CellIndex, Found, SweepConfig
from slq.sweeps.config import FLAT, KS, RECALL_AT

_CELLS = "cells"
_FACTS = b"slq_sweep"
_SCORES, _ROWS = "scores", "rows"
_FORMAT = 1  # raise it when a cell's search changes what it finds


@dataclass(frozen=True)
class Searched:
    """A cell that was searched.

    Attributes:
        cell: Which.
        found: What it found of each query.
        facts: Plain data: `bytes_per_vector`, `index_bytes`, `rescored_bytes`, `search_ms`, `exact_ms`, `build_s`.
    """

    cell: Cell
    found: Found
    facts: dict[str, Any]


class Cells:
    """Cells of one sweep over the same vectors.

    Args:
        recipe: The resolved recipe.
        vectors: What is searched, and what asks.
        searched: Is told of each cell that was run, and not taken from before.
    """

    def __init__(
        self, recipe: Recipe, vectors: Vectors, searched: Callable[[Cell], None] = lambda _: None
    ) -> None:
        self._recipe, self._vectors, self._told = recipe, vectors, searched
        self._exact: CellIndex | None = None

    @property
    def places(self) -> int:
        """Results that a query asks for: one more than anything looks at, which tells whether ties go on."""
        wanted = max(*self._recipe.sweep.depths, *KS, RECALL_AT) + 1
        return min(wanted, len(self._vectors.gallery))

    def path(self, cell: Cell) -> Path:
        """Where a finished cell is kept."""
        return self._recipe.storage.sweep / _CELLS / f"{cell.name.replace(' ', '-')}.parquet"

    def finished(self, cell: Cell) -> Searched | None:
        """What an earlier run found with the same settings and vectors; None where that has to be done."""
        try:
            table = pq.read_table(self.path(cell))
        except (OSError, pa.ArrowException):
            return None  # what is damaged is made again
        facts = json.loads((table.schema.metadata or {}).get(_FACTS, b"{}"))
        if facts.pop("digest", None) != self._digest(cell):
            return None
        scores, rows = (_matrix(table[name]) for name in (_SCORES, _ROWS))
        return Searched(cell, Found(scores, rows, len(self._vectors.gallery)), facts)

    def searched(self, cell: Cell) -> Searched:
        """Search a cell, unless that was done.

        Raises:
            ConfigError: It cannot be built.
            StorageError: It cannot be kept.
        """
        before = self.finished(cell)
        if before is not None:
            return before
        began = time.perf_counter()
        index = CellIndex(cell, self._vectors.gallery, self._recipe.index.own)
        facts: dict[str, Any] = {"build_s": time.perf_counter() - began}
        for name in ("bytes_per_vector", "index_bytes", "rescored_bytes"):
            facts[name] = getattr(index, name)
        with threads(self._recipe.sweep.num_threads):
            scores, rows = index.search(self._vectors.queries, self.places)
            facts |= timed_beside(
                {"search_ms": index, "exact_ms": self.exact},
                self._vectors.queries,
                self._recipe.sweep,
                self.places,
            )
        self._told(cell)
        return self._kept(cell, Found(scores, rows, len(self._vectors.gallery)), facts)

    @property
    def exact(self) -> CellIndex:
        """Comparison with every whole vector in float32, which recall and times are measured against."""
        if self._exact is None:
            whole = Cell(self._vectors.dimension, "float32", FLAT)
            self._exact = CellIndex(whole, self._vectors.gallery, self._recipe.index.own)
        return self._exact

    def _digest(self, cell: Cell) -> str:
        """What a finished cell depends on."""
        sweep = self._recipe.sweep
        timing = [sweep.num_threads, sweep.timed_queries, sweep.rounds]
        config = cell.config(self._recipe.index.own).recorded() if cell.index != FLAT else None
        told = [_FORMAT, cell.name, config, self._vectors.sha256, self.places, timing]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _kept(self, cell: Cell, found: Found, facts: dict[str, Any]) -> Searched:
        path = self.path(cell)
        told = json.dumps({**facts, "digest": self._digest(cell)})
        table = pa.table({_SCORES: vector_column(found.scores), _ROWS: vector_column(found.rows)})
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.replace_schema_metadata({_FACTS: told.encode()}), partial)
            partial.replace(path)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error}; free space or choose another storage.dir"
            ) from None
        return Searched(cell, found, facts)


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    joined = column.combine_chunks()
    flat: NDArray[Any] = joined.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, joined.type.list_size)


def timed_beside(
    sides: dict[str, CellIndex], queries: NDArray[np.float32], sweep: SweepConfig, top_k: int
) -> dict[str, float]:
    """Median milliseconds of one query alone, of each side, in turns query by query, after a round that does not count.

    Noise of the machine then falls on all sides alike, and their ratio holds where milliseconds do not.
    """
    chosen = spread(len(queries), sweep.timed_queries)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + sweep.rounds):
        for query in queries[chosen][:, None]:
            for name, index in sides.items():
                began = time.perf_counter()
                index.search(query, top_k)
                if number:
                    times[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, evenly spread."""
    return sorted({int(n) for n in np.linspace(0, count - 1, min(count, most))})
