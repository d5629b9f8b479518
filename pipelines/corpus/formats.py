"""Formats of a corpus: which files belong to which, and what a location holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipelines.images import SUFFIXES as IMAGE_SUFFIXES
from pipelines.storage import LocalStore, Store, StoredFile, open_store, split_location
from slq.errors import ConfigError, DataError

Format = Literal["images", "parquet", "webdataset", "jsonl", "csv", "text"]
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "images": IMAGE_SUFFIXES,
    "parquet": (".parquet",),
    "webdataset": (".tar",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
    "text": (".txt",),
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def format_of(name: str) -> Format | None:
    """The format that a file has by its suffix; None where it has none of ours.

    Raises:
        ConfigError: The file is compressed as a whole, so that no shard could begin inside of it.
    """
    lower = name.lower().replace(".tgz", ".tar.gz")
    stem = next((lower[: -len(end)] for end in _COMPRESSED if lower.endswith(end)), lower)
    found = next((kind for kind, ends in SUFFIXES.items() if stem.endswith(ends)), None)
    if found and stem != lower:
        raise ConfigError(
            f"{name} is compressed, and no shard can begin inside of it; unpack it, or write Parquet, which "
            "compresses by column"
        )
    return found


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a corpus.

    Attributes:
        store: Their folder.
        name: The one file that is the corpus; None if all files of the format below the folder are.
        format: Theirs.
        example: A file of the format, if files of other formats are refused; None if they are passed over.
    """

    store: Store
    name: str | None
    format: Format
    example: str | None = None

    @property
    def location(self) -> str:
        """Where the corpus is, as users write it."""
        return self.store.url(self.name or "")

    def files(self) -> Iterator[StoredFile]:
        """The files as they are now, in a stable order, as a stream.

        Raises:
            ConfigError: The corpus is gone; a file is compressed; or it is of another format where that is refused.
            DataError: A file's name is no UTF-8.
            StorageError: The store cannot be read.
        """
        if self.name is not None:
            yield _file(self.store, self.name)
            return
        for file in self.store.files():
            found = format_of(file.name)
            if found == self.format:
                yield _checked(file)
            elif found and self.example:
                raise ConfigError(
                    f"corpus {self.location} holds files of the formats {self.format} ({self.example}) and {found} "
                    f"({file.name}); set data.corpus_format to the one that is meant"
                )


def find_source(location: str | Path, wanted: Format | Literal["auto"], retry_s: float) -> Source:
    """What a location holds.

    Args:
        location: A file or a folder, local or in an object store.
        wanted: The format; "auto" tells it by the file's suffix, or by the first file of a folder that has one of
            ours. Another one beside it comes to light when the corpus is planned.
        retry_s: How long failures of an object store are tried again.

    Raises:
        ConfigError: There is no such file or folder, or nothing in it that can be embedded.
        StorageError: The store cannot be read.
    """
    if wanted not in ("auto", *get_args(Format)):
        raise ConfigError(
            f"data.corpus_format is {wanted!r}; it must be auto, {', '.join(get_args(Format))}"
        )
    store = open_store(_absolute(location), retry_s)
    if _is_folder(store):
        return _of_folder(store, wanted)
    folder, name = split_location(store.location)
    if not name or folder.endswith(":/"):  # a bucket without files
        raise ConfigError(f"corpus {store.location} is empty, or does not exist")
    return _of_file(open_store(folder, retry_s), name, wanted)


def _of_file(store: Store, name: str, wanted: Format | Literal["auto"]) -> Source:
    _file(store, name)
    url = store.url(name)
    told = format_of(name)  # also refuses what is compressed
    found = told if wanted == "auto" else wanted
    if found is None:
        raise ConfigError(
            f"corpus {url} is neither a folder nor a file that ends with {_suffixes('images')}; set "
            "data.corpus_format"
        )
    if found == "images":
        raise ConfigError(f"corpus {url} is one file; images are read from a folder")
    return Source(store, name, found)


def _of_folder(store: Store, wanted: Format | Literal["auto"]) -> Source:
    if wanted != "auto":
        return Source(store, None, wanted)
    for file in store.files():
        found = format_of(file.name)
        if found:
            return Source(store, None, found, example=file.name)
    raise ConfigError(f"folder {store.location} holds nothing that can be embedded ({_suffixes()})")


def _suffixes(*without: Format) -> str:
    return ", ".join(end for kind, ends in SUFFIXES.items() if kind not in without for end in ends)


def _absolute(location: str | Path) -> str:
    """Stored uris must lead back from any process; links stay, as what they lead to may have no suffix."""
    text = str(location)
    if text.startswith("file://"):
        text = text[len("file://") :]
    return text.rstrip("/") if "://" in text else str(Path(text).absolute())


def _is_folder(store: Store) -> bool:
    if isinstance(store, LocalStore):
        return store.root.is_dir()
    return next(store.files(), None) is not None


def _checked(file: StoredFile) -> StoredFile:
    try:
        file.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the file name {file.name!r} is no UTF-8; rename the file") from None
    return file


def _file(store: Store, name: str) -> StoredFile:
    found = store.stat(name)
    if found is None:
        raise ConfigError(f"corpus {store.url(name)} does not exist")
    if isinstance(store, LocalStore) and not store.path(name).is_file():
        raise ConfigError(f"corpus {store.url(name)} is no regular file")  # a pipe is read once
    return found
