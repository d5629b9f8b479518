"""Corpora: a Parquet file or a folder of images, cut into shards by a deterministic plan, read shard by shard."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slq.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: rows `start` to `stop` - 1 of a source."""

    shard_id: int
    source: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows that the shard should hold, quarantined ones included."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Record:
    """One raw item as read, before decoding; `problem` says why its image could not be read."""

    id: str
    uri: str
    image: bytes | None
    text: str | None
    columns: dict[str, Any]
    problem: str | None = None


def plan_shards(corpus: Path, shard_rows: int) -> list[ShardPlan]:
    """Cut a corpus into shards; the same corpus always gives the same plan.

    Raises:
        ConfigError: `corpus` is neither a Parquet file nor a folder with images.
        DataError: The Parquet file has no usable columns, or it is empty.
    """
    count = _count(corpus)
    if count == 0:
        raise DataError(f"corpus {corpus} is empty")
    return [
        ShardPlan(number, str(corpus), start, min(start + shard_rows, count))
        for number, start in enumerate(range(0, count, shard_rows))
    ]


def _count(corpus: Path) -> int:
    if corpus.is_dir():
        files = image_files(corpus)
        if not files:
            raise ConfigError(f"folder {corpus} holds no images ({', '.join(SUFFIXES)})")
        return len(files)
    if corpus.suffix != ".parquet":
        raise ConfigError(f"corpus {corpus} is neither a folder of images nor a .parquet file")
    try:
        file = pq.ParquetFile(corpus)
    except (OSError, ValueError) as error:
        raise DataError(f"corpus {corpus} cannot be read: {error}") from None
    names = set(file.schema_arrow.names)
    if "id" not in names or not names & {"image", "text", "uri"}:
        raise DataError(
            f"corpus {corpus} needs a column `id` and one of `image`, `text`, `uri`; it has {sorted(names)}"
        )
    return int(file.metadata.num_rows)


def user_schema(corpus: Path) -> pa.Schema:
    """Names and types of the columns that are the user's own."""
    if corpus.is_dir():
        return pa.schema([])
    own = {"id", "image", "text", "uri"}
    return pa.schema([field for field in pq.read_schema(corpus) if field.name not in own])


def image_files(folder: Path) -> list[Path]:
    """Images below a folder, in a stable order."""
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir()
    )


def corpus_digest(corpus: Path) -> str:
    """Names the corpus's content: relative paths and sizes of a folder, or the Parquet file's sha256."""
    digest = hashlib.sha256()
    if corpus.is_dir():
        for path in image_files(corpus):
            digest.update(f"{path.relative_to(corpus)}:{path.lstat().st_size}\n".encode())
    else:
        with corpus.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_shard(plan: ShardPlan) -> list[Record]:
    """The raw records of one shard, in order."""
    source = Path(plan.source)
    if source.is_dir():
        return [_file_record(path, source) for path in image_files(source)[plan.start : plan.stop]]
    records: list[Record] = []
    position = 0
    file = pq.ParquetFile(source)
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        first, last = max(plan.start - position, 0), min(plan.stop - position, rows)
        if first < last:
            table = file.read_row_group(group).slice(first, last - first)
            offset = position + first
            records += [
                _row_record(row, source, offset + n) for n, row in enumerate(table.to_pylist())
            ]
        position += rows
    return records


def _file_record(path: Path, root: Path) -> Record:
    image, problem = _file_bytes(path)
    return Record(str(path.relative_to(root)), str(path), image, None, {}, problem)


def _row_record(row: dict[str, Any], source: Path, number: int) -> Record:
    own = {"id", "image", "text", "uri"}
    uri, image, problem = f"{source}#row={number}", row.get("image"), None
    if row.get("uri"):
        path = source.parent / row["uri"]  # an absolute path stays as it is
        uri = str(path)
        if image is None:
            image, problem = _file_bytes(path)
    columns = {key: value for key, value in row.items() if key not in own}
    return Record(str(row["id"]), uri, image, row.get("text"), columns, problem)


def _file_bytes(path: Path) -> tuple[bytes | None, str | None]:
    """The bytes of a file, or what is wrong with it: one bad file must not stop a shard."""
    try:
        return path.read_bytes(), None
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"


def fetch_image(uri: str) -> bytes | None:
    """The image bytes behind an embedding row's `uri`; None where the row has no image.

    Raises:
        DataError: The file is gone.
    """
    name, separator, fragment = uri.partition("#row=")
    try:
        if not separator:
            return Path(name).read_bytes()
        row = int(fragment)
        file = pq.ParquetFile(name)
        if "image" not in file.schema_arrow.names:
            return None
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                value: bytes | None = file.read_row_group(group, columns=["image"])["image"][
                    row
                ].as_py()
                return value
            row -= rows
    except OSError as error:
        raise DataError(f"{uri} cannot be read: {error}") from None
    raise DataError(f"{uri} points past the end of its file")
