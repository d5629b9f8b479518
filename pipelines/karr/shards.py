"""The actor that makes shards: rows, files, and the commit record for the driver."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipelines.commits import Commit
from pipelines.failures import FAILURE, failure_text
from pipelines.karr.models import load_models
from pipelines.karr.rows import ROWS, Row, ShardMaker
from pipelines.karr.source import read_captions
from pipelines.leaving import leave_without_destructors
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from pipelines.shard_files import write_attempt
from pipelines.storage import Store
from slq.errors import HardwareError, SlqError
from slq.karr.reasons import ERRORS as ERROR_REASONS

COMMAND = "slq karr"


@dataclass(slots=True)
class Work:
    """What a shard came to.

    Attributes:
        captions: Of the plan.
        candidates: That nothing rejects yet.
        errors: Without an answer or an image.
        asked: Questions that language models answered.
        kept: Answers that were there already.
        problem: Of one of the errors.
    """

    captions: int = 0
    candidates: int = 0
    errors: int = 0
    asked: int = 0
    kept: int = 0
    problem: str = ""


class MakeShards:
    """An actor that makes shards: loads its models once.

    Args:
        recipe: The resolved recipe.
        workers: Actors of the run.
    """

    def __init__(self, recipe: Recipe, workers: int) -> None:
        leave_without_destructors()
        self._recipe = recipe
        self._store = ledger_of(recipe).store
        self._refusal: SlqError | None = None
        try:
            self._models = load_models(recipe, self._store, workers)
        except SlqError as error:
            self._refusal = error  # a constructor that raises only kills its actor

    def __call__(self, block: pa.Table) -> pa.Table:
        """Make a shard and write its files.

        Args:
            block: One row with `shard_id`, and `generation` of the commit that it follows; null without one.

        Returns:
            One row: the commit record and the work as JSON, or the error that ends the run.
        """
        if self._refusal is not None:
            return _told(failure=failure_text(self._refusal))
        shard_id, before = (block[name][0].as_py() for name in ("shard_id", "generation"))
        counts = self._models.counts()
        try:
            rows = self._made(shard_id)
            commit = written(self._store, shard_id, rows, 0 if before is None else before + 1)
        except SlqError as error:
            return _told(failure=failure_text(error))
        errors = [row for row in rows if row["reason"] in ERROR_REASONS]
        now = self._models.counts()
        work = {
            "captions": len(rows),
            "candidates": sum(row["reason"] is None for row in rows),
            "errors": len(errors),
            **{what: now[what] - counts[what] for what in now},
            "problem": f"{errors[0]['source_id']}: {errors[0]['detail']}" if errors else "",
        }
        return _told(commit=commit.to_json(), work=json.dumps(work))

    def _made(self, shard_id: int) -> list[Row]:
        maker = ShardMaker(self._recipe.karr, self._models, self._recipe.storage.retry_s)
        try:
            return maker.made(read_captions(self._store, shard_id))
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"memory ran out over shard {shard_id}: {error}; lower rerank.batch_size, embed.batch_size or "
                "karr.workers and run the same command again"
            ) from None


def ledger_of(recipe: Recipe) -> Ledger:
    """The run's files."""
    return Ledger(recipe.storage.karr, recipe.storage.retry_s, command=COMMAND)


def written(store: Store, shard_id: int, rows: Sequence[Row], generation: int) -> Commit:
    """Write a shard's files and leave them to the driver.

    Raises:
        StorageError: They cannot be written.
    """
    good = [row for row in rows if row["reason"] not in ERROR_REASONS]
    bad = [
        _error(row, place, shard_id)
        for place, row in enumerate(rows)
        if row["reason"] in ERROR_REASONS
    ]
    return write_attempt(store, shard_id, generation, rows=good, schema=ROWS, errors=bad)


def _error(row: Row, place: int, shard_id: int) -> Row:
    return {
        "id": row["source_id"],
        "uri": row["uri"],
        "stage": "karr",
        "error": row["reason"],
        "message": row["detail"],
        "shard_id": shard_id,
        "row_in_shard": place,
    }


def _told(
    *, commit: str | None = None, work: str | None = None, failure: str | None = None
) -> pa.Table:
    named = (("commit", commit), ("work", work), (FAILURE, failure))
    return pa.table({name: pa.array([value], pa.string()) for name, value in named})
