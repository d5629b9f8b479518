"""Corpora: a Parquet file or a folder of images, cut into shards by a deterministic plan, read shard by shard."""

import hashlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slq.errors import ConfigError, DataError
from slq.media import DEFAULT_LIMITS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_ROW = "#row="  # parts a table from a row number in a stored uri, so no file name may hold it


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: rows `start` to `stop` - 1 of a source.

    Attributes:
        paths: Of a folder, the shard's files relative to it. Workers never list the folder again: a file that
            comes or goes meanwhile would shift every row behind it.
    """

    shard_id: int
    source: str
    start: int
    stop: int
    paths: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows that the shard should hold, quarantined ones included."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Record:
    """One raw item as read, before decoding.

    Attributes:
        uri: Where `fetch_image` finds the image: a file, or `table#row=n`.
        problem: Why the image could not be read; None where it could.
        reason: Stable short code that goes with `problem`: `unreadable`, `too_many_bytes` or `path_refused`.
    """

    id: str
    uri: str
    image: bytes | None
    text: str | None
    columns: dict[str, Any]
    problem: str | None = None
    reason: str = "unreadable"


def plan_shards(corpus: Path, shard_rows: int) -> list[ShardPlan]:
    """Cut a corpus into shards; the same corpus always gives the same plan.

    Raises:
        ConfigError: `corpus` is neither a Parquet file nor a folder with images.
        DataError: The Parquet file has no usable columns, or it is empty.
    """
    paths = _listed(corpus) if corpus.is_dir() else []
    count = len(paths) or _count(corpus)
    if count == 0:
        raise DataError(f"corpus {corpus} is empty")
    return [
        ShardPlan(
            number,
            str(corpus),
            start,
            min(start + shard_rows, count),
            tuple(paths[start : start + shard_rows]),
        )
        for number, start in enumerate(range(0, count, shard_rows))
    ]


def _listed(folder: Path) -> list[str]:
    files = image_files(folder)
    if not files:
        raise ConfigError(f"folder {folder} holds no images ({', '.join(SUFFIXES)})")
    return [str(path.relative_to(folder)) for path in files]


def _count(corpus: Path) -> int:
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


def corpus_state(corpus: Path) -> dict[str, str]:
    """What each file of the corpus was like: name -> size and mtime_ns (folder), or sha256 (Parquet file).

    A folder's content is not hashed, which would read it twice: a copy of it that keeps no times is another corpus.
    Pictures that a Parquet file names by `uri` are not looked at.
    """
    if not corpus.is_dir():
        with corpus.open("rb") as file:
            return {"the Parquet file": hashlib.file_digest(file, "sha256").hexdigest()}
    return {str(path.relative_to(corpus)): _file_state(path) for path in image_files(corpus)}


def _file_state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # a dangling link is read, and set aside, as it is
        try:
            found = path.lstat()
        except OSError:
            return "gone"
    return f"{found.st_size}:{found.st_mtime_ns}"


def corpus_digest(corpus: Path) -> str:
    """Names the corpus's content: relative paths, sizes and mtime_ns of a folder, or the Parquet file's sha256."""
    return state_digest(corpus_state(corpus))


def state_digest(state: Mapping[str, str]) -> str:
    """sha256 of a corpus state."""
    lines = [f"{name}:{value}\n" for name, value in state.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def require_unchanged(corpus: Path, before: Mapping[str, str], plans: Sequence[ShardPlan]) -> None:
    """Refuse a corpus that is not what it was before it was read.

    Args:
        corpus: A Parquet file or a folder.
        before: `corpus_state` from before the plan was made.
        plans: All shards.

    Raises:
        DataError: A file was added, removed or written to; it and its shard are named.
    """
    after = corpus_state(corpus) if corpus.exists() else {}
    changed = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    if not changed:
        return
    name = changed[0]
    shards = [plan.shard_id for plan in plans if name in plan.paths or not plan.paths]
    place = f"of shard {shards[0]}" if len(shards) == 1 else f"of shards 0 to {len(plans) - 1}"
    verb = "was added" if name not in before else "is gone" if name not in after else "is another"
    raise DataError(
        f"the corpus changed while it was read: {name} {place if shards else 'of no shard'} {verb}; "
        "let it rest and embed it into another storage.dir"
    )


def read_shard(plan: ShardPlan) -> list[Record]:
    """The raw records of one shard, in order.

    Raises:
        DataError: The source cannot be read, or holds fewer rows than were planned.
    """
    source = Path(plan.source)
    if plan.paths:
        return [_file_record(path, source) for path in plan.paths]
    try:
        records = _rows(plan, source)
    except (OSError, ValueError) as error:
        raise DataError(f"shard {plan.shard_id} of {source} cannot be read: {error}") from None
    if len(records) != plan.num_rows:
        raise rows_changed(plan, len(records))
    return records


def rows_changed(plan: ShardPlan, rows: int) -> DataError:
    """The error of a shard that does not have its planned number of rows."""
    return DataError(
        f"the corpus changed while it was read: shard {plan.shard_id} has {rows} rows, {plan.num_rows} were "
        "planned; let it rest and embed it into another storage.dir"
    )


def _rows(plan: ShardPlan, source: Path) -> list[Record]:
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


class _UnreadableError(Exception):
    """A file that cannot become an item; `reason` is a stable short code."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _file_record(name: str, root: Path) -> Record:
    """A file of an image folder. Links are followed: the folder's owner put them there."""
    path = root / name
    if _ROW in name:
        problem = f"{name} may not hold {_ROW!r}; rename it"
        return Record(name, str(path), None, None, {}, problem, "path_refused")
    try:
        return Record(name, str(path), _file_bytes(path), None, {})
    except _UnreadableError as error:
        return Record(name, str(path), None, None, {}, str(error), error.reason)


