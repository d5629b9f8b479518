"""WebDataset tars as a corpus: a shard per tar, a record per run of members with one key."""

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import IO

import pyarrow as pa

from pipelines.corpus.base import Corpus, Record, Shard, file_state
from pipelines.corpus.lines import BadRowError
from pipelines.corpus.text import utf8
from pipelines.images import SUFFIXES, bytes_uri, record_uri
from pipelines.storage import StoredFile
from slq.errors import DataError
from slq.media import DEFAULT_LIMITS

_PARTS = {
    **dict.fromkeys((suffix.removeprefix(".") for suffix in SUFFIXES), "image"),
    "txt": "text",
    "caption": "text",
    "json": "json",
}
_NAME = re.compile(r"(?:\./)?(?P<key>(?:.*/)?[^./]+)\.(?P<end>[^/]*)", re.DOTALL)
_BLOCK_BYTES = 512
_MOST_PADDING_BYTES = (
    2**20
)  # tar fills up its last record; more zeros are what a broken copy leaves
_Member = tuple[str, str, tarfile.TarInfo]  # key, end of the name, header


class WebDatasetCorpus(Corpus):
    """One tar, or all below a folder.

    Consecutive members that share their path up to the first dot of the file name are one record: jpg, jpeg, png or
    webp is its image, txt or caption its text, json the user's column `json`. Its id is `tar:key`.
    """

    keeps_places = False

    def user_schema(self) -> pa.Schema:
        """See `Corpus.user_schema`."""
        return pa.schema([("json", pa.string())])

    def _cut(self, files: Iterator[StoredFile], shard_rows: int) -> Iterator[Shard]:  # noqa: ARG002
        for file in files:  # whole: a tar has no table of contents
            yield Shard(-1, file.name, 0, -1, state=file_state(file.name, file))

    def records(self, shard: Shard) -> Iterator[Record]:
        """See `Corpus.records`; a damaged tar, or one that was cut short, is an error and no lost tail."""
        with self._opened(shard.source) as opened:
            try:
                for number, (key, sample) in enumerate(_samples(opened)):
                    yield self._record(shard.source, number, key, sample)
            except tarfile.TarError as error:
                raise DataError(
                    f"{self.store.url(shard.source)} is no whole tar: {error}; copy it again, uncompressed"
                ) from None

    def _record(self, name: str, number: int, key: str, sample: "_Sample") -> Record:
        url = self.store.url(name)
        uri = bytes_uri(url, *sample.place) if sample.place else record_uri(url, number)
        item_id = f"{name}:{key.encode(errors='backslashreplace').decode()}"
        columns = {"json": sample.texts.get("json")}
        text, problem = sample.texts.get("text"), sample.problem and f"{item_id}: {sample.problem}"
        return Record(item_id, uri, sample.image, text, columns, problem, sample.reason)


def _samples(opened: IO[bytes]) -> Iterator[tuple[str, "_Sample"]]:
    """Each key with what its members hold."""
    for key, members in groupby(_members(opened), key=itemgetter(0)):
        sample = _Sample()
        for _, end, header in members:
            if end in _PARTS:
                sample.add(_PARTS[end], header, opened)
        yield key, sample


def _members(opened: IO[bytes]) -> Iterator[_Member]:
    """Regular files of a tar whose names have a key.

    Raises:
        tarfile.TarError: The tar is damaged or cut short; by itself `tarfile` takes that for its end.
    """
    with tarfile.open(fileobj=opened, mode="r:") as tar:
        while (header := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all headers of the file
            found = _NAME.fullmatch(header.name)
            if found and header.isreg():
                yield found["key"], found["end"].lower(), header
        end = tar.offset
    opened.seek(end)
    padding = opened.read(_MOST_PADDING_BYTES + 1)
    if len(padding) < _BLOCK_BYTES:
        raise tarfile.ReadError("it was cut short")
    if len(padding) > _MOST_PADDING_BYTES or padding.strip(b"\0"):
        raise tarfile.ReadError(f"there is no member at byte {end}, but the file goes on")


class _Sample:
    """What members with one key amount to; the first problem counts."""

    def __init__(self) -> None:
        self.image: bytes | None = None
        self.place: tuple[int, int] | None = None  # of the image in the tar
        self.texts: dict[str, str] = {}
        self.problem: str | None = None
        self.reason = "unreadable"

    def add(self, part: str, header: tarfile.TarInfo, opened: IO[bytes]) -> None:
        """Read one member."""
        limit = DEFAULT_LIMITS.max_bytes
        if part in self.texts or (part == "image" and self.place):
            self._refuse("bad_row", f"it has more than one {part}, the second in {header.name!r}")
        elif header.issparse():
            self._refuse("unreadable", f"{header.name!r} is sparse; make the tar without holes")
        elif header.size > limit:
            problem = f"{header.name!r} has {header.size} bytes; at most {limit} are allowed"
            self._refuse("too_many_bytes", problem)
        else:
            self._take(part, header, _content(header, opened))

    def _take(self, part: str, header: tarfile.TarInfo, data: bytes) -> None:
        if part == "image":
            self.image = data
            self.place = (header.offset_data, header.offset_data + header.size)
            return
        try:
            self.texts[part] = utf8(data)
        except BadRowError as error:
            self._refuse("bad_row", f"{header.name!r}: {error}")

    def _refuse(self, reason: str, problem: str) -> None:
        if self.problem is None:
            self.problem, self.reason = problem, reason


def _content(header: tarfile.TarInfo, opened: IO[bytes]) -> bytes:
    opened.seek(header.offset_data)
    data = opened.read(header.size)
    if len(data) < header.size:
        raise tarfile.ReadError(f"it was cut short in {header.name!r}")
    return data
