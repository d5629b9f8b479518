"""What the driver hears of a shard that cannot be sealed, and of a cluster that is lost."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.commits import Commit
from pipelines.embedding import sealing
from pipelines.embedding.write import Written
from pipelines.failures import failure_text
from pipelines.tasks import cluster_errors
from slq.errors import ArtifactError, ClusterError, SlqError, StorageError

PIECES = [Written(3, 0, last=True, good=1, bad=0)]
OTHERS = Commit(3, 1, 0, sha256="0" * 64, bytes=1, attempt="theirs")


def flow_with(monkeypatch: pytest.MonkeyPatch, error: SlqError, commits: Any) -> Any:
    def seal(*_: Any) -> Commit:
        raise error

    monkeypatch.setattr(sealing, "seal", seal)
    return SimpleNamespace(ledger=lambda: SimpleNamespace(commits=commits))


def test_a_store_that_is_down_is_asked_no_more_and_told_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down() -> Any:
        raise AssertionError("the store was asked again")

    error = StorageError("s3://b/x cannot be written: reset")
    flow = flow_with(monkeypatch, error, down)
    assert sealing.sealed(flow, PIECES, None) == failure_text(error)


def test_pieces_that_are_gone_are_another_drivers_commit_or_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = ArtifactError("piece x is gone")
    flow = flow_with(monkeypatch, error, lambda: {3: OTHERS})
    assert sealing.sealed(flow, PIECES, None) == OTHERS
    assert sealing.sealed(flow, PIECES, OTHERS) == failure_text(error)


def test_a_worker_that_dies_outside_of_the_flow_ends_the_run_in_words() -> None:
    import ray

    with (
        pytest.raises(ClusterError, match=r"^Ray gave up: .*; committed shards stay, and the same"),
        cluster_errors(),
    ):
        raise ray.exceptions.WorkerCrashedError