def _row_record(row: dict[str, Any], source: Path, number: int) -> Record:
    own = {"id", "image", "text", "uri"}
    columns = {key: value for key, value in row.items() if key not in own}
    uri, image = f"{source}{_ROW}{number}", row.get("image")
    if image is None and row.get("uri"):  # bytes win: what is embedded is what is shown later
        try:
            path = _inside(source.parent, str(row["uri"]))
            image, uri = _file_bytes(path), str(path)
        except _UnreadableError as error:
            return Record(
                str(row["id"]), uri, None, row.get("text"), columns, str(error), error.reason
            )
    return Record(str(row["id"]), uri, image, row.get("text"), columns)


def _inside(folder: Path, uri: str) -> Path:
    """The file that a row names, links followed; a table from elsewhere must not read the rest of the disk."""
    try:
        root = folder.resolve()
        path = (root / uri).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL, a loop of links
        raise _UnreadableError("path_refused", f"{uri!r} names no file: {error}") from None
    if "://" in uri or Path(uri).is_absolute() or not path.is_relative_to(root) or _ROW in uri:
        raise _UnreadableError(
            "path_refused",
            f"{uri!r} is no relative path of a file below {root}, the table's own folder",
        )
    return path


def _file_bytes(path: Path, max_bytes: int = DEFAULT_LIMITS.max_bytes) -> bytes:
    """The bytes of a regular file that is not too large: one bad file must not stop a shard."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise _UnreadableError("unreadable", f"{path} is no regular file")
        if found.st_size <= max_bytes:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)  # it may have grown meanwhile
            if len(data) <= max_bytes:
                return data
    except OSError as error:
        raise _UnreadableError("unreadable", f"{path} cannot be read: {error.strerror}") from None
    raise _UnreadableError(
        "too_many_bytes", f"{path} has {found.st_size} bytes; at most {max_bytes} are allowed"
    )


def fetch_image(uri: str) -> bytes | None:
    """The image bytes behind an embedding row's `uri`; None where the row has no image.

    Raises:
        DataError: The file is gone, or larger than an image may be.
    """
    name, _, fragment = uri.rpartition(_ROW)
    try:
        if not (name and fragment.isdecimal()):
            return _file_bytes(Path(uri))
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
    except (OSError, _UnreadableError) as error:
        raise DataError(f"{uri} cannot be read: {error}") from None
    raise DataError(f"{uri} points past the end of its file")
