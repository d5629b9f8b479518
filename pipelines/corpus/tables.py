"""Rows that may name their image by uri: what Parquet files and manifests have in common."""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

from pipelines.corpus.base import Corpus, Record
from pipelines.corpus.reading import ahead
from pipelines.images import ImageReader
from slq.errors import MediaError

Row = tuple[Record, str | None]
"""A record, and the uri of its image where that stands in a file of its own."""


class TableCorpus(Corpus):
    """A corpus whose rows may name files of the table's own folder, or objects."""

    def _followed(self, rows: Iterable[Row], name: str) -> Iterator[Record]:
        """The records of rows, with the images that they name; a few of those are read ahead.

        Args:
            rows: Rows in order.
            name: Of their table in the corpus' store.
        """
        folder = self.store.url(posixpath.dirname(name))
        reader = ImageReader(folder, retry_s=self._retry_s)
        for must_be_read, run in groupby(rows, key=_names_a_file):
            if must_be_read:
                yield from (record for _, record in ahead(partial(_follow, reader), run))
            else:
                yield from (record for record, _ in run)


def _names_a_file(row: Row) -> bool:
    record, uri = row  # bytes win: what is embedded is what is shown later
    return uri is not None and record.image is None and record.problem is None


def _follow(reader: ImageReader, row: Row) -> Record:
    record, uri = row
    try:
        url = reader.locate(uri or "")
        return replace(record, image=reader.read(uri or ""), uri=url)
    except MediaError as error:
        return replace(record, problem=str(error), reason=error.reason)
