"""Mined negatives in the numbering of a run: what is absent, foreign or broken stands for nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.negatives import MinedNegatives, read_negatives
from slq.errors import ConfigError, DataError

IDS = ["a", "b", "c", "d"]
KEYS = ["1", "1", "2", "3"]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "negatives": ["b", "c", "gone", "d"], "margins": [2.0, 9.0, 1.0, 8.0, -1.0]},
    {"id": "elsewhere", "negatives": ["a"], "margins": [0.0, 1.0]},
    {"id": "d", "negatives": ["c"], "margins": [3.0, 0.5]},
    {"id": "c", "negatives": [], "margins": [1.5]},
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("negatives", pa.list_(pa.string())),
            ("margins", pa.list_(pa.float32())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def read(path: Path, most: int = 2, *, teacher: bool = False) -> MinedNegatives:
    return read_negatives(path, IDS, KEYS, most, teacher=teacher)


def test_ids_become_pairs_and_an_own_or_unknown_image_is_left_out(tmp_path: Path) -> None:
    found = read(written(tmp_path / "n.parquet", ROWS), teacher=True)
    assert found.pairs.tolist() == [[2, 3], [-1, -1], [-1, -1], [2, -1]]
    assert found.margins is not None
    np.testing.assert_array_equal(
        found.margins,
        np.array(
            [[2, 1, -1], [np.nan] * 3, [1.5, np.nan, np.nan], [3, 0.5, np.nan]], dtype=np.float32
        ),
    )
    assert read(tmp_path / "n.parquet", 1).pairs.tolist() == [[2], [-1], [-1], [2]]
    assert read(tmp_path / "n.parquet").margins is None


def test_where_one_is_absent_or_broken_the_own_pair_stands_in(tmp_path: Path) -> None:
    found = read(written(tmp_path / "n.parquet", ROWS), teacher=True)
    pairs, present = found.of([3, 0, 1], {2})
    assert pairs.tolist() == [[3, 3], [0, 3], [1, 1]]
    assert present.tolist() == [[False, False], [False, True], [False, False]]
    margins = found.margins_of([1, 3])
    assert margins is not None
    assert margins.tolist() == [[0, 0, 0], [3, 0.5, 0]]
    assert found.of([], set())[0].shape == (0, 2)


def test_a_missing_file_or_missing_margins_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n\.parquet does not exist; run `slq mine` first"):
        read(tmp_path / "n.parquet")
    unscored = written(tmp_path / "n.parquet", [{**ROWS[0], "margins": None}])
    assert read(unscored).pairs[0].tolist() == [2, 3]
    with pytest.raises(ConfigError, match=r"has none; run `slq mine` with --set mine.margins=true"):
        read(unscored, teacher=True)


def test_another_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of this run's pairs"):
        read(written(tmp_path / "n.parquet", ROWS[1:2]))
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["t"]}), other)
    with pytest.raises(DataError, match="cannot be read as mined negatives"):
        read(other)
    other.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as mined negatives"):
        read(other)
