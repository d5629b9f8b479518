"""Predicates over stored columns, as users write them: `price < 20 and lang = 'de'`.

They come from strangers: DuckDB evaluates them without access to files, network, extensions or settings.
"""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.errors import DataError
from slq.index.items import ROW

_KEPT = 32  # predicates whose rows are kept; a version never changes
_PATIENCE_S = 10.0  # a predicate may well be a program that never ends
MAX_LENGTH = 4096
"""Characters of a predicate."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that may be found.

    Attributes:
        rows: (selected,) int64 row numbers, ascending.
        bits: The same as one bit per row of the segment, lowest first.
    """

    rows: NDArray[np.int64]
    bits: NDArray[np.uint8]

    @classmethod
    def of(cls, rows: NDArray[np.int64], count: int) -> "Selection":
        """These rows of `count`."""
        mask = np.zeros(count, dtype=bool)
        mask[rows] = True
        return cls(np.flatnonzero(mask), np.packbits(mask, bitorder="little"))

    def __len__(self) -> int:
        return len(self.rows)


class Filters:
    """Rows of a segment by predicate.

    Args:
        table: The stored columns and `row`.
        deleted: (deleted,) int64 rows that are found no more.
    """

    def __init__(self, table: pa.Table, deleted: NDArray[np.int64]) -> None:
        self._table = table
        self._deleted = deleted
        self._found: OrderedDict[str, Selection] = OrderedDict()
        self._alive: Selection | None = None
        if len(deleted):
            rows = np.setdiff1d(np.arange(table.num_rows, dtype=np.int64), deleted)
            self._alive = Selection.of(rows, table.num_rows)

    def select(self, where: str | None) -> Selection | None:
        """Rows that a predicate holds for, without deleted ones; None for all.

        Raises:
            DataError: It is no predicate over these columns.
        """
        if where is None:
            return self._alive
        found = self._found.pop(where, None)
        if found is None:
            rows = np.setdiff1d(matching_rows(self._table, where), self._deleted)
            found = Selection.of(rows, self._table.num_rows)
        # As the one used last. Threads may come between, and then work it out twice.
        self._found[where] = found
        while len(self._found) > _KEPT:
            self._found.popitem(last=False)
        return found


def matching_rows(table: pa.Table, where: str) -> NDArray[np.int64]:
    """Row numbers that a predicate holds for.

    Raises:
        DataError: It is no predicate over these columns.
    """
    import duckdb

    if len(where) > MAX_LENGTH:
        raise DataError(f"the filter has {len(where)} characters; {MAX_LENGTH} are allowed")
    settings: dict[str, Any] = {
        "enable_external_access": False,
        "autoload_known_extensions": False,
        "autoinstall_known_extensions": False,
        "lock_configuration": True,
        "python_enable_replacements": False,  # or names would reach Python's variables
    }
    with duckdb.connect(config=settings) as connection:
        connection.register("items", table)
        ending = threading.Timer(_PATIENCE_S, connection.interrupt)
        ending.start()
        try:
            (statement,) = connection.extract_statements(f"SELECT {ROW} FROM items WHERE ({where})")
            found = connection.execute(statement).fetchnumpy()[ROW]
        except duckdb.InterruptException:
            raise DataError(
                f"the filter {where!r} took longer than {_PATIENCE_S:g} s; ask for less"
            ) from None
        except (duckdb.Error, ValueError) as error:
            names = ", ".join(name for name in table.column_names if name != ROW)
            reason = re.split(r"\n|LINE \d+:", str(error))[0].strip()
            raise DataError(
                f"the filter {where!r} cannot be used: {reason}; columns are {names}"
            ) from None
        finally:
            ending.cancel()
    return np.asarray(found, dtype=np.int64)
