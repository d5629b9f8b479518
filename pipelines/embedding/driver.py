"""The driver's side: Ray Data from shard ids to written pieces, sealing, and commits."""

from contextlib import closing
from dataclasses import replace
from typing import Any

from pipelines.commits import ERRORS, Commit
from pipelines.embedding.arrivals import Arrivals
from pipelines.embedding.encode import EncodePieces, encoding_threads
from pipelines.embedding.flow import Flow
from pipelines.embedding.metrics import count
from pipelines.embedding.prepare import prepare
from pipelines.embedding.seal import remove_pieces
from pipelines.embedding.sealing import Sealing
from pipelines.embedding.totals import Totals, too_many_bad
from pipelines.embedding.write import WritePieces, Written, written_pieces
from pipelines.journal import start_journal
from pipelines.ledger import Ledger
from pipelines.streaming import WHOLE, rows_alone, staying_actors
from pipelines.tasks import cluster_errors

_LIBRARY_BYTES = 2**30


def run(flow: Flow, ledger: Ledger, todo: list[dict[str, Any]], totals: Totals) -> None:
    """Embed shards and commit them.

    Args:
        flow: What the workers know.
        ledger: The data set.
        todo: `shard_id` and `generation` of each shard, as `prepare` takes them.
        totals: Counts what is done.

    Raises:
        ClusterError: Ray gave up on lost workers.
        DataError: More rows are quarantined already than `embed.max_error_share` allows of all.
        SlqError: What ended the run; committed shards stay.
    """
    with cluster_errors():
        _run(flow, ledger, todo, totals)


def _run(flow: Flow, ledger: Ledger, todo: list[dict[str, Any]], totals: Totals) -> None:
    """See `run`."""
    flow = replace(flow, journal=start_journal())
    again = {
        one["shard_id"]: totals.committed[one["shard_id"]]
        for one in todo
        if one["generation"] is not None
    }
    totals.bad_before = sum(
        one.quarantined for one in totals.committed.values() if one.shard_id not in again
    )
    max_share = flow.recipe.embed.max_error_share
    if not totals.has_too_many_bad(max_share):
        _go_through(flow, ledger, todo, totals, again)
    if totals.has_too_many_bad(max_share):
        bad, rows = totals.bad_before + totals.bad, totals.num_rows or 0
        raise too_many_bad(bad, rows, max_share, ledger.store.url(ERRORS), totals.problem)


def _go_through(
    flow: Flow,
    ledger: Ledger,
    todo: list[dict[str, Any]],
    totals: Totals,
    again: dict[int, Commit],
) -> None:
    """Embed shards and commit them, until all are done or too much is quarantined to go on."""
    arrivals, sealing = Arrivals(), Sealing(flow, totals.workers)
    rows = iter(dataset(flow, todo, totals.workers).iter_rows())
    # Ended here, whatever happens: a flow that still runs while Ray shuts down takes the process with it, silently.
    with closing(rows):
        for piece in written_pieces(rows):
            totals.add(piece)
            complete = arrivals.add(piece)
            if complete is not None:
                sealing.submit(complete, again.get(piece.shard_id))
            for commit, pieces in sealing.finished():
                settle(flow, ledger, commit, pieces, totals)
            totals.tell()
            if totals.has_too_many_bad(flow.recipe.embed.max_error_share):
                break
    for commit, pieces in sealing.finished(wait=True):
        settle(flow, ledger, commit, pieces, totals)
    totals.tell(now=True)


def dataset(flow: Flow, todo: list[dict[str, Any]], workers: int) -> Any:
    """The flow on Ray Data."""
    from ray.data import TaskPoolStrategy

    resources = flow.recipe.resources
    preparing = resources.prepare_workers
    return (
        rows_alone(todo)
        .map_batches(
            prepare,
            **WHOLE,
            fn_kwargs={"flow": flow},
            compute=TaskPoolStrategy(size=preparing) if preparing else None,
            num_cpus=1,
            # A piece, its packed form and the libraries. It also keeps Ray Data from fusing this stage into the
            # encoders, as it does with stages of equal options: then the model would wait for decoding.
            memory=2 * flow.recipe.embed.piece_bytes + _LIBRARY_BYTES,
        )
        .map_batches(
            EncodePieces,
            **WHOLE,
            fn_constructor_kwargs={"flow": flow},
            compute=staying_actors(workers, encoding_threads(resources)),
            num_cpus=0 if resources.gpus_per_worker else 1,
            num_gpus=resources.gpus_per_worker or None,
        )
        # No CPU of its own: where encoders and a waiting preparation hold all of them, nothing would ever be written.
        .map_batches(
            WritePieces,
            **WHOLE,
            fn_constructor_kwargs={"flow": flow},
            compute=staying_actors(-(-workers // WritePieces.threads), WritePieces.threads),
            num_cpus=0,
        )
    )


def settle(
    flow: Flow, ledger: Ledger, commit: Commit, pieces: list[Written], totals: Totals
) -> None:
    """Commit a sealed shard, and remove its pieces."""
    if ledger.commit(commit):
        count("written_bytes", commit.bytes)
    totals.committed[commit.shard_id] = commit
    remove_pieces(ledger.store, flow.run, pieces)
