"""How far a run is: what it has to do, and what it did."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.commits import Commit
from pipelines.embedding.pieces import Work
from pipelines.embedding.write import Written
from pipelines.progress import duration, show
from slq.errors import DataError

_SHOW_EVERY_S = 2.0


@dataclass
class Totals:
    """What the run has to do, and what it did.

    Attributes:
        num_shards: Of the whole data set.
        num_rows: Of the whole data set; None where its corpus tells only when it is read.
        committed: Records of shards that earlier runs, or this one, have committed.
        workers: Encoders.
        bad_before: Rows that earlier runs quarantined, and that this one does not read again.
    """

    num_shards: int
    num_rows: int | None
    committed: dict[int, Commit]
    workers: int
    bad_before: int = 0
    good: int = 0
    bad: int = 0
    work: Work = field(default_factory=Work)
    started: float = field(default_factory=time.monotonic)
    encoding_since: float = math.inf
    last_piece: float = 0.0
    shown: float = 0.0
    problem: str = ""

    def __post_init__(self) -> None:
        self.before = sum(one.rows + one.quarantined for one in self.committed.values())

    def add(self, piece: Written) -> None:
        """Note a written piece."""
        began = piece.work.began or time.time()
        self.encoding_since = min(self.encoding_since, began)
        self.last_piece = time.time()
        self.good += piece.good
        self.bad += piece.bad
        self.problem = piece.problem or self.problem
        self.work.add(piece.work)

    @property
    def rows(self) -> int:
        """Rows of this run, quarantined ones included."""
        return self.good + self.bad

    @property
    def rows_per_s(self) -> float:
        """From the first batch to the last written piece: loading the models is left out. 0 before there is one."""
        return self.rows / self._encoding_s if self.rows else 0.0

    @property
    def busy_share(self) -> float:
        """Share of the encoders' time that their models worked, over the same span."""
        return self.work.busy_s / (self._encoding_s * self.workers) if self.rows else 0.0

    @property
    def _encoding_s(self) -> float:
        return max(1e-3, self.last_piece - self.encoding_since)

    @property
    def padding_share(self) -> float:
        """Share of the batches' tokens that were padding."""
        return 1 - self.work.tokens / self.work.padded_tokens if self.work.padded_tokens else 0.0

    def has_too_many_bad(self, max_share: float) -> bool:
        """Whether more rows are quarantined already than may be of all, so that the run cannot end well."""
        bad = self.bad_before + self.bad
        return self.num_rows is not None and bad > max_share * self.num_rows

    def eta_s(self) -> float | None:
        """Seconds until the end at this pace; None while it is not known."""
        if not self.rows_per_s:
            return None
        if self.num_rows is not None:
            return max(0.0, self.num_rows - self.before - self.rows) / self.rows_per_s
        done = len(self.committed)
        return (time.monotonic() - self.started) / done * (self.num_shards - done) if done else None

    def line(self) -> str:
        """How far the run is."""
        eta = self.eta_s()
        of_rows = "" if self.num_rows is None else f"/{self.num_rows:,}"
        return (
            f"embed shard {len(self.committed)}/{self.num_shards}  "
            f"{self.before + self.rows:,}{of_rows} rows  {self.rows_per_s:.0f} rows/s  "
            f"encoders busy {self.busy_share:.0%}  padding {self.padding_share:.1%}  "
            f"quarantined {self.bad}  ETA {'?' if eta is None else duration(eta)}"
        )

    def report(self) -> dict[str, Any]:
        """The run in numbers, as JSON."""
        return {
            "rows": self.rows,
            "quarantined": self.bad,
            "shards": self.num_shards,
            "encoders": self.workers,
            "seconds": round(time.monotonic() - self.started, 3),
            "rows_per_s": round(self.rows_per_s, 3),
            "busy_share": round(self.busy_share, 4),
            "padding_share": round(self.padding_share, 4),
            **asdict(self.work),
        }

    def tell(self, *, now: bool = False) -> None:
        """Show the line, at most every two seconds unless `now`."""
        if now or time.monotonic() - self.shown > _SHOW_EVERY_S:
            self.shown = time.monotonic()
            show(self.line())


def too_many_bad(bad: int, rows: int, max_share: float, errors: str, last: str = "") -> DataError:
    """The error of a run that quarantines more than `embed.max_error_share`.

    Args:
        bad: Rows that were quarantined.
        rows: Of the corpus.
        max_share: That is allowed.
        errors: Where their reasons are.
        last: One of them, with its reason.
    """
    return DataError(
        f"{bad} of {rows} items ({bad / max(1, rows):.1%}) were quarantined, more than embed.max_error_share allows "
        f"({max_share:.1%}){last and f', the last one {last}'}; see {errors}"
    )
