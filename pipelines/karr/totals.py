"""How far a run is: what it has to do, and what it did."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.commits import Commit
from pipelines.karr.shards import Work
from pipelines.progress import duration, show
from slq.errors import DataError

_SHOW_EVERY_S = 2.0


@dataclass
class Totals:
    """What the run has to do, and what it did.

    Attributes:
        planned: Captions of each shard.
        before: Commits of earlier runs.
        committed: Shards so far.
        work: Of this run.
    """

    planned: list[int]
    before: Mapping[int, Commit]
    work: Work = field(default_factory=Work)
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.committed = len(self.before)
        self._captions_before = sum(one.rows + one.quarantined for one in self.before.values())
        self._errors_before = sum(one.quarantined for one in self.before.values())

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return max(1e-3, time.monotonic() - self.started)

    def add(self, work: Work) -> None:
        """Note a committed shard."""
        self.committed += 1
        for name in ("captions", "candidates", "errors", "asked", "kept"):
            setattr(self.work, name, getattr(self.work, name) + getattr(work, name))
        self.work.problem = work.problem or self.work.problem

    def require_few_errors(self, max_share: float, where: str) -> None:
        """Check the share of captions without an answer or an image against all.

        Raises:
            DataError: There are too many, however the rest goes.
        """
        errors, total = self._errors_before + self.work.errors, sum(self.planned)
        if errors > max_share * total:
            one = f", one of them {self.work.problem}" if self.work.problem else ""
            raise DataError(
                f"{errors} of {total} captions ({errors / total:.1%}) got no answer or have no readable image, more "
                f"than karr.max_error_share allows ({max_share:.1%}){one}; see {where}, mend the endpoint or the "
                "images and add --retry-errors, or raise the share"
            )

    def line(self) -> str:
        """How far the run is."""
        work, total = self.work, sum(self.planned)
        done, rate = self._captions_before + work.captions, work.captions / self.seconds
        eta = duration((total - done) / rate) if rate else "?"
        return (
            f"karr shard {self.committed}/{len(self.planned)}  {done:,}/{total:,} captions  {rate:.1f} captions/s  "
            f"candidates {work.candidates}  errors {work.errors}  answers {work.asked} asked, {work.kept} kept  "
            f"ETA {eta}"
        )

    def tell(self, *, now: bool = False) -> None:
        """Show the line, at most every two seconds unless `now`."""
        if now or time.monotonic() - self.shown > _SHOW_EVERY_S:
            self.shown = time.monotonic()
            show(self.line())

    def report(self) -> dict[str, Any]:
        """This run in numbers."""
        work = self.work
        return {
            "captions": work.captions,
            "seconds": round(self.seconds, 3),
            "captions_per_s": round(work.captions / self.seconds, 3),
            "answers_asked": work.asked,
            "answers_kept": work.kept,
        }
