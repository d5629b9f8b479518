"""Rows as engines take them that keep JSON beside a vector, and what all engines check of vectors."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from slq.engines.base import Collection
from slq.engines.predicates import Kind, iso
from slq.errors import DataError
from slq.index.parts import EMBEDDING, matrix
from slq.index.vectors import require_directions

log = logging.getLogger(__name__)
_DIGEST_BYTES = 16
_KINDS: tuple[tuple[Callable[[pa.DataType], bool], Kind], ...] = (
    (lambda one: pa.types.is_string(one) or pa.types.is_large_string(one), "text"),
    (lambda one: pa.types.is_integer(one) or pa.types.is_floating(one), "number"),
    (pa.types.is_decimal, "number"),
    (pa.types.is_boolean, "flag"),
    (pa.types.is_date, "date"),
    (pa.types.is_timestamp, "time"),
)


def kinds(schema: pa.Schema) -> dict[str, Kind]:
    """Kind of each column but the vectors'."""
    return {one.name: _kind(one.type) for one in schema if one.name != EMBEDDING}


def _kind(given: pa.DataType) -> Kind:
    if pa.types.is_dictionary(given):
        return _kind(given.value_type)
    return next((kind for belongs, kind in _KINDS if belongs(given)), "other")


def json_kinds(schema: pa.Schema, engine: str) -> dict[str, Kind]:
    """The same without columns of bytes, which are left out with a warning.

    Args:
        schema: Of the rows.
        engine: Which one keeps JSON, for people.
    """
    left_out = [one.name for one in schema if _is_binary(one.type)]
    if left_out:
        log.warning("columns of bytes are left out, %s keeps none: %s", engine, ", ".join(left_out))
    return {name: kind for name, kind in kinds(schema).items() if name not in left_out}


def _is_binary(given: pa.DataType) -> bool:
    return any(
        is_kind(given)
        for is_kind in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
            pa.types.is_binary_view,
        )
    )


def json_rows(table: pa.Table, columns: dict[str, Kind]) -> list[dict[str, Any]]:
    """Rows without vectors: numbers and texts; dates and times in ISO 8601, what is not a number null."""
    return [
        {name: _plain(row[name], kind) for name, kind in columns.items()}
        for row in table.select(list(columns)).to_pylist()
    ]


def _plain(value: Any, kind: Kind) -> Any:
    if value is None or kind in ("text", "flag"):
        return value
    if kind == "number":
        number = value if isinstance(value, int) else float(value)
        return number if math.isfinite(number) else None
    return iso(kind, value) if kind in ("date", "time") else value


def checked_vectors(table: pa.Table, collection: Collection, first_row: int) -> NDArray[np.float16]:
    """(rows, dimension) float16 vectors of rows.

    Args:
        table: Rows.
        collection: That they belong to.
        first_row: What errors call the first one.

    Raises:
        DataError: One has another length, is not finite or is zero.
    """
    vectors = matrix(table[EMBEDDING])
    if vectors.shape[1] != collection.dimension:
        raise DataError(
            f"vectors of {vectors.shape[1]} values do not fit to {collection.dimension}"
        )
    require_directions(vectors, first_row)
    return vectors


class SeenIds:
    """Tells whether ids come twice, by 128 bits of each: 16 bytes of memory a row, and no two of 10^12 ids alike."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, ids: Iterable[str]) -> None:
        """Note some more."""
        for one in ids:
            self._digests += hashlib.blake2b(one.encode(), digest_size=_DIGEST_BYTES).digest()

    def require_unique(self, place: object) -> None:
        """Raise where some came twice.

        Raises:
            DataError: They did.
        """
        if not self._digests:
            return
        digests = np.frombuffer(self._digests, "<u8").reshape(-1, 2)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        num_again = int((ordered[1:] == ordered[:-1]).all(axis=1).sum())
        if num_again:
            raise twice(place, len(digests) - num_again, len(digests))


def twice(place: object, num_different: int, num_rows: int) -> DataError:
    """What is said where ids come twice."""
    return DataError(
        f"{place} takes {num_different} of {num_rows} rows: some ids come twice; `slq verify` names them"
    )


def require_all(count: int, collection: Collection) -> None:
    """Check that nothing is missing.

    Raises:
        DataError: Rows are.
    """
    if count != collection.num_rows:
        raise DataError(f"{count} rows came instead of {collection.num_rows}")
