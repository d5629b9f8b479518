"""Many images at once are what each is alone, and a table is read as little as can be."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.fetching import fetch_image, fetch_images
from pipelines.images import bytes_uri, record_uri, row_uri
from slq.errors import DataError, StorageError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """60 rows in groups of 20; row 7 has no image, and another column names images of its own."""
    rows = [{"image": b"image %d" % n, "photo": b"photo %d" % n} for n in range(60)]
    rows[7]["image"] = None  # type: ignore[assignment]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    return tmp_path / "a.parquet"


def alone(uri: str) -> bytes | str | None:
    try:
        return fetch_image(uri)
    except DataError as error:
        return str(error)


def test_images_of_every_place_are_those_that_each_gives_alone(table: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"a file")
    (tmp_path / "y.tar").write_bytes(b"0123456789")
    uris = [row_uri(str(table), n) for n in (59, 3, 40, 7, 21, 0, 60)]
    uris += [row_uri(str(table), n, "photo") for n in (3, 58)]
    uris += [row_uri(str(table), 2, "nothing")]
    uris += [str(tmp_path / "x.png"), str(tmp_path / "gone.png")]
    uris += [bytes_uri(str(tmp_path / "y.tar"), 2, 5), bytes_uri(str(tmp_path / "y.tar"), 8, 15)]
    uris += [record_uri(str(tmp_path / "z.jsonl"), 4)]
    found = fetch_images(uris)
    assert found.keys() == set(uris)
    shown = {uri: str(one) if isinstance(one, DataError) else one for uri, one in found.items()}
    assert shown == {uri: alone(uri) for uri in uris}
    assert found[uris[0]] == b"image 59"


def test_a_file_of_many_images_that_cannot_be_read_is_no_images_fault(
    table: Path, tmp_path: Path
) -> None:
    """It may be there again in a moment, so that nothing of it may be set aside."""
    good = row_uri(str(table), 3)
    for uri in (
        row_uri(str(tmp_path / "gone.parquet"), 1),
        bytes_uri(str(tmp_path / "g.tar"), 0, 5),
    ):
        with pytest.raises(StorageError, match=r"(gone.parquet|g.tar).*run the same command again"):
            fetch_images([good, uri])
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"a.parquet cannot be read"):
        fetch_images([good])


def test_a_table_is_walked_through_once_and_groups_without_a_wanted_row_are_not_read(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    inner = pq.ParquetFile.iter_batches

    def noting(file: Any, *args: Any, row_groups: list[int], **options: Any) -> Any:
        for batch in inner(file, *args, row_groups=row_groups, **options):
            read.append(row_groups[0])
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)
    found = fetch_images([row_uri(str(table), n) for n in (41, 1, 2, 19, 42)])
    assert len(found) == 5
    assert read == [0, 0, 2]  # 16 rows at a time: rows 0-15, 16-19, and 40-55
