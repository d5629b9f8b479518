"""The driver's side: Ray Data from shard ids to written pieces, sealing, commits, and how far the run is."""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.commits import Commit
from pipelines.embedding.arrivals import Arrivals
from pipelines.embedding.encode import THREADS, EncodePieces
from pipelines.embedding.flow import Flow
from pipelines.embedding.journal import start_journal
from pipelines.embedding.metrics import count
from pipelines.embedding.pieces import FAILURE, Work, failure_text, raise_failure
from pipelines.embedding.prepare import prepare
from pipelines.embedding.seal import remove_pieces, seal
from pipelines.embedding.write import Written, write_piece
from pipelines.ledger import Ledger
from pipelines.progress import show
from slq.errors import ArtifactError, ClusterError, SlqError

log = logging.getLogger(__name__)
_MOST_SEALING = 8  # shards whose files are being written at once
_BLOCK_BYTES = 128  # below any piece and above any shard id: every row is a block of its own
_SHOW_EVERY_S = 2.0
_LIBRARY_BYTES = 2**30


@dataclass
class Totals:
    """What the run has to do, and what it did.

    Attributes:
        num_shards: Of the whole data set.
        num_rows: Of the whole data set; None where its corpus tells only when it is read.
        committed: Records of shards that earlier runs, or this one, have committed.
        workers: Encoders.
    """

    num_shards: int
    num_rows: int | None
    committed: dict[int, Commit]
    workers: int
    good: int = 0
    bad: int = 0
    work: Work = field(default_factory=Work)
    started: float = field(default_factory=time.monotonic)
    encoding_since: float = math.inf
    last_piece: float = 0.0
    shown: float = 0.0

    def __post_init__(self) -> None:
        self.before = sum(one.rows + one.quarantined for one in self.committed.values())

    def add(self, piece: Written) -> None:
        """Note a written piece."""
        began = piece.work.began or time.time()
        self.encoding_since = min(self.encoding_since, began)
        self.last_piece = time.time()
        self.good += piece.good
        self.bad += piece.bad
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
            f"quarantined {self.bad}  ETA {'?' if eta is None else clock(eta)}"
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


def clock(seconds: float) -> str:
    """A duration as people read it: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for limit, size, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {name}" if name == "h" else f"{value:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"


def run(flow: Flow, ledger: Ledger, todo: list[dict[str, Any]], totals: Totals) -> None:
    """Embed shards and commit them.

    Args:
        flow: What the workers know.
        ledger: The data set.
        todo: `shard_id` and `rows` of each shard, as `prepare` takes them.
        totals: Counts what is done.

    Raises:
        ClusterError: Ray gave up on lost workers.
        SlqError: What ended the run; committed shards stay.
    """
    import ray

    try:
        _run(flow, ledger, todo, totals)
    except ray.exceptions.RayTaskError:
        raise  # a mistake of ours, with its traceback
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"Ray gave up: {reason}; committed shards stay, and the same command goes on from there"
        ) from None


def _run(flow: Flow, ledger: Ledger, todo: list[dict[str, Any]], totals: Totals) -> None:
    """See `run`."""
    flow = replace(flow, journal=start_journal())
    again = {one["shard_id"]: totals.committed[one["shard_id"]] for one in todo if one["rows"]}
    arrivals, sealing = Arrivals(), Sealing(flow)
    for piece in written_pieces(dataset(flow, todo, totals.workers).iter_rows()):
        totals.add(piece)
        complete = arrivals.add(piece)
        if complete is not None:
            sealing.submit(complete, again.get(piece.shard_id))
        for commit, pieces in sealing.finished():
            settle(flow, ledger, commit, pieces, totals)
        totals.tell()
    for commit, pieces in sealing.finished(wait=True):
        settle(flow, ledger, commit, pieces, totals)
    totals.tell(now=True)


def dataset(flow: Flow, todo: list[dict[str, Any]], workers: int) -> Any:
    """The flow on Ray Data: the only place that says `map_batches`."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    context = DataContext.get_current()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    resources = flow.recipe.resources
    whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    preparing = resources.prepare_workers
    return (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map_batches(
            prepare,
            **whole,
            fn_kwargs={"flow": flow},
            compute=TaskPoolStrategy(size=preparing) if preparing else None,
            num_cpus=1,
            # A piece, its packed form and the libraries. It also keeps Ray Data from fusing this stage into the
            # encoders, as it does with stages of equal options: then the model would wait for decoding.
            memory=2 * flow.recipe.embed.piece_bytes + _LIBRARY_BYTES,
        )
        .map_batches(
            EncodePieces,
            **whole,
            fn_constructor_kwargs={"flow": flow},
            compute=ActorPoolStrategy(
                size=workers,
                max_concurrent_calls_per_actor=THREADS,
                max_tasks_in_flight_per_actor=2 * THREADS,
                enable_true_multi_threading=True,
            ),
            num_cpus=0 if resources.gpus_per_worker else 1,
            num_gpus=resources.gpus_per_worker or None,
        )
        # No CPU of its own: where encoders and a waiting preparation hold all of them, nothing would ever be written.
        .map_batches(write_piece, **whole, fn_kwargs={"flow": flow}, num_cpus=0)
    )


def written_pieces(records: Iterable[dict[str, Any]]) -> Iterator[Written]:
    """The records of written pieces; an error of ours among them is raised."""
    for record in records:
        raise_failure(record)
        yield Written.from_record({k: value for k, value in record.items() if k != FAILURE})


def settle(
    flow: Flow, ledger: Ledger, commit: Commit, pieces: list[Written], totals: Totals
) -> None:
    """Commit a sealed shard, and remove its pieces."""
    if ledger.commit(commit):
        count("written_bytes", commit.bytes)
    totals.committed[commit.shard_id] = commit
    remove_pieces(ledger.store, flow.run, pieces)


class Sealing:
    """Shards whose files are being written by tasks.

    Args:
        flow: What the run knows.
    """

    def __init__(self, flow: Flow) -> None:
        import ray

        self._flow = flow
        self._task = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(sealed)
        self._pieces: dict[Any, list[Written]] = {}

    def submit(self, pieces: list[Written], before: Commit | None) -> None:
        """Begin with a shard."""
        self._pieces[self._task.remote(self._flow, pieces, before)] = pieces

    def finished(self, *, wait: bool = False) -> Iterator[tuple[Commit, list[Written]]]:
        """Shards that are done; with `wait` all of them, and otherwise so many that few enough are left.

        Raises:
            SlqError: A shard's files cannot be written.
        """
        import ray

        while self._pieces:
            patient = wait or len(self._pieces) > _MOST_SEALING
            ready, _ = ray.wait(list(self._pieces), num_returns=1, timeout=None if patient else 0)
            if not ready:
                return
            pieces = self._pieces.pop(ready[0])
            found = ray.get(ready[0])
            if not isinstance(found, Commit):
                raise_failure({FAILURE: found})
            yield found, pieces


def sealed(flow: Flow, pieces: list[Written], before: Commit | None) -> Commit | str:
    """`seal` as a task: the commit record, or the error that ends the run as text.

    Another driver may have committed the shard and removed all pieces meanwhile: then its record is the answer.
    """
    try:
        return seal(flow, pieces, before)
    except SlqError as error:
        other = flow.ledger().commits().get(pieces[0].shard_id)
        if isinstance(error, ArtifactError) and other is not None and other != before:
            return other
        return failure_text(error)
