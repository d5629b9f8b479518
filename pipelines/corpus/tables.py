"""Rows that may name their image by uri: what Parquet files and manifests have in common."""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipelines.corpus.base import Corpus, Record
from pipelines.corpus.reading import ahead
from pipelines.images import ImageReader
from slq.errors import MediaError

Row = tuple[Record, str | None]
"""A record, and the uri of its image where that stands in a file of its own."""


class TableCorpus(Corpus):
    """A corpus whose rows may name files of the table's own folder, or objects."""

    def _followed(self, rows: Iterable[Row], name: str) -> Iterator[Record]:
        """The records of rows with the images that they name; a few images are read ahead.

        Args:
            rows: Rows in order.
            name: Of their table in the corpus' store.
        """
        folder = self.store.url(posixpath.dirname(name))
        reader = ImageReader(folder, retry_s=self._retry_s)
        for _, record in ahead(lambda row: _follow(row, reader), rows):
            yield record


def _follow(row: Row, reader: ImageReader) -> Record:
    record, uri = row
    if uri is None or record.image is not None:  # bytes win: what is embedded is shown later
        return record
    try:
        return replace(record, image=reader.read(uri), uri=reader.locate(uri))
    except MediaError as error:
        return replace(record, problem=str(error), reason=error.reason)
