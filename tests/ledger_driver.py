"""A small driver of a ledger, for tests that kill it: `python -m tests.ledger_driver ROOT NUM_SHARDS GENERATION`.

What it writes depends on shard and generation only: generation 0 quarantines a row of every shard, generation 1 of the
odd ones, later ones of none.
"""

import hashlib
import sys
from pathlib import Path

from pipelines.commits import Commit, attempt_name, errors_name, new_attempt, shard_name
from pipelines.ledger import Ledger

IDENTITY = {"fingerprint": "3f2a", "corpus": "c.parquet", "shard_rows": 8}


def contents(shard_id: int, generation: int) -> dict[str, bytes]:
    """Final names of a shard's files, the data file last, and what they hold."""
    data = b"shard %d generation %d" % (shard_id, generation)
    bad = generation == 0 or (generation == 1 and shard_id % 2)
    errors = {errors_name(shard_id, generation): b"errors of " + data} if bad else {}
    return {**errors, shard_name(shard_id, generation): data}


def written(ledger: Ledger, shard_id: int, generation: int = 0, prefix: bytes = b"") -> Commit:
    """An attempt as a worker leaves it: nothing under a final name.

    Args:
        prefix: Of the contents, which makes this attempt another one.
    """
    attempt, found = new_attempt(), contents(shard_id, generation)
    for final, data in found.items():
        ledger.store.write(attempt_name(final, attempt), prefix + data)
    *errors, data = (prefix + data for data in found.values())
    return Commit(
        shard_id=shard_id,
        rows=8 - len(errors),
        quarantined=len(errors),
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        attempt=attempt,
        errors_sha256=hashlib.sha256(errors[0]).hexdigest() if errors else None,
        generation=generation,
    )


def drive(root: str | Path, num_shards: int, generation: int = 0) -> None:
    """Bring each shard to a generation, going on where another driver stopped, and finish."""
    with Ledger(root) as ledger:
        ledger.begin(IDENTITY)
        for wanted in range(generation + 1):
            done = ledger.commits()
            for shard_id in range(num_shards):
                if shard_id not in done or done[shard_id].generation < wanted:
                    ledger.store.write(f"pieces/run/{shard_id}", b"piece")
                    ledger.commit(written(ledger, shard_id, wanted))
        ledger.finish({"num_shards": num_shards, "generation": generation})


if __name__ == "__main__":
    drive(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
