"""Corpora: files of records in one of several formats, cut into shards by a deterministic plan, read shard by shard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pipelines.corpus.base import Corpus, Record, Shard, corpus_changed, rows_changed
from pipelines.corpus.columns import Columns
from pipelines.corpus.csv_tables import CsvCorpus
from pipelines.corpus.folder import ImageFolder
from pipelines.corpus.formats import Format, find_source
from pipelines.corpus.json_lines import JsonLinesCorpus
from pipelines.corpus.parquet import ParquetCorpus
from pipelines.corpus.plan import (
    Plan,
    PlanSummary,
    read_plan,
    require_same_plan,
    summarise,
    write_plan,
)
from pipelines.corpus.text import TextCorpus
from pipelines.corpus.webdataset import WebDatasetCorpus
from pipelines.fetching import fetch_image
from pipelines.recipe import Recipe
from pipelines.storage.objects import RETRY_S
from slq.errors import ConfigError

__all__ = [
    "Corpus",
    "Format",
    "Plan",
    "PlanSummary",
    "Record",
    "Shard",
    "corpus_changed",
    "corpus_of",
    "fetch_image",
    "open_corpus",
    "read_plan",
    "require_same_plan",
    "rows_changed",
    "summarise",
    "write_plan",
]
_CORPORA: dict[Format, type[Corpus]] = {
    "images": ImageFolder,
    "parquet": ParquetCorpus,
    "webdataset": WebDatasetCorpus,
    "jsonl": JsonLinesCorpus,
    "csv": CsvCorpus,
    "text": TextCorpus,
}
_TABLES = ("parquet", "jsonl", "csv")


def open_corpus(
    location: str | Path,
    format: Format | Literal["auto"] = "auto",  # noqa: A002 - the word that users read in messages
    columns: Mapping[str, str] | None = None,
    retry_s: float = RETRY_S,
) -> Corpus:
    """The corpus at a location; no record is read yet.

    Args:
        location: A file or a folder, local or `scheme://bucket/prefix`.
        format: Of its files; "auto" goes by suffixes.
        columns: Our names (id, text, image, uri) -> the tables' own, where they differ.
        retry_s: How long failures of an object store are tried again.

    Raises:
        ConfigError: There is nothing that can be embedded, or the settings do not fit it.
        StorageError: The store cannot be read.
    """
    source = find_source(location, format, retry_s)
    if columns and source.format not in _TABLES:
        raise ConfigError(
            f"data.columns names columns of tables, but {source.location} is read as {source.format}"
        )
    return _CORPORA[source.format](source, Columns(dict(columns or {})), retry_s)


def corpus_of(recipe: Recipe) -> Corpus:
    """The recipe's corpus.

    Raises:
        ConfigError: It is not there, or of no known format.
    """
    data = recipe.data
    return open_corpus(
        data.corpus_location, data.corpus_format, data.columns, recipe.storage.retry_s
    )
