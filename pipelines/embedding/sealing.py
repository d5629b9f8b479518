"""Shards whose pieces are all there: actors join them into files beside the run."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

from pipelines.commits import Commit
from pipelines.embedding.flow import Flow
from pipelines.embedding.seal import seal
from pipelines.embedding.write import Written
from pipelines.failures import FAILURE, failure_text, raise_failure
from pipelines.leaving import leave_without_destructors
from slq.errors import ArtifactError, SlqError

_THREADS = 2  # shards that one sealer writes at once
_ENCODERS_EACH = 4  # that one sealer keeps up with: it only copies, compresses and hashes
_TRIES = 4  # a shard whose sealer dies so often ends the run


class Sealer:
    """An actor that stays: tasks would start a process for nearly every shard, as Ray ends idle ones after a second."""

    def __init__(self) -> None:
        leave_without_destructors()

    def sealed(self, flow: Flow, pieces: list[Written], before: Commit | None) -> Commit | str:
        """See `sealed`."""
        return sealed(flow, pieces, before)


class Sealing:
    """Shards whose files are being written by actors.

    Args:
        flow: What the run knows.
        workers: Encoders, whose pieces are joined.
    """

    def __init__(self, flow: Flow, workers: int) -> None:
        import ray

        self._flow = flow
        actor = ray.remote(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=_TRIES - 1,
            max_concurrency=_THREADS,
            scheduling_strategy="SPREAD",
        )(Sealer)
        self._sealers = [actor.remote() for _ in range(-(-workers // _ENCODERS_EACH))]
        self._next = cycle(self._sealers)
        self._pieces: dict[Any, list[Written]] = {}

    def submit(self, pieces: list[Written], before: Commit | None) -> None:
        """Begin with a shard."""
        self._pieces[next(self._next).sealed.remote(self._flow, pieces, before)] = pieces

    def finished(self, *, wait: bool = False) -> Iterator[tuple[Commit, list[Written]]]:
        """Shards that are done; with `wait` all of them, and otherwise so many that few enough are left.

        Raises:
            SlqError: A shard's files cannot be written.
        """
        import ray

        while self._pieces:
            patient = wait or len(self._pieces) > _THREADS * len(self._sealers)
            ready, _ = ray.wait(list(self._pieces), num_returns=1, timeout=None if patient else 0)
            if not ready:
                return
            pieces = self._pieces.pop(ready[0])
            found = ray.get(ready[0])
            if not isinstance(found, Commit):
                raise_failure({FAILURE: found})
            yield found, pieces


def sealed(flow: Flow, pieces: list[Written], before: Commit | None) -> Commit | str:
    """`seal` in an actor: the commit record, or the error that ends the run as text.

    Another driver may have committed the shard and removed all pieces meanwhile: then its record is the answer.
    """
    try:
        return seal(flow, pieces, before)
    except SlqError as error:
        other = None
        if isinstance(error, ArtifactError):
            other = flow.ledger().commits().get(pieces[0].shard_id)
        return failure_text(error) if other is None or other == before else other
