"""Shards whose pieces are all there: tasks join them into files beside the run."""

from collections.abc import Iterator
from typing import Any

from pipelines.commits import Commit
from pipelines.embedding.flow import Flow
from pipelines.embedding.pieces import FAILURE, failure_text, raise_failure
from pipelines.embedding.seal import seal
from pipelines.embedding.write import Written
from slq.errors import ArtifactError, SlqError

_MOST_SEALING = 8  # shards whose files are being written at once


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
        other = None
        if isinstance(error, ArtifactError):
            other = flow.ledger().commits().get(pieces[0].shard_id)
        return failure_text(error) if other is None or other == before else other
