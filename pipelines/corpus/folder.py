"""A folder of images as a corpus."""

from collections.abc import Iterator
from itertools import islice

from pipelines.corpus.base import Corpus, Record, Shard, file_state
from pipelines.corpus.reading import ahead
from pipelines.images import is_ambiguous, read_image
from pipelines.storage import StoredFile
from slq.errors import MediaError


class ImageFolder(Corpus):
    """All images below a folder; an image's id is its path there.

    Links to files are followed: the folder's owner put them there. Linked folders are not.
    """

    def _cut(self, files: Iterator[StoredFile], shard_rows: int) -> Iterator[Shard]:
        start = 0
        while batch := list(islice(files, shard_rows)):
            paths = tuple(file.name for file in batch)
            state = "".join(file_state(file.name, file) for file in batch)
            yield Shard(-1, "", start, start + len(batch), paths=paths, state=state)
            start += len(batch)

    def records(self, shard: Shard) -> Iterator[Record]:
        """See `Corpus.records`; a few images are read ahead. One that cannot be read carries its problem."""
        for _, record in ahead(self._record, shard.paths):
            yield record

    def _record(self, name: str) -> Record:
        url = self.store.url(name)
        if is_ambiguous(name):
            problem = f"{name} could pass for a place in a file; rename it"
            return Record(name, url, None, None, {}, problem, "path_refused")
        try:
            return Record(name, url, read_image(url, self._retry_s), None, {})
        except MediaError as error:
            return Record(name, url, None, None, {}, str(error), error.reason)
