"""How far a run is: what it has to do, and what it did."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.commits import Commit
from pipelines.progress import duration, show
from pipelines.reranking.score import Work
from slq.errors import DataError

_SHOW_EVERY_S = 2.0


@dataclass
class Totals:
    """What the run has to do, and what it did.

    Attributes:
        planned: Pairs of each shard.
        committed: Records of shards that earlier runs, or this one, have committed.
        workers: Scoring actors.
        work: Of this run.
    """

    planned: list[int]
    committed: dict[int, Commit]
    workers: int
    work: Work = field(default_factory=Work)
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.before = sum(one.rows + one.quarantined for one in self.committed.values())
        self.bad_before = sum(one.quarantined for one in self.committed.values())

    @property
    def num_pairs(self) -> int:
        """Of the whole plan."""
        return sum(self.planned)

    @property
    def pairs(self) -> int:
        """Of this run."""
        return self.work.scored + self.work.unscored

    @property
    def pairs_per_s(self) -> float:
        """Since the run began; 0 before there is one."""
        return self.pairs / max(1e-3, time.monotonic() - self.started)

    def add(self, commit: Commit, work: Work) -> None:
        """Note a committed shard."""
        self.committed[commit.shard_id] = commit
        self.work.add(work)

    def require_few_bad(self, max_share: float, errors: str) -> None:
        """Check the share of pairs that could not be scored against all.

        Raises:
            DataError: There are too many, however the rest goes.
        """
        bad = self.bad_before + self.work.unscored
        if bad > max_share * self.num_pairs:
            last = self.work.problem and f", one of them {self.work.problem}"
            raise DataError(
                f"{bad} of {self.num_pairs} pairs ({bad / max(1, self.num_pairs):.1%}) cannot be scored, more than "
                f"rerank.max_error_share allows ({max_share:.1%}){last}; see {errors}, mend them and "
                "add --retry-errors, or raise the share"
            )

    def line(self) -> str:
        """How far the run is."""
        done, rate = self.before + self.pairs, self.pairs_per_s
        eta = duration((self.num_pairs - done) / rate) if rate else "?"
        busy = self.work.busy_s / max(1e-3, (time.monotonic() - self.started) * self.workers)
        return (
            f"rerank shard {len(self.committed)}/{len(self.planned)}  {done:,}/{self.num_pairs:,} pairs  "
            f"{rate:.0f} pairs/s  scorers busy {busy:.0%}  unscored {self.work.unscored}  ETA {eta}"
        )

    def tell(self, *, now: bool = False) -> None:
        """Show the line, at most every two seconds unless `now`."""
        if now or time.monotonic() - self.shown > _SHOW_EVERY_S:
            self.shown = time.monotonic()
            show(self.line())

    def report(self) -> dict[str, Any]:
        """The run in numbers, as JSON; `problem` is told elsewhere."""
        work = asdict(self.work)
        del work["problem"]
        return {
            "pairs": self.pairs,
            "shards": len(self.planned),
            "workers": self.workers,
            "seconds": round(time.monotonic() - self.started, 3),
            "pairs_per_s": round(self.pairs_per_s, 3),
            **work,
        }
