"""Has the model read pairs that it has not read yet, a chunk at a time, and keeps what it read."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.ablations.scores import ROOM, Pairs, Readings, Scorer
from jobs.bench.ablations.settings import OFF, Row, Scoring, digest
from jobs.bench.ablations.subject import Subject
from pipelines.progress import duration, show
from slq.reranking.passes import Counts, Passes
from slq.schema import Item

VERSION = 1  # raise it when a figure comes about in another way
_CHUNK = 1024  # pairs between two lines, and two files


class Meter:
    """How far all rows are, in images that are shown to the model."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, total: int) -> None:
        """From now on so many are to be shown."""
        self._total, self._done, self._began = total, 0, time.monotonic()

    def tell(self, name: str, shown: int, what: str) -> None:
        """So many more have been shown, for a row."""
        self._done += shown
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        left = duration(max(0, self._total - self._done) / rate)
        show(f"{name}: {what}  {rate:.0f} images/s  ETA of all rows {left}")


class Reader:
    """The subject, and what has been read of it in each way.

    Args:
        subject: What is measured on.
        folder: Where readings are kept.
        batch_size: Pairs per pass.

    Attributes:
        num_read: Pairs that went through the model since this object was made.
        meter: Tells how far it is.
    """

    def __init__(self, subject: Subject, folder: Path, *, batch_size: int) -> None:
        self.subject = subject
        self.num_read = 0
        self.meter = Meter()
        self._folder, self._batch_size = folder, batch_size
        self._readings: dict[Scoring, Readings] = {}
        self._openings: list[int] = []
        self._images = Passes(subject.backbone, OFF, vision_bytes=ROOM, prefix_bytes=ROOM)

    def scorer(self, scoring: Scoring) -> Scorer:
        """It finds images that others have seen; close it when it is not needed any more."""
        return Scorer(self.subject.backbone, scoring, self._batch_size, self._images)

    def readings(self, scoring: Scoring) -> Readings:
        """All that has been read in one way, also by runs before this one."""
        if scoring not in self._readings:
            readings = Readings(*self.subject.relevant.shape)
            readings.load(self._path(scoring), self._identity(scoring))
            self._readings[scoring] = readings
        return self._readings[scoring]

    def read(self, name: str, scorer: Scorer, pairs: Pairs) -> None:
        """Read what is missing of some pairs; every chunk is on disk before the next one begins.

        Args:
            name: Of the row that wants them.
            scorer: Of their scoring.
            pairs: (n, 2) numbers of a query and an item.
        """
        readings = self.readings(scorer.scoring)
        missing = readings.missing(pairs)
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            readings.add(chunk, scorer.read(self.items(chunk)))
            readings.save(self._path(scorer.scoring), self._identity(scorer.scoring))
            self.num_read += len(chunk)
            self.meter.tell(name, len(chunk), f"{start + len(chunk):,} of {len(missing):,} pairs")

    def items(self, pairs: Pairs) -> list[tuple[Item, Item]]:
        """A query and an item each."""
        subject = self.subject
        return [(subject.queries[query], subject.items[item]) for query, item in pairs]

    def cost(self, scoring: Scoring, pairs: Pairs) -> Counts:
        """What one call costs that scores these pairs with nothing kept, each image once through the tower.

        Args:
            scoring: How pairs are put to the model.
            pairs: That have been read.
        """
        backbone = self.subject.backbone
        if not self._openings:
            opened = backbone.tokenised(self.subject.items, close=False)
            self._openings = [len(one) for one in opened]
        images = np.unique(pairs[:, 1])
        prefix = sum(self._openings[n] for n in images)
        if scoring.text_first:
            prefix = len(backbone.plain_ids)
        elif scoring.enhancement.needs_whole:  # then the suffix is all
            prefix = 0
        suffix = int(self.readings(scoring).at(pairs)["length"].sum())
        return Counts(vision_passes=len(images), prefix_tokens=prefix, suffix_tokens=suffix)

    def images_to_show(self, rows: Sequence[Row]) -> int:
        """How many images the model has yet to be shown for some rows, those of a pair that is kept left out."""
        wanted: dict[Scoring, list[Pairs]] = {}
        side_by_side = 0
        for row in rows:
            if row.side_by_side:
                side_by_side += self.subject.best(row.depth).size * row.depth
            elif row.scoring is not None:
                wanted.setdefault(row.scoring, []).append(self.subject.needed(row.depth))
        missing = [
            self.readings(scoring).missing(np.concatenate(pairs))
            for scoring, pairs in wanted.items()
        ]
        return side_by_side + sum(map(len, missing))

    def _path(self, scoring: Scoring) -> Path:
        return self._folder / f"{scoring.name}.safetensors"

    def _identity(self, scoring: Scoring) -> dict[str, Any]:
        subject = digest(self.subject.identity)
        return {"subject": subject, "scoring": scoring.identity(), "version": VERSION}
